"""Nothing removes a folder that it did not make: where folders are removed, and that others' contents stay."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aquilamoe.training import example
from aquilamoe.training.ray import launch
from aquilamoe.training.ray.launch import Workers

ROOT = Path(__file__).resolve().parents[1]
REMOVES = re.compile(r"rmtree|removedirs|delete_dir|\brm -[a-z]*r|shutil\.move")

# Whatever removes a folder with what is in it: where, and why that folder is its own. Tests remove in their `tmp_path`.
ALLOWED = {
    "Makefile": "the environment that it installed",
    "benchmarks/growth.py": "target/ in a temporary folder of its own",
    "benchmarks/stage_overhead.py": "a temporary folder of its own",
    "benchmarks/tracking.py": "a temporary folder of its own",
    "platform/aquilamoe/ablation/tuning.py": "trials/tune-PID in the store, which Ray Tune makes in this call",
    "platform/aquilamoe/data/cleaning.py": "its own folders in the stage's .partial",
    "platform/aquilamoe/growth/tool/output.py": "the contents of TARGET.partial, refused where others' files are in it",
    "platform/aquilamoe/cli/lineage.py": "rebuild/STAGE-FINGERPRINT, which it has just filled",
    "platform/aquilamoe/lineage/rebuild.py": "STAGE-FINGERPRINT in that folder, of an earlier rebuild",
    "platform/aquilamoe/lineage/unused.py": "outputs and interrupted work in stages/, listed and confirmed by the user",
    "platform/aquilamoe/pipeline/checkpoint_sync.py": "STAGE-FINGERPRINT.partial, for which a checkpoint was fetched",
    "platform/aquilamoe/pipeline/remote.py": "STAGE-FINGERPRINT.fetched.partial, and the checkpoints that it copied",
    "platform/aquilamoe/pipeline/store.py": "STAGE-FINGERPRINT.partial, and checkpoints/ in it",
    "platform/aquilamoe/process/temporary.py": "efficientscale-* in TMPDIR, by its lock file, of runs that have ended",
    "platform/aquilamoe/training/ray/worker_pool.py": (
        "ray/efficientscale-LABEL-PID-TIME, which Ray Train makes in this call"
    ),
    "platform/aquilamoe/training/ray/launch.py": "the same, also of killed runs",
    "platform/aquilamoe/training/sessions.py": "the folder of the Ray session that this process has started",
    "platform/aquilamoe/training/checkpoint.py": "model/, training/ and hidden folders of an output and its milestones",
    "tools/docs_site.py": ".site/ and site/, which it has marked as its own",
}


def test_folders_are_removed_only_where_it_is_known_that_they_are_ours() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    code = [name for name in files if name.endswith((".py", ".sh")) or name in ("Makefile", ".ci/run", "Dockerfile")]
    code = [name for name in code if not name.startswith("tests/") and (ROOT / name).is_file()]
    removing = {name for name in code if REMOVES.search((ROOT / name).read_text())}
    assert removing == set(ALLOWED)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth_benchmark_of_removals", ROOT / "benchmarks/growth.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def run_benchmark(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Its command without the growths, which would take minutes."""

    def made(directory: Path, *_: Any) -> None:
        directory.mkdir()
        (directory / "weights").write_text("made by the benchmark")

    row = {"seconds": 1.0, "memory": 1.0, "cpu": 1.0, "bytes": 1.0}
    monkeypatch.setattr(benchmark, "make_source", made)
    monkeypatch.setattr(benchmark, "prepare", lambda *_: lambda _, target: made(target))
    monkeypatch.setattr(benchmark, "measure", lambda *_: dict(row))
    monkeypatch.setattr(sys, "argv", ["growth.py", *words])
    benchmark.main()


def test_the_benchmark_leaves_what_lies_in_the_folder_that_it_is_given(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("thesis.txt", "source/mine", "target/mine", "grown/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = sorted(tmp_path.rglob("*"))
    run_benchmark(benchmark, monkeypatch, "--folder", str(tmp_path), "--rounds", "1")
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == str(path.relative_to(tmp_path)) for path in before if path.is_file())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "copy"], "--only: there is no 'copy'; use names out of "),
        (["--only", "replicate", "mergekit-moe"], "--only: 'mergekit-moe' needs --peers; "),
        (["--rounds", "0"], "--rounds: is 0; "),
        (["--gigabytes", "-1"], "--gigabytes: is -1; "),
        (["--gigabytes", "nan"], "--gigabytes: is nan; "),
        (["--folder", "/dev/null/x"], "--folder: /dev/null/x: "),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_measure_in_one_line(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    folder = [] if "--folder" in words else ["--folder", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as refused:
        run_benchmark(benchmark, monkeypatch, *words, *folder)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_workers_leave_what_lies_beside_the_notes_of_ray_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "ray/my-results-2024/result.txt"
    left = tmp_path / "ray" / f"{launch.MADE_HERE}pipeline-123-456" / "snapshot.json"
    for path in (mine, left):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(launch, "start_session", lambda *_: None)
    monkeypatch.setattr(launch, "_start_crew", lambda *_: None)
    workers = Workers(example.cluster(executor="ray"), tmp_path, "pipeline")
    workers.crew.result()
    assert workers.name.startswith(launch.MADE_HERE)
    assert mine.is_file() and not left.exists()


def test_make_clean_leaves_results_and_what_it_has_not_installed(tmp_path: Path) -> None:
    for name in ("runs/stages/record.json", "mine/bin/python", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    for words in ([], ["VENV=mine"]):
        subprocess.run(["make", "-f", str(ROOT / "Makefile"), "clean", *words], cwd=tmp_path, check=True)
    assert (tmp_path / "runs/stages/record.json").is_file() and (tmp_path / "mine/bin/python").is_file()
    assert not (tmp_path / ".venv").exists()
