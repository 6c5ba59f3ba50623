import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aquilamoe.cli import preflight
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.store import Store
from stage_records import stage_record

Compose = Callable[..., dict[str, Any]]


@pytest.fixture
def check(compose: Compose, tmp_path: Path) -> Callable[..., str | None]:
    """The message of preflight about an experiment; None if it may start."""

    def checked(*overrides: str) -> str | None:
        experiment = graph.parse(compose(*overrides))
        plan = planning.make(graph.build(experiment), Store(tmp_path), Speed(1e9))
        try:
            preflight.check(experiment, plan, tmp_path / "runs")
        except UserError as error:
            return str(error)
        return None

    return checked


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let this machine have a number of GPUs."""

    def have(number: int) -> None:
        monkeypatch.setattr(preflight, "local_gpus", lambda: [Path(f"/dev/nvidia{index}") for index in range(number)])

    return have


def test_the_embedded_experiment_may_start_on_any_machine(check: Callable[..., str | None]) -> None:
    assert check() is None


def test_missing_gpus_are_counted_against_those_that_are_needed(
    check: Callable[..., str | None], gpus: Callable[[int], None]
) -> None:
    gpus(2)
    line = check("cluster.workers=4", "cluster.gpus_per_worker=1", "cluster.gpu_memory_bytes=80_000_000_000")
    assert line is not None
    assert line.startswith("experiment embedded: needs 4 GPUs with 80 GB each, this machine has 2 (and ")
    assert "\n" not in line


def test_gpus_that_are_there_are_enough(check: Callable[..., str | None], gpus: Callable[[int], None]) -> None:
    gpus(4)
    assert check("cluster.workers=4", "cluster.gpus_per_worker=1") is None


@pytest.mark.parametrize(
    ("flags", "overrides", "warns"),
    [
        ("fma avx2", ["precision=bf16"], True),
        ("fma avx2", ["stages.moe.precision=bf16_master"], True),
        ("fma avx2", [], False),
        ("fma avx2 avx512bw", ["precision=bf16"], False),
        ("fma avx2", ["precision=bf16", "cluster.gpus_per_worker=1"], False),
        ("fma avx2", ["precision=bf16", "cluster.address=auto"], False),
    ],
)
def test_bfloat16_on_a_cpu_that_cannot_is_a_warning_that_names_the_stages(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, overrides: list[str], warns: bool
) -> None:
    read = Path.read_text
    info = f"processor\t: 0\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda p, **k: info if str(p) == "/proc/cpuinfo" else read(p, **k))
    experiment = graph.parse(compose(*overrides))
    found = preflight.slow_precision(experiment, planning.make(graph.build(experiment), Store(tmp_path), Speed(1e9)))
    assert (found is not None) == warns
    if found is not None:
        assert "moe" in found and "precision=fp32" in found and "\n" not in found


def test_a_cluster_elsewhere_is_not_judged_by_this_machine(
    check: Callable[..., str | None], gpus: Callable[[int], None]
) -> None:
    gpus(0)
    assert check("cluster.workers=4", "cluster.gpus_per_worker=1", "cluster.address=auto") is None


def test_several_workers_need_ray(check: Callable[..., str | None]) -> None:
    assert check("cluster=local_process", "cluster.workers=2") == (
        "cluster.workers: 2 workers need cluster.executor=ray; use cluster=local, or 1 worker"
    )


def test_a_batch_must_be_shared_evenly_by_the_workers(check: Callable[..., str | None]) -> None:
    words = ("cluster.workers=3", "stages.prepare.batch_tokens=4096", "stages.prepare.sequence_length=128")
    line = (
        "stages.{}.batch_tokens: 4096 tokens are 32 sequences, which 3 workers cannot share evenly; "
        "choose a multiple of 384"
    )
    assert check(*words) == "\n".join(line.format(name) for name in ("prepare", "dense", "moe", "control"))
    assert check("cluster.workers=4") is None
    assert check("++stages.moe.cluster.workers=3") == line.format("moe")
    assert check("++stages.moe.cluster.workers=4", "cluster.executor=process") == (
        "stages.moe.cluster.workers: 4 workers need cluster.executor=ray; use cluster=local, or 1 worker"
    )


def test_a_run_that_does_not_fit_the_disk_is_refused_with_both_sizes(
    check: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    line = check()
    assert line is not None
    assert line.startswith(f"{tmp_path}/runs: the run writes about 207 MB, 100 MB are free; ")


def test_what_is_cached_needs_no_disk(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    experiment, store = graph.parse(compose()), Store(tmp_path)
    nodes = graph.build(experiment)
    for planned in planning.make(nodes, store, Speed(1e9)):
        partial = store.partial(planned.name, planned.fingerprint)
        partial.mkdir(parents=True)
        about = {"stage": planned.name, "kind": planned.node.stage.kind, "fingerprint": planned.fingerprint}
        store.publish(partial, stage_record(**about))
    preflight.check(experiment, planning.make(nodes, store, Speed(1e9)), tmp_path / "runs")


def test_files_that_are_not_there_stop_a_run_before_it_starts_all_of_them_at_once(
    compose: Compose, tmp_path: Path
) -> None:
    words = [f"data.sources.{name}.path={tmp_path}/{name}*.jsonl" for name in ("en", "zh")]
    experiment = graph.parse(
        compose(*words, "data.sources.en.sha256=null", f"stages.tokenizer.path={tmp_path}/no.json")
    )
    plan = planning.make(graph.build(experiment), Store(tmp_path / "runs"), Speed.of(experiment.cluster))
    with pytest.raises(UserError) as caught:
        preflight.check(experiment, plan, tmp_path / "runs")
    lines = str(caught.value).splitlines()
    assert lines == preflight.missing_files(plan)
    assert [line.partition(":")[0] for line in lines] == ["sources.en.path", "sources.zh.path", "tokenizer.path"]
    assert f"no file matches '{tmp_path}/en*.jsonl'" in lines[0]


def test_a_plan_warns_of_equal_copies_that_a_router_cannot_separate_and_not_of_a_split(
    compose: Compose, tmp_path: Path
) -> None:
    def warned(method: str) -> list[str]:
        values = compose("+experiment=split")
        upcycling = values["stages"]["scale_out"]["upcycling"]
        if method != "split":
            upcycling.update(method=method, direction=None, shift=None, calibration_tokens=None, common_row=None)
        experiment = graph.parse(values)
        plan = planning.make(graph.build(experiment), Store(tmp_path), Speed(1e9))
        return preflight.warnings(plan)

    (line,) = warned("copy")
    assert line.startswith("stages.scale_out.model.num_experts_per_tok: a token chooses 2 of 2 equal copies of its 2 ")
    assert warned("split") == []
