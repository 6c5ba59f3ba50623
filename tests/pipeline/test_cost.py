import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config import graph
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.estimates.duration import Speed, StageSpeed
from aquilamoe.pipeline import cost as costing
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.cost import Cost, Rates
from aquilamoe.pipeline.store import Store
from aquilamoe.reports import costs
from stage_records import stage_record

Compose = Callable[..., dict[str, Any]]
DAY_S = 86_400.0


def record(name: str, seconds: float, *inputs: str) -> dict[str, Any]:
    spent = {"flops": 10 * seconds, "device_seconds": seconds, "energy_kwh": seconds, "money": seconds}
    sources = {source: {"fingerprint": source} for source in inputs}
    return {"fingerprint": name, "kind": "pretrain", "inputs": sources, "cost": {"own": spent}}


# Two lines of checkpoints that share tokens and prepare, and meet in an evaluation.
DIAMOND = [
    record("tokens", 1.0),
    record("prepare", 2.0, "tokens"),
    record("grown", 4.0, "prepare", "tokens"),
    record("control", 8.0, "prepare", "tokens"),
    record("evaluate", 16.0, "grown", "control", "tokens"),
]


def seconds_of(name: str) -> float:
    (found,) = [each for each in DIAMOND if each["fingerprint"] == name]
    return costing.lineage(found, DIAMOND).device_seconds


def test_a_shared_ancestor_counts_in_each_lineage_and_once_in_each() -> None:
    assert [seconds_of(name) for name in ("tokens", "grown", "control", "evaluate")] == [1.0, 7.0, 11.0, 31.0]


def test_a_pipeline_counts_every_output_once_also_one_with_two_names() -> None:
    assert costing.total([*DIAMOND, DIAMOND[1]]) == Cost(310.0, 31.0, 31.0, 31.0)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=8))
@settings(derandomize=True, deadline=None)
def test_the_lineage_of_a_stage_is_at_least_its_own_cost_and_at_most_the_pipelines(
    stages: list[tuple[float, list[int]]],
) -> None:
    records = [
        record(str(index), seconds, *(str(source % index) for source in sources if index))
        for index, (seconds, sources) in enumerate(stages)
    ]
    whole = costing.total(records).device_seconds
    for each in records:
        own, lineage = costing.own(each).device_seconds, costing.lineage(each, records).device_seconds
        assert own <= lineage <= whole * (1 + 1e-12)


def test_time_becomes_energy_and_money_by_the_power_and_the_price_of_a_device() -> None:
    spent = Rates(devices=8, price_per_device_hour=2.5, device_watts=500.0).cost(3600.0, flops=7.0)
    assert spent == Cost(flops=7.0, device_seconds=8 * 3600.0, energy_kwh=4.0, money=20.0)


def test_a_stage_that_trains_holds_every_gpu_and_the_others_one_device(compose: Compose) -> None:
    experiment = graph.parse(compose("cluster=gpu_256", "cluster.gpus_per_worker=2"))
    nodes = graph.build(experiment)
    devices = {name: costing.rates(node, experiment.cluster).devices for name, node in nodes.items()}
    trained = {name for name, count in devices.items() if count == 512}
    assert trained == {"prepare", "dense", "moe", "control"}
    assert {count for name, count in devices.items() if name not in trained} == {1}


def test_a_worker_without_gpus_is_a_device(compose: Compose) -> None:
    experiment = graph.parse(compose("cluster.workers=4"))
    assert costing.rates(graph.build(experiment)["prepare"], experiment.cluster).devices == 4


def test_a_record_from_before_the_ledger_counts_its_seconds_and_flops() -> None:
    old = {"fingerprint": "x", "kind": "pretrain", "seconds": 12.5, "metrics": {"flops": 1e9}}
    assert costing.own(old) == Cost(1e9, 12.5)
    assert costing.own({"fingerprint": "y", "kind": "export"}) == Cost()


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path, "prepare-0123")


def test_a_killed_attempt_counts_up_to_its_last_sign_of_life_at_its_own_rates(attempts: Attempts) -> None:
    attempts.begin(Rates(1, 3600.0, 0.0))
    (first,) = attempts.read()
    os.utime(attempts.path, (0, first.started + 40.0))  # then nothing more was heard of it
    attempts.begin(Rates(4, 0.0, 0.0))
    spent = attempts.cost(10.0)
    assert spent.device_seconds == pytest.approx(40.0 + 4 * 10.0)
    assert spent.money == pytest.approx(40.0)
    assert len(attempts.read()) == 2


def test_a_torn_file_of_attempts_is_no_reason_not_to_train(attempts: Attempts) -> None:
    attempts.path.parent.mkdir()
    attempts.path.write_text('[{"started": 1')
    attempts.begin(Rates(1, 0.0, 0.0))
    assert len(attempts.read()) == 1


def test_what_is_forgotten_leaves_nothing_behind(attempts: Attempts, tmp_path: Path) -> None:
    attempts.begin(Rates(1, 0.0, 0.0))
    attempts.touch()
    attempts.forget()
    attempts.touch()
    assert list(tmp_path.iterdir()) == []


def plan(experiment: ExperimentConfig, root: Path) -> list[planning.Planned]:
    return planning.make(graph.build(experiment), Store(root), StageSpeed(experiment.cluster))


def test_a_plan_estimates_what_the_papers_line_costs_before_anything_runs(compose: Compose, tmp_path: Path) -> None:
    experiment = graph.parse(compose("+experiment=7b"))
    table = costs.estimated(plan(experiment, tmp_path), experiment.cluster)
    by_name = {row.name: row for row in table.rows}
    stages, cluster = graph.build(experiment), experiment.cluster
    seconds = StageSpeed(cluster).seconds(stages["prepare"], None)
    assert seconds is not None
    hours = seconds / 3600
    assert by_name["prepare"].own.money == pytest.approx(hours * 256 * cluster.price_per_device_hour)
    moe = by_name["moe"].lineage
    assert moe is not None
    assert moe.flops == stages["moe"].lineage_flops
    assert moe.device_seconds / DAY_S / 256 == pytest.approx(47.4, rel=0.01)
    evaluation = by_name["evaluate"].lineage
    assert evaluation is not None
    assert evaluation.device_seconds <= table.total.own.device_seconds
    assert table.figures == ("FLOPs", "device time", "energy", "money")


def test_without_a_price_or_a_power_there_is_no_column(compose: Compose, tmp_path: Path) -> None:
    experiment = graph.parse(compose("cluster.device_watts=0"))
    table = costs.estimated(plan(experiment, tmp_path), experiment.cluster)
    assert table.figures == ("FLOPs", "device time")
    assert {len(table.cells(row)) for row in [*table.rows, table.total]} == {5}


def test_prices_and_power_change_no_fingerprint(compose: Compose, tmp_path: Path) -> None:
    words = ("cluster.price_per_device_hour=9", "cluster.device_watts=900")
    before, after = plan(graph.parse(compose()), tmp_path), plan(graph.parse(compose(*words)), tmp_path)
    assert [each.fingerprint for each in before] == [each.fingerprint for each in after]


def test_a_stage_of_two_names_is_estimated_once(compose: Compose, tmp_path: Path) -> None:
    values = compose()
    values["stages"]["again"] = values["stages"]["export"]
    experiment = graph.parse(values)
    twice = costs.estimated(plan(experiment, tmp_path), experiment.cluster).total.own
    once = costs.estimated(plan(graph.parse(compose()), tmp_path), experiment.cluster).total.own
    assert twice == once


def test_the_figures_of_a_record_are_flat_and_survive_json() -> None:
    entry = costing.entry(Cost(1.0, 2.0, 3.0, 4.0), DIAMOND[1], DIAMOND, attempts=2, devices=8)
    found = costing.figures(json.loads(json.dumps({"cost": entry})))
    assert found["cost.own.money"] == 4.0
    assert found["cost.lineage.device_seconds"] == 3.0  # its own, in the place of what was known of it, and the tokens'
    assert costing.figures({}) == {}


def test_the_speed_of_another_number_of_devices_is_not_used_for_this_one(compose: Compose, tmp_path: Path) -> None:
    experiment, store = graph.parse(compose()), Store(tmp_path)
    nodes = graph.build(experiment)
    planned = {each.name: each for each in planning.make(nodes, store, Speed(1e9))}["prepare"]
    cost = costing.entry(Cost(), {"fingerprint": "x"}, [], attempts=1, devices=1)
    record = stage_record(recipe=planned.recipe, metrics={"flops": 2e9}, cost=cost)
    (partial := store.partial("prepare", "0123456789ab")).mkdir(parents=True)
    store.publish(partial, record)

    def seconds(devices: int) -> dict[str, float | None]:
        where = experiment.cluster.model_copy(update={"workers": devices})
        return {each.name: each.seconds for each in planning.make(nodes, store, Speed(1e9), where)}

    for name in ("prepare", "moe"):
        assert seconds(1)[name] == pytest.approx(nodes[name].flops / 2e9)
        assert seconds(256)[name] == pytest.approx(nodes[name].flops / 1e9)
