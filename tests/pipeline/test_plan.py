import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.estimates import processor_speed
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.records import seal
from aquilamoe.pipeline.stage import Estimate
from aquilamoe.pipeline.store import METRICS, RECORD, Store
from stage_records import stage_record

Compose = Callable[..., dict[str, Any]]
Plan = dict[str, Planned]
FLOPS_PER_S = 1e10


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def plan(compose: Compose, store: Store) -> Callable[..., Plan]:
    """The plan of an experiment, by stage."""

    def planned(*overrides: str) -> Plan:
        return make(graph.build(graph.parse(compose(*overrides))), store)

    return planned


def make(nodes: Mapping[str, Node], store: Store) -> Plan:
    return {planned.name: planned for planned in planning.make(nodes, store, Speed(FLOPS_PER_S))}


def publish(store: Store, *stages: Planned, seconds: float = 8.0, resumed: bool = False, old: bool = False) -> None:
    """What a run leaves of these stages, without their files. old: before records had the work of a training."""
    for number, planned in enumerate(stages):
        partial = store.partial(planned.name, planned.fingerprint)
        partial.mkdir(parents=True, exist_ok=True)
        record = stage_record(
            stage=planned.name,
            kind=planned.node.stage.kind,
            fingerprint=planned.fingerprint,
            recipe=planned.recipe,
            metrics=trained(planned.node),
            finished=f"2026-01-01T00:00:{number:02}",
            seconds=seconds,
            resumed=resumed,
            **({} if old else {"work": planned.estimate.work}),
        )
        store.publish(partial, record)


def trained(node: Node) -> dict[str, int]:
    """What a training records of itself; nothing of another stage."""
    if not node.flops or node.model is None:
        return {}
    params = {"params_total": node.model.num_params, "params_active": node.model.num_active_params}
    return {"flops": node.flops, "tokens": node.tokens, **params}


def work(planned: Planned) -> float:
    assert planned.estimate.work is not None
    return planned.estimate.work


def those_that_run(plan: Plan) -> set[str]:
    return {name for name, planned in plan.items() if planned.state != "cached"}


def descendants(name: str, nodes: Mapping[str, Node]) -> set[str]:
    """The stage and all that read it, directly or not."""
    found = {name}
    for other, node in nodes.items():  # in an order in which readers come after what they read
        if found & set(node.stage.inputs.values()):
            found.add(other)
    return found


def changes(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, the configuration with another value there) for every value inside."""
    for key, value in config.items():
        here = (*path, key)
        if here in (("kind",), ("inputs",)):
            continue
        if isinstance(value, Mapping) and value:
            for inner, changed in changes(value, here):
                yield inner, {**config, key: changed}
        else:
            yield ".".join(here), {**config, key: "another"}


def with_config(node: Node, config: dict[str, Any]) -> Node:
    return replace(node, stage=type(node.stage).model_construct(**config))


def test_in_an_empty_store_every_stage_runs_because_there_is_no_output_yet(plan: Callable[..., Plan]) -> None:
    assert {(planned.state, planned.reason) for planned in plan().values()} == {("runs", "no output yet")}


def test_what_was_published_is_cached_and_shows_where_it_is(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, *plan().values())
    for planned in plan().values():
        assert (planned.state, planned.seconds) == ("cached", 0.0)
        assert planned.reason == f"in {planned.name}-{planned.fingerprint}"
        assert planned.record is not None


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # values of other types are what is tested
def test_a_change_of_any_field_runs_the_stage_and_its_descendants_and_nothing_else(
    compose: Compose, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Estimates refuse values that make no sense, as these do.
    monkeypatch.setattr(
        planning, "module", lambda _: SimpleNamespace(VERSION=1, RESUMES=False, estimate=lambda _: Estimate())
    )
    nodes = graph.build(graph.parse(compose()))
    publish(store, *make(nodes, store).values())
    for name, node in nodes.items():
        for field, config in changes(node.stage.model_dump()):
            changed = make({**nodes, name: with_config(node, config)}, store)
            assert those_that_run(changed) == descendants(name, nodes), field
            assert changed[name].reason.startswith(f"{field} "), field
            assert changed[name].reason.endswith(" -> another"), field


@pytest.mark.parametrize(
    ("before", "after", "reason", "stages"),
    [
        (
            "growth=aki_pro",
            "growth=fpi",
            "growth.method aki_pro -> fpi",
            {"scale_up", "dense", "scale_out", "moe", "evaluate", "export"},
        ),
        (
            "upcycling.router_std=0.02",
            "upcycling.router_std=0.5",
            "upcycling.router_std 0.02 -> 0.5",
            {"scale_out", "moe", "evaluate", "export"},
        ),
        (
            "stages.dense.learning_rate=1e-3",
            "stages.dense.learning_rate=2e-3",
            "learning_rate 0.001 -> 0.002",
            {"dense", "scale_out", "moe", "evaluate", "export"},
        ),
        (
            "stages.scale_out.model.num_experts_per_tok=2",
            "stages.scale_out.model.num_experts_per_tok=1",
            "model.num_experts_per_tok 2 -> 1",
            {"scale_out", "moe", "control", "evaluate", "export"},
        ),
        (
            "stages.moe.total_tokens=204_800",
            "stages.moe.total_tokens=409_600",
            "total_tokens 204800 -> 409600",
            {"moe", "control", "evaluate", "export"},
        ),
        ("stages.export.dtype=float32", "stages.export.dtype=bfloat16", "dtype float32 -> bfloat16", {"export"}),
        ("stages.evaluate.precision=fp32", "stages.evaluate.precision=bf16", "precision fp32 -> bf16", {"evaluate"}),
    ],
)
def test_a_changed_word_of_the_command_runs_only_what_depends_on_it(
    plan: Callable[..., Plan], store: Store, before: str, after: str, reason: str, stages: set[str]
) -> None:
    publish(store, *plan(before).values())
    changed = plan(after)
    assert those_that_run(changed) == stages
    assert reason in changed[next(name for name in changed if name in stages)].reason


def test_a_control_runs_again_when_the_line_that_it_equals_costs_more(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, *plan("stages.moe.total_tokens=204_800").values())
    before = plan("stages.moe.total_tokens=204_800")["control"].node.tokens
    changed = plan("stages.moe.total_tokens=409_600")["control"]
    assert changed.reason == f"total_tokens {before} -> {changed.node.tokens}"


def test_a_stage_that_reads_a_changed_one_names_it(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, *plan("growth=aki_pro").values())
    changed = plan("growth=fpi")
    assert changed["dense"].reason == "scale_up runs"
    assert changed["evaluate"].reason == "scale_up, dense, scale_out, moe runs"


def test_many_changed_fields_are_counted(plan: Callable[..., Plan], store: Store) -> None:
    keys = ("learning_rate", "precision", "seed", "validation_tokens")
    before = [f"stages.dense.{key}={value}" for key, value in zip(keys, (1, "bf16", 1, 128), strict=True)]
    after = [f"stages.dense.{key}={value}" for key, value in zip(keys, (2, "fp32", 2, 256), strict=True)]
    publish(store, *plan(*before).values())
    assert plan(*after)["dense"].reason == (
        "learning_rate 1.0 -> 2.0; precision bf16 -> fp32; seed 1 -> 2 (and 1 more fields)"
    )


def test_what_changed_is_shown_against_the_newest_output(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, plan()["corpus"], plan("data.validation_fraction=0.25")["corpus"])
    assert plan("data.validation_fraction=0.125")["corpus"].reason == "validation_fraction 0.25 -> 0.125"


def test_two_variants_of_an_experiment_are_both_cached(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, *plan("growth=aki_pro").values())
    publish(store, *(planned for planned in plan("growth=fpi").values() if planned.state == "runs"))
    assert those_that_run(plan("growth=aki_pro")) == those_that_run(plan("growth=fpi")) == set()


def test_two_stages_with_one_recipe_are_computed_once(plan: Callable[..., Plan]) -> None:
    again = [f"+stages.again.{word}" for word in ("kind=export", "inputs.source=moe", "dtype=float32")]
    same = plan("stages.export.dtype=float32", *again)
    assert same["again"].fingerprint == same["export"].fingerprint
    assert (same["again"].reason, same["again"].seconds, same["again"].estimate.disk_bytes) == ("as export", 0.0, 0)


def test_an_interrupted_training_resumes_and_shows_how_far_it_came(plan: Callable[..., Plan], store: Store) -> None:
    partial = store.partial("prepare", plan()["prepare"].fingerprint)
    partial.mkdir(parents=True)
    prepare = plan()["prepare"]
    assert (prepare.state, prepare.reason) == ("resumes", "interrupted at its start")
    (partial / METRICS).write_text('{"step": 100, "tokens": 409600}\n{"step": 101, "tok')
    assert plan()["prepare"].reason == f"interrupted at 409,600 of {prepare.node.tokens:,} tokens"


def test_an_interrupted_stage_that_cannot_resume_starts_over(plan: Callable[..., Plan], store: Store) -> None:
    store.partial("tokenizer", plan()["tokenizer"].fingerprint).mkdir(parents=True)
    assert (plan()["tokenizer"].state, plan()["tokenizer"].reason) == ("runs", "interrupted, starts over")


def test_a_stage_that_was_interrupted_when_it_was_complete_takes_no_time(
    plan: Callable[..., Plan], store: Store
) -> None:
    partial = store.partial("tokenizer", plan()["tokenizer"].fingerprint)
    partial.mkdir(parents=True)
    (partial / RECORD).write_text(seal(stage_record(stage="tokenizer", files={})))
    planned = plan()["tokenizer"]
    assert (planned.state, planned.reason, planned.seconds) == ("resumes", "interrupted when it was complete", 0.0)


def test_without_a_record_a_training_takes_its_flops_at_the_clusters_stated_speed(plan: Callable[..., Plan]) -> None:
    for planned in plan().values():
        expected = planned.node.flops / FLOPS_PER_S if planned.node.flops else planned.estimate.seconds
        assert planned.seconds == expected


def test_without_a_stated_speed_it_is_that_of_this_machines_processors(
    compose: Compose, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speed(*words: str) -> Speed:
        return Speed.of(graph.parse(compose(*words)).cluster)

    cores = os.cpu_count() or 1
    assert speed() == Speed(None, min(2, cores))
    assert speed("cluster.cpus_per_worker=1") == Speed(None, 1)
    assert speed("cluster.workers=1000") == Speed(None, cores)
    assert speed("cluster.flops_per_s=5e9") == Speed(5e9)
    assert speed("cluster.device_flops_per_s=1e12", "cluster.mfu=0.5", "cluster.workers=3") == Speed(1.5e12)
    unknown = speed("cluster.gpus_per_worker=1")
    assert unknown.seconds(graph.build(graph.parse(compose()))["prepare"], 1e12) is None
    assert processor_speed.core_flops_per_s() > 1e8  # whatever runs beside
    monkeypatch.setattr(processor_speed, "core_flops_per_s", lambda: 2e9)
    nodes = graph.build(graph.parse(compose()))
    for planned in planning.make(nodes, store, Speed(None, 3)):
        if planned.node.flops:
            assert planned.seconds == pytest.approx(work(planned) / (processor_speed.SHARE * 6e9))
        else:
            assert planned.seconds == planned.estimate.seconds


def test_a_training_is_expected_at_the_speed_of_its_own_last_run(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, plan("stages.dense.total_tokens=614_400")["dense"], seconds=7.0)
    publish(store, plan()["prepare"], seconds=70.0)
    assert plan("stages.dense.total_tokens=1_228_800")["dense"].seconds == pytest.approx(14.0)


def test_a_training_that_never_ran_is_expected_at_the_speed_of_the_others(
    plan: Callable[..., Plan], store: Store
) -> None:
    prepare = plan()["prepare"]
    publish(store, prepare, seconds=10.0)
    dense = plan()["dense"]
    assert dense.seconds == pytest.approx(10.0 * work(dense) / work(prepare))
    # It is wider, and a FLOP of a wider model takes less.
    assert dense.seconds is not None and dense.seconds < 0.95 * 10.0 * dense.node.flops / prepare.node.flops


def test_records_without_their_work_are_compared_by_flops(plan: Callable[..., Plan], store: Store) -> None:
    prepare = plan()["prepare"]
    publish(store, prepare, seconds=10.0, old=True)
    dense = plan()["dense"]
    assert dense.seconds == pytest.approx(10.0 * dense.node.flops / prepare.node.flops)


def test_of_several_trainings_the_most_alike_gives_the_speed_of_another(
    plan: Callable[..., Plan], store: Store
) -> None:
    publish(store, plan()["prepare"], seconds=10.0)
    publish(store, plan()["moe"], seconds=1000.0)
    small, dense = plan()["prepare"], plan()["dense"]
    assert dense.seconds == pytest.approx(10.0 * work(dense) / work(small))
    publish(store, dense, seconds=50.0)
    control = plan()["control"]  # the small model: nearer to prepare, however many tokens it has
    assert control.seconds == pytest.approx(10.0 * work(control) / work(small))


def test_another_stage_is_expected_to_take_what_it_took(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, plan()["tokenizer"], seconds=3.5)
    assert plan("stages.tokenizer.vocab_size=2048")["tokenizer"].seconds == 3.5


def test_the_time_of_a_resumed_run_is_not_learned_from(plan: Callable[..., Plan], store: Store) -> None:
    publish(store, plan()["tokenizer"], plan()["prepare"], seconds=0.5, resumed=True)
    assert plan("stages.tokenizer.vocab_size=2048")["tokenizer"].seconds is None
    dense = plan()["dense"]
    assert dense.seconds == dense.node.flops / FLOPS_PER_S


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["stages.scale_up.model.hidden_size=32", "stages.scale_up.model.num_attention_heads=4"],
            "stages.scale_up.model.hidden_size: target 32 is smaller than the source's 64; ",
        ),
        (
            ["stages.scale_up.model.num_hidden_layers=3"],
            "stages.scale_up.model.num_hidden_layers: target 3 is smaller than the source's 4; ",
        ),
        (
            ["stages.scale_out.model.num_experts=0", "stages.scale_out.model.num_experts_per_tok=0"],
            "stages.scale_out.model.num_experts: target 0",
        ),
        (
            ["stages.scale_out.inputs.source=prepare", "+stages.scale_out.model.hidden_size=128"],
            "stages.scale_out.model.hidden_size: target 128, source 64; ",
        ),
    ],
)
def test_a_growth_that_cannot_be_done_is_refused_before_anything_runs(
    plan: Callable[..., Plan], words: list[str], line: str
) -> None:
    small = ["model.hidden_size=64", "model.num_attention_heads=4", "model.num_hidden_layers=4"]
    with pytest.raises(UserError) as caught:
        plan(*small, *words, "stages.control=null", "stages.evaluate=null", "report.control=null")
    assert str(caught.value).startswith(line)


def test_planning_writes_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan()
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_run_in_the_store_does_not_make_the_plan_of_a_large_model_short(
    plan: Callable[..., Plan], store: Store
) -> None:
    tiny = plan()
    publish(store, *tiny.values(), seconds=5.0)
    large = plan("+experiment=7b")
    assert large["scale_up"].estimate.disk_bytes > 10e9
    for name, planned in large.items():
        disk_s = planned.estimate.disk_bytes / 1e9
        assert planned.seconds is None or planned.node.flops or planned.seconds > disk_s, name
    assert (large["evaluate"].seconds, large["tokens"].seconds) == (None, None)


def test_a_growth_is_expected_to_take_what_it_took_by_what_is_moved_and_certified(
    plan: Callable[..., Plan], store: Store
) -> None:
    words = ["stages.scale_up.model.intermediate_size=200_000"]
    small, large = plan()["scale_up"], plan(*words)["scale_up"]
    publish(store, small, seconds=8.0)
    again = plan(*words)["scale_up"]
    assert large.estimate.work is not None
    assert again.seconds == pytest.approx(8.0 * large.estimate.work / work(small))
    assert again.seconds is not None and again.seconds > 8.0


def test_a_stage_that_reads_text_is_expected_by_the_bytes_of_what_it_reads(
    compose: Compose, store: Store, tmp_path: Path
) -> None:
    def planned(size: int) -> Plan:
        for name in ("en", "zh"):
            (tmp_path / f"{name}-{size}.jsonl").write_bytes(b"x" * size)
        words = [f"data.sources.{name}.path={tmp_path}/{name}-{size}.jsonl" for name in ("en", "zh")]
        words += [f"data.sources.{name}.sha256=null" for name in ("en", "zh")]
        return make(graph.build(graph.parse(compose(*words))), store)

    def publish_with(stage: Planned, size: int) -> None:
        partial = store.partial(stage.name, stage.fingerprint)
        partial.mkdir(parents=True)
        (partial / "text").write_bytes(b"x" * size)
        publish(store, stage, seconds=3.0)

    first = planned(1000)
    assert [first[name].seconds for name in ("corpus", "tokenizer", "tokens", "evaluate")] == [None] * 4
    for name in ("corpus", "tokenizer", "tokens"):
        publish_with(first[name], 1000)
    second = planned(4000)
    assert second["corpus"].seconds == pytest.approx(12.0)
    assert (second["tokenizer"].seconds, second["tokens"].seconds) == (None, None)  # the corpus is not known yet
    publish_with(second["corpus"], 5000)
    third = planned(4000)
    assert [third[name].seconds for name in ("tokenizer", "tokens")] == pytest.approx([15.0, 15.0])
    assert planned(400_000)["corpus"].seconds is None  # too far from what was measured
