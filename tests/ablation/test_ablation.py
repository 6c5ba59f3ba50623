"""An ablation: its variants, their controls, the one graph that they are, and what its numbers show."""

import math
import random
import re
import statistics as stdlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aquilamoe.ablation import intervals, statistics, trials
from aquilamoe.ablation import plan as planning
from aquilamoe.ablation.study_graph import StudyGraph, build
from aquilamoe.ablation.trial import Failure, Field, Stopped, compute
from aquilamoe.ablation.variants import Values, baseline, variants
from aquilamoe.cli import ablation_costs
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import PretrainStage
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline.store import Store

Composed = Callable[..., dict[str, Any]]
REPOSITORY = Path(__file__).parents[2]
METHODS = {name: (f"growth={name}",) for name in ("fpi", "aki", "aki_pro", "random")}
# Fewer variants to compose.
ONE_METHOD = ["ablation.exclude=[{method:random},{method:aki},{method:aki_pro},{method:lemon},{method:hypercloning}]"]
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
def expand(compose: Composed) -> Callable[..., StudyGraph]:
    def expanded(*words: str, **changes: Any) -> StudyGraph:
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


def test_one_at_a_time_leaves_what_differs_from_the_baseline_in_one_axis() -> None:
    names = [variant.name for variant in variants(configured(combinations="one_at_a_time"))]
    assert names == ["fpi, interpolate", "fpi, stack", "aki, stack", "aki_pro, stack", "random, stack"]


@pytest.mark.process
def test_every_seeds_source_is_trained_once_and_the_data_once_for_all(expand: Callable[..., StudyGraph]) -> None:
    union = expand()
    names = [node.name for node in union.nodes.values()]
    assert [names.count(name) for name in ("corpus", "tokenizer", "tokens")] == [1, 1, 1]
    assert names.count("prepare") == 3
    assert names.count("scale_up") == names.count("dense") == 8 * 3
    assert "moe" not in names and "export" not in names
    assert union.flops / union.naive_flops < 0.35
    own = [leaf for leaf in union.leaves if leaf.control is None]
    assert len(own) == 24 and len({leaf.fingerprint for leaf in own}) == 24


def test_inputs_come_before_the_stages_that_read_them(expand: Callable[..., StudyGraph]) -> None:
    for leaf in expand(seeds=[7]).leaves:
        seen: set[str] = set()
        for name, node in leaf.nodes.items():
            assert set(node.stage.inputs.values()) <= seen
            seen.add(name)
        assert leaf.stage in seen


def test_controls_have_cost_or_seen_what_the_variant_has(expand: Callable[..., StudyGraph]) -> None:
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


def test_a_scale_out_is_also_compared_with_both_dense_models_trained_on(expand: Callable[..., StudyGraph]) -> None:
    axes = {
        "experts": {"values": {n: (f"stages.scale_out.model.num_experts={n}",) for n in ("4", "8")}, "baseline": "8"}
    }
    union = expand(axes=axes, objective={"stage": "moe", "metric": "loss_end"}, seeds=[1])
    kinds = {leaf.control.kind for leaf in union.leaves if leaf.control}
    assert {"continued_prepare_flops", "continued_dense_flops", "continued_dense_tokens", "scratch_flops"} <= kinds


def test_what_is_grown_twice_without_training_between_is_compared_with_the_first_growth_trained_on(
    expand: Callable[..., StudyGraph],
) -> None:
    union = expand(
        "stages.scale_out.inputs.source=scale_up",
        axes={"init": {"values": {name: (f"upcycling={name}",) for name in ("copy", "drop")}, "baseline": "copy"}},
        objective={"stage": "moe", "metric": "loss_end"},
        seeds=[1],
    )
    found = [leaf for leaf in union.leaves if leaf.control and leaf.control.of == "scale_up"]
    assert {leaf.control.equal for leaf in found if leaf.control} == {"flops", "tokens"}
    for leaf in found:
        stage, target = leaf.nodes[leaf.stage].stage, leaf.nodes[leaf.stage]
        assert isinstance(stage, PretrainStage)
        assert stage.optimizer_state == "reset" and stage.schedule.warmup_tokens > 0
        assert target.model == leaf.nodes["scale_up"].model and target.ancestor_tokens == leaf.nodes["prepare"].tokens


@pytest.mark.parametrize(("scratch_of", "sizes"), [("all", 2), ("baseline", 1), ("none", 0)])
def test_controls_from_scratch_are_those_of_all_variants_of_the_baseline_or_of_none(
    expand: Callable[..., StudyGraph], scratch_of: str, sizes: int
) -> None:
    experts = {n: (f"stages.scale_out.model.num_experts={n}",) for n in ("4", "8")}
    controls = {
        "scratch_of": scratch_of,
        "scratch_learning_rate_ratios": [1.0],
        "continued_learning_rate_ratios": [1.0],
    }
    union = expand(
        axes={"experts": {"values": experts, "baseline": "8"}},
        objective={"stage": "moe", "metric": "loss_end"},
        controls=controls,
        seeds=[1],
    )
    models = {leaf.nodes[leaf.stage].model for leaf in union.leaves if leaf.control and leaf.control.of is None}
    assert len(models) == sizes
    assert any(leaf.control.of == "dense" for leaf in union.leaves if leaf.control)


def test_an_ablation_that_is_cut_has_whole_comparisons_of_its_first_seeds(
    expand: Callable[..., StudyGraph], tmp_path: Path
) -> None:
    found = planning.tasks(expand(seeds=[5, 2]), Store(tmp_path), Speed(1e9))
    seeds = [task.leaf.seed for task in found]
    assert seeds == sorted(seeds, reverse=True) and seeds.count(5) == seeds.count(2) == 8 + 6


def test_what_needs_a_source_that_failed_is_not_tried(expand: Callable[..., StudyGraph], tmp_path: Path) -> None:
    tasks = planning.tasks(expand(seeds=[1, 2]), Store(tmp_path), Speed(1e9))
    sources = planning.sources(tasks)
    broken = next(source for source in sources if source.leaf.seed == 2)
    ended: list[str] = []
    left, lost = trials.without_source(
        tasks, sources, {broken.name: Failure("no", tmp_path / "log")}, lambda task, _: ended.append(task.name)
    )
    assert {task.leaf.seed for task in left if "prepare" in task.leaf.nodes} == {1}
    assert {task.leaf.seed for task in left} == {1, 2}, "what starts from scratch has no source"
    assert ended == list(lost) and len(lost) == 8 + 2
    assert all(each.log.read_text().startswith("its source failed: no") for each in lost.values())


def test_what_early_stopping_ended_is_remembered_among_the_same_trials_only(
    expand: Callable[..., StudyGraph], tmp_path: Path
) -> None:
    tasks = planning.tasks(expand(seeds=[1]), Store(tmp_path), Speed(1e9))
    field = Field(tasks, Store(tmp_path), lambda *_: None)
    field.ended(tasks[0].name, stopped=Stopped(4096, 3.5))
    again = Field(tasks, Store(tmp_path), lambda *_: None)
    assert again.stopped == {tasks[0].name: Stopped(4096, 3.5)}
    assert again.waiting() == [task.name for task in tasks[1:]]
    assert len(Field(tasks[:-1], Store(tmp_path), lambda *_: None).waiting()) == len(tasks) - 1


class Surprise:
    """Observes a trial that fails when its first stage starts, of something that was done to it."""

    def __init__(self, done: Callable[[], Any]) -> None:
        self.done = done

    def stage_started(self, *_: Any) -> None:
        self.done()
        raise RuntimeError("cannot schedule new futures after shutdown")

    stage_progress = stage_finished = stage_failed = lambda *_: None


def test_what_goes_wrong_in_a_trial_that_was_stopped_is_no_failure_of_it(
    expand: Callable[..., StudyGraph], compose: Composed, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    task, *_ = planning.tasks(expand(seeds=[1]), store, Speed(1e9))
    field = Field([task], store, lambda *_: None)
    cluster = graph.parse(compose("cluster=local_process")).cluster
    stop = partial(field.ended, task.name, stopped=Stopped(4096, 3.5))
    for done in (stop, lambda: None):
        compute(task, store, cluster, field.logs, [Surprise(done)])
        assert sorted(path.suffix for path in field.logs.iterdir()) == [".stopped" if done is stop else ".log"]


def test_the_budget_is_that_of_the_compared_stage_in_tokens_or_flops(expand: Callable[..., StudyGraph]) -> None:
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
            "ablation.axes: 'a' and 'c' compute the same; remove or change one of them",
        ),
        ({"objective": {"stage": "dens", "metric": "loss_end"}}, "there is no stage 'dens'; did you mean 'dense'?"),
        (
            {"objective": {"stage": "scale_up", "metric": "loss_end"}},
            "'scale_up' is a scale_up stage and trains no",
        ),
        ({"budget": {"tokens": 8192, "flops": None}}, "ablation.budget: stage dense: warmup_tokens + decay_tokens = "),
        (
            {"objective": {"stage": "prepare", "metric": "recovery_tokens"}},
            "ablation.objective.metric: 'prepare' reports no recovery_tokens, it does not continue a growth",
        ),
    ],
)
def test_what_compares_nothing_is_refused(
    expand: Callable[..., StudyGraph], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        expand(**{"seeds": [1], **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


THIRTY = {f"a{number}": {"values": {"x": [], "y": []}, "baseline": "x"} for number in range(30)}


def test_many_axes_one_at_a_time_are_as_many_variants() -> None:
    config = configured(axes=THIRTY, exclude=[], combinations="one_at_a_time")
    names = [variant.name for variant in variants(config)]
    assert len(names) == 31
    assert names == sorted(names)  # the order of all combinations, the first axis slowest


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
        ({"axes": THIRTY, "exclude": []}, "30 axes make 1,073,741,824 combinations, with 3 seeds 3,221,225,472 trials"),
        ({"seeds": 10**9}, "1,000,000,000 seeds, at most 1,000 are run"),
        ({"seeds": 1e9}, "1,000,000,000 seeds, at most 1,000 are run"),
        ({"seeds": [1] * 2000}, "2,000 seeds, at most 1,000 are run"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        configured(**changes)


# The command


@pytest.fixture
def ablate(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `python workflows/ablations.py` in a process and a folder of its own."""

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        script = REPOSITORY / "workflows" / "ablations.py"
        return subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True)

    return run


def test_the_plan_is_a_table_of_variants_and_controls_and_shows_what_sharing_saves(
    ablate: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    result = ablate("+ablation=scale_up", "seeds=5", "scheduler=asha", "action=plan")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ablation_scale_up: ")
    assert sum(line.startswith("variant ") and line.endswith("0 of 5") for line in lines) == 11
    assert sum(line.startswith("control  scratch_") for line in lines) == 4
    assert sum(line.startswith("control  continued_prepare_") for line in lines) == 2
    found = re.search(r"shared ancestors run once: \S+ FLOPs in all, (0\.\d\d) of", result.stdout)
    assert found and float(found[1]) <= 0.35
    assert re.search(r"left: \S+ FLOPs, \S+ [MG]B, about \S+ (s|min|h|days) with \d+ at a time", result.stdout)
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "conf" / "ablation").glob("*.yaml")))
def test_every_ablation_of_the_platform_compares_what_differs(compose: Composed, name: str) -> None:
    """The last value of every axis changes what is computed, and has its controls."""
    values = yaml.safe_load((REPOSITORY / "conf" / "ablation" / f"{name}.yaml").read_text())["ablation"]
    config = AblationConfig.model_validate({**values, "seeds": 1, "scheduler": "none", "trial_cpus": 1})
    last = {axis: list(spec.values)[-1] for axis, spec in config.axes.items()}
    words = [word for axis, value in last.items() for word in config.axes[axis].values[value]]
    axes = {axis: {"values": {value: ()}, "baseline": value} for axis, value in last.items()}
    one = config.model_copy(update={"axes": configured(axes=axes).axes, "exclude": ()})
    of_mixtures = ["+experiment=split"] if name == "expert_growth" else []
    found, default = (
        build(one, partial(_given, [_without_ablation(composed)]))
        for composed in (compose(*of_mixtures, f"+ablation={name}", *words), compose(*of_mixtures))
    )
    assert found.leaves[0].fingerprint != default.leaves[0].fingerprint
    kinds = {leaf.control.kind for leaf in found.leaves if leaf.control}
    assert any(kind.startswith("continued_") and kind.endswith("_flops") for kind in kinds)


def _given(composed: list[Values], *_: object) -> list[Values]:
    return composed


def _without_ablation(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "ablation"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: ablation: none selected; choose one with +ablation=NAME (valid: "),
        (
            ["ablation=scale_u"],
            "error: ablation=scale_u: there is no conf/ablation/scale_u.yaml; did",
        ),
        (["ablation=scale_up", "seeds=[4,4]"], "error: ablation.seeds: seed 4 is named 2 times; a repeat is no new"),
        (
            ["ablation=scale_up", "ablation.objective.stage=prep"],
            "error: ablation.objective.stage: there is no stage",
        ),
        (
            ["ablation=restart_lr", "ablation.objective.metric=loss_edn", *ONE_METHOD],
            "error: ablation.objective.metric: stage 'dense' reports no 'loss_edn'; did you mean 'loss_end'?",
        ),
        (
            ["ablation=restart_lr", "cluster=local_process", "cluster.workers=2", "seeds=1", *ONE_METHOD],
            "error: cluster.workers: 2 workers need cluster.executor=ray; use cluster=local, or 1 worker",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    ablate: Callable[..., "subprocess.CompletedProcess[str]"], words: list[str], message: str, tmp_path: Path
) -> None:
    result = ablate(*words)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What the numbers show


def test_an_ablation_costs_what_its_variants_and_controls_need_alone_and_once_what_they_share(
    compose: Composed, expand: Callable[..., StudyGraph], tmp_path: Path
) -> None:
    words = ("cluster.price_per_device_hour=2", "cluster.device_watts=100", "cluster.workers=2")
    cluster = graph.parse(compose(*words)).cluster
    union = expand(*words, seeds=1, exclude=[{"method": "aki"}, {"method": "random"}])
    found = ablation_costs.table(union, planning.tasks(union, Store(tmp_path), Speed(1e9)), cluster)
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
    found = intervals.paired_difference(ones, others)
    differences = [ones[seed] - others[seed] for seed in ones]
    assert found.pairs == 5 and math.isclose(found.mean, stdlib.fmean(differences))
    assert found.half_width is not None
    assert math.isclose(found.half_width, 2.776 * stdlib.stdev(differences) / math.sqrt(5), rel_tol=1e-3)
    assert not found.excludes_zero


def test_intervals_cover_the_true_difference_as_often_as_they_claim() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        shared = {seed: draw.gauss(0, 5) for seed in range(3)}
        ones = {seed: value + 0.3 + draw.gauss(0, 0.1) for seed, value in shared.items()}
        found = intervals.paired_difference(ones, {seed: value + draw.gauss(0, 0.1) for seed, value in shared.items()})
        assert found.half_width is not None
        hits += abs(found.mean - 0.3) <= found.half_width
    assert 0.94 <= hits / 2000 <= 0.96


def test_one_pair_gives_no_interval_and_no_winner() -> None:
    found = statistics.ranking({"a": {1: 1.0}, "b": {1: 9.0}}, baseline="a")
    assert [entry.rank for entry in found] == [1, 1]
    assert found[1].to_baseline.half_width is None
    with pytest.raises(ValueError, match="no seed in common"):
        intervals.paired_difference({1: 1.0}, {2: 1.0})


def test_variants_that_the_seeds_do_not_separate_share_a_rank() -> None:
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


def test_a_source_that_had_scratchs_loss_already_gives_no_saving() -> None:
    """200 / 20, whatever is grown and however: a constant."""
    scratch = [(0.0, 8.0), (100.0, 4.0), (200.0, 3.0)]
    for start in (3.0, 2.9):
        assert statistics.saving(scratch, [(20.0, start), (50.0, 2.5)]) is None


def test_the_interval_of_a_ratio_is_that_of_its_logarithm_and_never_below_zero() -> None:
    found = intervals.mean_ratio([0.5, 2.0, 8.0])
    logs = [math.log(value) for value in (0.5, 2.0, 8.0)]
    half = 4.30265 * stdlib.stdev(logs) / math.sqrt(3)
    assert math.isclose(found.mean, 2.0) and found.low is not None and found.high is not None
    assert math.isclose(found.low, math.exp(math.log(2) - half), rel_tol=1e-4)
    assert math.isclose(found.high, math.exp(math.log(2) + half), rel_tol=1e-4)
    assert found.low > 0 and not found.excludes_one
    assert intervals.mean_ratio([1.9, 2.0, 2.1]).excludes_one and intervals.mean_ratio([0.5, 0.51, 0.49]).excludes_one
    assert intervals.mean_ratio([3.0]).low is None and not intervals.mean_ratio([3.0]).excludes_one
    apart = intervals.mean_ratio([1e-9, 1e9])
    assert apart.low is not None and apart.high is not None and apart.low > 0 and math.isfinite(apart.high)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (60, 2.00030)]
)
def test_the_quantile_of_students_t_is_the_tables(freedom: int, quantile: float) -> None:
    assert math.isclose(intervals.t_quantile(freedom), quantile, rel_tol=1e-5)


def test_a_curve_is_read_between_its_points_and_not_outside_of_them() -> None:
    curve = [(0.0, 4.0), (10.0, 3.0), (20.0, 3.5)]
    assert statistics.value_at(curve, 5.0) == 3.5 and statistics.value_at(curve, 20.0) == 3.5
    assert statistics.value_at(curve, 21.0) is None
    assert statistics.first_at(curve, 3.25) == 7.5 and statistics.first_at(curve, 2.9) is None
    assert statistics.first_at(curve, 9.0) == 0.0


def test_the_leader_is_who_is_lowest_from_where_on() -> None:
    curves = {"a": [(1.0, 3.0), (2.0, 2.5), (3.0, 2.4)], "b": [(1.0, 3.5), (2.0, 2.6), (3.0, 2.0), (4.0, 1.0)]}
    assert statistics.leaders(curves) == [(1.0, "a"), (3.0, "b")]
