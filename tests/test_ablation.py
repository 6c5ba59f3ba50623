"""An ablation: its variants, their controls, the one graph that they are, and what its numbers say."""

import math
import random
import re
import statistics as stdlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aquilamoe.ablation import costs, statistics
from aquilamoe.ablation import plan as planning
from aquilamoe.ablation.union import Union, build
from aquilamoe.ablation.variants import Values, baseline, variants
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import PretrainStage
from aquilamoe.pipeline.store import Store

Composed = Callable[..., dict[str, Any]]
REPOSITORY = Path(__file__).parent.parent
METHODS = {name: (f"growth={name}",) for name in ("fpi", "aki", "aki_pro", "random")}
DEPTHS = {name: (f"growth.depth={name}",) for name in ("interpolate", "stack")}


def configured(**changes: Any) -> AblationConfig:
    values = {
        "axes": {
            "method": {"values": METHODS, "baseline": "fpi"},
            "depth": {"values": DEPTHS, "baseline": "stack"},
        },
        "exclude": [],
        "objective": {"stage": "dense", "metric": "loss_end"},
        "budget": {"tokens": None, "flops": None},
        "controls": {"scratch_learning_rate_ratios": [0.5, 1.0], "continued_learning_rate_ratios": [1.0]},
        "seeds": 3,
        "scheduler": "none",
        "trial_cpus": 1,
    }
    return AblationConfig.model_validate(values | changes)


@pytest.fixture
def expand(compose: Composed) -> Callable[..., Union]:
    def expanded(*words: str, **changes: Any) -> Union:
        def each(overrides: Sequence[str], seeds: Sequence[int]) -> list[Values]:
            return [compose(*words, *overrides, f"seed={seed}") for seed in seeds]

        return build(configured(**changes), each)

    return expanded


def test_variants_are_all_combinations_in_the_order_of_the_axes() -> None:
    config = configured()
    names = [variant.name for variant in variants(config)]
    assert names[:3] == ["fpi, interpolate", "fpi, stack", "aki, interpolate"]
    assert len(set(names)) == 8
    assert baseline(config).name == "fpi, stack"
    assert baseline(config).overrides == ("growth=fpi", "growth.depth=stack")


def test_excluded_combinations_are_left_out() -> None:
    config = configured(exclude=[{"method": "random", "depth": "interpolate"}, {"method": "aki_pro"}])
    names = [variant.name for variant in variants(config)]
    assert "random, stack" in names and "random, interpolate" not in names and "aki_pro, stack" not in names
    assert len(names) == 5


def test_every_seeds_source_is_trained_once_and_the_data_once_for_all(expand: Callable[..., Union]) -> None:
    union = expand()
    names = [node.name for node in union.nodes.values()]
    assert [names.count(name) for name in ("corpus", "tokenizer", "tokens")] == [1, 1, 1]
    assert names.count("prepare") == 3
    assert names.count("scale_up") == names.count("dense") == 8 * 3
    assert "moe" not in names and "export" not in names
    assert union.flops / union.naive_flops < 0.35
    own = [leaf for leaf in union.leaves if leaf.control is None]
    assert len(own) == 24 and len({leaf.fingerprint for leaf in own}) == 24


def test_inputs_come_before_the_stages_that_read_them(expand: Callable[..., Union]) -> None:
    for leaf in expand(seeds=[7]).leaves:
        seen: set[str] = set()
        for name, node in leaf.nodes.items():
            assert set(node.stage.inputs.values()) <= seen
            seen.add(name)
        assert leaf.stage in seen


def test_controls_have_cost_or_seen_what_the_variant_has(expand: Callable[..., Union]) -> None:
    union = expand(seeds=[1])
    target = next(leaf for leaf in union.leaves if leaf.control is None)
    node = target.nodes["dense"]
    kinds = set()
    for leaf in (leaf for leaf in union.leaves if leaf.control is not None):
        assert leaf.control is not None
        own = leaf.nodes[leaf.stage]
        assert isinstance(own.stage, PretrainStage) and own.model is not None
        batch = own.stage.batch_tokens
        kinds.add(leaf.control.kind)
        if leaf.control.equal == "flops":
            slack = batch * own.model.flops_per_token(own.stage.sequence_length)
            assert 0 <= node.lineage_flops - own.lineage_flops < slack
        else:
            assert 0 <= node.lineage_tokens - own.lineage_tokens < batch
        if leaf.control.of is None:
            assert own.model == node.model and "prepare" not in leaf.nodes
        else:
            assert own.model == leaf.nodes["prepare"].model and own.stage.optimizer_state == "keep"
    assert kinds == {"scratch_flops", "scratch_tokens", "continued_prepare_flops", "continued_prepare_tokens"}


def test_a_scale_out_is_also_compared_with_both_dense_models_trained_on(expand: Callable[..., Union]) -> None:
    axes = {
        "experts": {"values": {n: (f"stages.scale_out.model.num_experts={n}",) for n in ("4", "8")}, "baseline": "8"}
    }
    union = expand(axes=axes, objective={"stage": "moe", "metric": "loss_end"}, seeds=[1])
    kinds = {leaf.control.kind for leaf in union.leaves if leaf.control}
    assert {"continued_prepare_flops", "continued_dense_flops", "continued_dense_tokens", "scratch_flops"} <= kinds


def test_the_budget_is_that_of_the_compared_stage_in_tokens_or_flops(expand: Callable[..., Union]) -> None:
    for leaf in expand(budget={"tokens": 204_800, "flops": None}, seeds=[1]).leaves:
        if leaf.control is None:
            assert leaf.nodes["dense"].tokens == 204_800
    for leaf in expand(budget={"tokens": None, "flops": 3e12}, seeds=[1]).leaves:
        if leaf.control is None:
            assert 0.97 < leaf.nodes["dense"].flops / 3e12 <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"axes": {"lr": {"values": {"a": ("stages.moe.learning_rate=1e-4",), "b": ()}, "baseline": "a"}}},
            "ablation.axes.lr: none of its values (a, b) changes what 'dense' computes; vary a key that",
        ),
        (
            {
                "axes": {
                    "m": {"values": {"a": ("growth=fpi",), "b": ("growth=aki",), "c": ("growth=fpi",)}, "baseline": "a"}
                }
            },
            "ablation.axes: 'a' and 'c' compute the same; take one of them away, or change one",
        ),
        ({"objective": {"stage": "dens", "metric": "loss_end"}}, "there is no stage 'dens'; did you mean 'dense'?"),
        (
            {"objective": {"stage": "scale_up", "metric": "loss_end"}},
            "'scale_up' is a scale_up stage and trains no",
        ),
        ({"budget": {"tokens": 8192, "flops": None}}, "ablation.budget: stage dense: warmup_tokens + decay_tokens = "),
    ],
)
def test_what_compares_nothing_is_refused(expand: Callable[..., Union], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(**{"seeds": [1], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude": [{"methd": "fpi"}]}, "exclude: there is no axis 'methd'; did you mean 'method'?"),
        ({"exclude": [{"method": "fp"}]}, "exclude: axis 'method' has no value 'fp'; did you mean 'fpi'?"),
        ({"exclude": [{"method": "fpi"}]}, "exclude leaves out the baseline"),
        ({"seeds": [1, 2, 1]}, "seed 1 is named 2 times"),
        ({"seeds": 0}, "0 seeds compare nothing"),
        ({"seeds": []}, "no seeds"),
        ({"budget": {"tokens": 1, "flops": 1.0}}, "both tokens (1) and flops (1)"),
        ({"axes": {"m": {"values": METHODS, "baseline": "fp"}}}, "baseline 'fp' is none of its values"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        configured(**changes)


# The command


@pytest.fixture
def ablate(environment: dict[str, str], tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `python workflows/ablations.py` in a process and a folder of its own."""

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        script = REPOSITORY / "workflows" / "ablations.py"
        return subprocess.run(
            [sys.executable, script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "conf" / "ablation").glob("*.yaml")))
def test_the_plan_of_every_ablation_is_a_table_of_variants_and_controls(
    ablate: Callable[..., "subprocess.CompletedProcess[str]"], name: str, tmp_path: Path
) -> None:
    result = ablate(f"+ablation={name}", "action=plan", "seeds=[3,5]")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"ablation_{name}: ")
    assert sum(line.startswith("variant ") and line.endswith("0 of 2") for line in lines) >= 2
    assert sum(line.startswith("control  scratch_") for line in lines) >= 2
    assert "shared ancestors run once" in result.stdout
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: ablation: none is chosen; choose one with +ablation=NAME (valid: "),
        (
            ["ablation=scale_u"],
            "error: ablation=scale_u: there is no conf/ablation/scale_u.yaml; did",
        ),
        (["ablation=scale_up", "seeds=[4,4]"], "error: ablation.seeds: seed 4 is named 2 times; a repeat is no new"),
        (
            ["ablation=scale_up", "ablation.objective.stage=prep"],
            "error: ablation.objective.stage: there is no stage",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_runs(
    ablate: Callable[..., "subprocess.CompletedProcess[str]"], words: list[str], message: str, tmp_path: Path
) -> None:
    result = ablate(*words)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What the numbers say


def test_an_ablation_costs_what_its_variants_and_controls_need_alone_and_once_what_they_share(
    compose: Composed, expand: Callable[..., Union], tmp_path: Path
) -> None:
    words = ("cluster.price_per_device_hour=2", "cluster.device_watts=100", "cluster.workers=2")
    cluster = graph.parse(compose(*words)).cluster
    union = expand(*words, seeds=1, exclude=[{"method": "aki"}, {"method": "random"}])
    found = costs.table(union, planning.tasks(union, Store(tmp_path), 1e9), cluster)
    *lines, shared = found.rows
    assert [row.name for row in lines[:2]] == ["fpi, interpolate", "fpi, stack"] and len(lines) > 4
    whole = found.total.own
    assert whole.flops == union.flops and whole.flops == pytest.approx(sum(row.own.flops for row in found.rows))
    assert whole.money == pytest.approx(sum(row.own.money for row in found.rows))
    assert whole.device_seconds == pytest.approx(2 * union.flops / 1e9, rel=1e-3)  # of two workers; growing is quick
    assert whole.money == pytest.approx(2 * whole.device_seconds / 3600)
    assert whole.energy_kwh == pytest.approx(0.1 * whole.device_seconds / 3600)
    for row in lines:
        assert row.lineage is not None and row.own.flops <= row.lineage.flops <= row.own.flops + shared.own.flops
    assert all(row.lineage and row.own.flops < row.lineage.flops for row in lines[:4])  # the variants have a source
    assert found.figures == ("FLOPs", "device time", "energy", "money")


def test_the_interval_of_paired_differences_is_students() -> None:
    """Against the textbook formula with a table's quantile: t(0.975; 4) = 2.776."""
    ones = {1: 3.0, 2: 3.2, 3: 2.9, 4: 3.1, 5: 3.3}
    others = {1: 3.1, 2: 3.1, 3: 3.1, 4: 3.2, 5: 3.2, 6: 9.0}
    found = statistics.paired_difference(ones, others)
    differences = [ones[seed] - others[seed] for seed in ones]
    assert found.pairs == 5 and math.isclose(found.mean, stdlib.fmean(differences))
    assert found.half_width is not None
    assert math.isclose(found.half_width, 2.776 * stdlib.stdev(differences) / math.sqrt(5), rel_tol=1e-3)
    assert not found.excludes_zero


def test_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        shared = {seed: draw.gauss(0, 5) for seed in range(3)}
        ones = {seed: value + 0.3 + draw.gauss(0, 0.1) for seed, value in shared.items()}
        found = statistics.paired_difference(ones, {seed: value + draw.gauss(0, 0.1) for seed, value in shared.items()})
        assert found.half_width is not None
        hits += abs(found.mean - 0.3) <= found.half_width
    assert 0.94 <= hits / 2000 <= 0.96


def test_one_pair_gives_no_interval_and_no_winner() -> None:
    found = statistics.ranking({"a": {1: 1.0}, "b": {1: 9.0}}, baseline="a")
    assert [entry.rank for entry in found] == [1, 1]
    assert found[1].to_baseline.half_width is None
    with pytest.raises(ValueError, match="no seed in common"):
        statistics.paired_difference({1: 1.0}, {2: 1.0})


def test_variants_that_the_seeds_do_not_tell_apart_share_a_rank() -> None:
    noise = {1: 0.00, 2: 0.03, 3: -0.02}
    results = {
        "worst": {seed: 4.0 + value for seed, value in noise.items()},
        "best": {seed: 3.0 + value for seed, value in noise.items()},
        "near": {seed: 3.05 + value * wobble for (seed, value), wobble in zip(noise.items(), (1, -1, 3), strict=True)},
        "middle": {seed: 3.5 + 1.1 * value for seed, value in noise.items()},
    }
    found = statistics.ranking(results, baseline="middle")
    assert [(entry.name, entry.rank) for entry in found] == [("best", 1), ("near", 1), ("middle", 3), ("worst", 4)]
    assert found[2].to_baseline.mean == 0.0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.floats(0.5, 9.5), min_size=1, max_size=4, unique=True))
def test_crossings_are_found_where_two_curves_cross(roots: list[float]) -> None:
    """A product of (x - root) against zero, seen at places a tenth apart."""
    roots = sorted(round(root * 2) / 2 + 0.03 for root in roots)
    places = [index / 10 for index in range(101)]
    curve = [(x, math.prod(x - root for root in roots)) for x in places]
    found = statistics.crossings(curve, [(x, 0.0) for x in places])
    odd = [root for root in sorted(set(roots)) if roots.count(root) % 2]
    assert len(found) == len(odd)
    assert all(abs(ours - root) < 0.1 for ours, root in zip(found, odd, strict=True))


def test_curves_that_touch_do_not_cross() -> None:
    assert statistics.crossings([(0, 1.0), (1, 0.0), (2, 1.0)], [(0, 0.0), (1, 0.0), (2, 0.0)]) == []
    assert statistics.crossings([(0, 1.0), (1, 0.0), (2, -1.0)], [(0, 0.0), (1, 0.0), (2, 0.0)]) == [1.0]


def test_a_mean_curve_is_taken_where_all_seeds_were_measured() -> None:
    assert statistics.mean_curve([[(0, 4.0), (1, 3.0)], [(0, 2.0), (1, 2.0), (2, 1.0)]]) == [(0, 3.0), (1, 2.5)]


def test_the_saving_is_scratchs_cost_over_the_lines_to_the_loss_that_scratch_ends_with() -> None:
    scratch = [(0.0, 8.0), (100.0, 4.0), (200.0, 3.0)]
    assert statistics.saving(scratch, [(20.0, 5.0), (50.0, 3.5), (70.0, 2.5)]) == 200 / 60
    assert statistics.saving(scratch, [(20.0, 5.0), (50.0, 3.5)]) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (60, 2.00030)]
)
def test_the_quantile_of_students_t_is_the_tables(freedom: int, quantile: float) -> None:
    assert math.isclose(statistics.t_quantile(freedom), quantile, rel_tol=1e-5)


def test_a_curve_is_read_between_its_points_and_not_outside_of_them() -> None:
    curve = [(0.0, 4.0), (10.0, 3.0), (20.0, 3.5)]
    assert statistics.value_at(curve, 5.0) == 3.5 and statistics.value_at(curve, 20.0) == 3.5
    assert statistics.value_at(curve, 21.0) is None
    assert statistics.first_at(curve, 3.25) == 7.5 and statistics.first_at(curve, 2.9) is None
    assert statistics.first_at(curve, 9.0) == 0.0


def test_the_leader_is_who_is_lowest_from_where_on() -> None:
    curves = {"a": [(1.0, 3.0), (2.0, 2.5), (3.0, 2.4)], "b": [(1.0, 3.5), (2.0, 2.6), (3.0, 2.0), (4.0, 1.0)]}
    assert statistics.leaders(curves) == [(1.0, "a"), (3.0, "b")]
