"""What early stopping compares trials by, with Ray Tune's own scheduler."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from aquilamoe.ablation import plan as planning
from aquilamoe.ablation.study_graph import build
from aquilamoe.ablation.trial import Stopping
from aquilamoe.ablation.tuning import LOSS, TuneReporter, _halving
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline.store import Record, Store

# Ray Data, which Tune imports, warns of its own options, which are at their defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
METHODS = {name: (f"growth={name}",) for name in ("fpi", "aki")}


@pytest.fixture
def tasks(compose: Callable[..., dict[str, Any]], tmp_path: Path) -> Sequence[planning.Task]:
    ablation = AblationConfig.model_validate(
        {
            "axes": {"method": {"values": METHODS, "baseline": "fpi"}},
            "exclude": [],
            "objective": {"stage": "dense", "metric": "recovery_tokens"},
            "budget": {"tokens": None, "flops": None},
            "controls": {
                "scratch_of": "none",
                "scratch_learning_rate_ratios": [1.0],
                "continued_learning_rate_ratios": [1.0],
            },
            "seeds": 1,
            "scheduler": "asha",
            "trial_cpus": 1,
        }
    )
    union = build(ablation, lambda words, seeds: [compose(*words, f"seed={seed}") for seed in seeds])
    return planning.tasks(union, Store(tmp_path), Speed(1e9))


@pytest.mark.parametrize(("by_recovery", "decision"), [(True, "STOP"), (False, "CONTINUE")])
def test_by_recovery_who_is_far_from_his_own_source_falls_behind_however_low_his_loss(
    by_recovery: bool, decision: str, tasks: Sequence[planning.Task], tmp_path: Path
) -> None:
    from ray.tune.experiment import Trial

    scheduler = _halving(tasks, Stopping(by_recovery))
    tokens = tasks[0].leaf.nodes["dense"].tokens
    decisions = []
    # A first trial that is nearly back at a high loss of its source, and one with a lower loss and a better source.
    for source_loss, loss in ((3.0, 3.1), (2.0, 2.5)):
        reporter = TuneReporter("dense", tokens)
        grown = {"metrics": {"source_final_loss": source_loss}}
        reporter.stage_finished("scale_up", tmp_path, cast(Record, grown), cached=False)
        trial = Trial("trial", stub=True)
        scheduler.on_trial_add(cast(Any, None), trial)
        result = reporter.measures({"val/loss": loss, "tokens": tokens // 2})
        assert result[LOSS] == loss
        decisions.append(scheduler.on_trial_result(cast(Any, None), trial, result))
    assert decisions == ["CONTINUE", decision]


def test_who_is_back_is_back_however_much_lower_he_goes(tmp_path: Path) -> None:
    reporter = TuneReporter("dense", 100)
    reporter.goal = 3.0
    above = [reporter.measures({"val/loss": loss, "tokens": 50})["above_source"] for loss in (3.5, 3.0, 1.0)]
    assert above == [0.5, 0.0, 0.0]
