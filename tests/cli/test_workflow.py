"""The real command, in processes of its own: what a user types, and what is there afterwards."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import processes
from aquilamoe.pipeline.store import RECORD, Store
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.process

WORKFLOW = Path(__file__).parents[2] / "workflows" / "efficientscale.py"
HEAVY = {"torch", "ray", "mlflow"}
Command = Callable[..., "subprocess.CompletedProcess[str]"]
# Secrets that a run may have in its environment.
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "swordfish-tracking",
    "AWS_SECRET_ACCESS_KEY": "swordfish-storage",
    "HF_TOKEN": "swordfish-hub",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, command: Command, tiny: list[str]) -> Path:
    """The folder in which the tiny experiment was run once, from its beginning to its end, with tracking."""
    folder = tmp_path_factory.mktemp("base")
    completed = command(*tiny, cwd=folder, **SECRETS)
    assert completed.returncode == 0, completed.stderr
    (folder / "stdout").write_text(completed.stdout)
    (folder / "stderr").write_text(completed.stderr)
    return folder


@pytest.fixture
def copy_of_base(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of the stages that a run left, by directory."""
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "runs" / "stages").glob(f"*/{RECORD}")}


def weights_and_metrics(folder: Path) -> dict[str, Any]:
    """The bytes of every file but the curves, which have times in them, and what each stage measured."""
    found = {}
    for name, record in outputs(folder).items():
        files = {path: entry["sha256"] for path, entry in record["files"].items() if path != "metrics.jsonl"}
        metrics = {key: value for key, value in record["metrics"].items() if not key.endswith("_per_s")}
        found[name] = (files, metrics)
    return found


def imported(completed: "subprocess.CompletedProcess[str]") -> set[str]:
    """Packages that a command run with `-X importtime` imported."""
    modules = {
        line.rpartition("|")[2].strip() for line in completed.stderr.splitlines() if line.startswith("import time:")
    }
    assert "aquilamoe.cli.commands" in modules
    return {module.partition(".")[0] for module in modules}


def test_a_run_leaves_every_stage_complete_and_a_report(base: Path) -> None:
    stages = {record["stage"] for record in outputs(base).values()}
    assert stages == {
        *("corpus", "tokenizer", "tokens", "prepare", "scale_up", "dense", "scale_out", "moe", "control", "evaluate"),
        "export",
    }
    assert not list((base / "runs" / "stages").glob("*.partial"))
    report = (base / "runs" / "reports" / "embedded" / "index.html").read_text()
    assert all(stage in report for stage in stages)


def test_a_run_writes_nothing_outside_its_root(base: Path) -> None:
    assert {path.name for path in base.iterdir()} == {"runs", "stdout", "stderr"}


def test_a_run_warns_of_nothing(base: Path) -> None:
    assert (base / "stderr").read_text() == ""
    assert "warn" not in (base / "stdout").read_text().lower()


def test_a_run_prints_where_to_look(base: Path) -> None:
    stdout = (base / "stdout").read_text()
    assert "runs/reports/embedded/index.html" in stdout
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db" in stdout


def files_with(folder: Path, text: str) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes())


def test_no_file_of_a_run_and_nothing_it_prints_has_a_secret_of_its_environment(base: Path) -> None:
    assert files_with(base, "val/loss")  # the search finds what is there
    assert files_with(base, "swordfish") == []


def test_the_report_of_finished_stages_is_written_again_without_running_any(
    copy_of_base: Path, command: Command, tiny: list[str]
) -> None:
    folder = copy_of_base / "runs" / "reports"
    pages = {path.name for path in (folder / "embedded").iterdir()}
    shutil.rmtree(folder)
    # A link in a page's place is replaced: nothing is written where it leads.
    (folder / "embedded").mkdir(parents=True)
    for number, name in enumerate(sorted(pages)):
        (copy_of_base / f"precious-{number}").write_text("kept")
        (folder / "embedded" / name).symlink_to(copy_of_base / f"precious-{number}")
    before = outputs(copy_of_base)
    completed = command(*tiny, "action=report", cwd=copy_of_base)
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout == "report  runs/reports/embedded/index.html\n"
    assert {path.name for path in (folder / "embedded").iterdir()} == pages
    assert outputs(copy_of_base) == before
    assert {path.read_text() for path in copy_of_base.glob("precious-*")} == {"kept"}


def test_a_password_in_the_tracking_uri_is_neither_kept_nor_shown(
    copy_of_base: Path, command: Command, tiny: list[str]
) -> None:
    """With a server that does not respond, what it misses is kept for later, and the report is rebuilt."""
    uri = "http://reader:swordfish@127.0.0.1:9"
    completed = command(*tiny, f"tracking.uri={uri}", cwd=copy_of_base)
    assert completed.returncode == 0 and "swordfish" not in completed.stdout + completed.stderr
    assert "http://reader:***@127.0.0.1:9" in completed.stdout
    assert len(files_with(copy_of_base / "runs" / "tracking", "http://reader:***@127.0.0.1:9")) > 11
    assert "reader:***@127.0.0.1:9" in (copy_of_base / "runs" / "reports" / "embedded" / "index.html").read_text()
    assert files_with(copy_of_base, "swordfish") == []
    refused = command(f"tracking.uri={uri.replace('http', 'ftp')}", *tiny, cwd=copy_of_base)
    assert refused.returncode == 1 and "ftp://reader:***@" in refused.stderr and "swordfish" not in refused.stderr


def test_a_run_is_in_mlflow_with_a_run_for_each_stage_and_one_for_the_pipeline(base: Path) -> None:
    database = sqlite3.connect(base / "runs" / "mlflow.db")
    try:
        statuses = database.execute("select status from runs").fetchall()
        experiments = {name for (name,) in database.execute("select name from experiments")}
    finally:
        database.close()
    assert statuses == [("FINISHED",)] * (len(outputs(base)) + 1)
    assert "embedded" in experiments


def test_growing_costs_flops_in_the_order_of_the_line(base: Path) -> None:
    records = {record["stage"]: record["metrics"] for record in outputs(base).values()}
    line = [records[name]["lineage_flops"] for name in ("prepare", "dense", "moe")]
    assert line == sorted(set(line))
    batch = records["control"]["flops"] / records["control"]["steps"]
    assert 0 <= records["moe"]["lineage_flops"] - records["control"]["lineage_flops"] < batch


def test_a_second_run_computes_nothing_and_imports_neither_torch_nor_ray_nor_mlflow(
    base: Path, command: Command, tiny: list[str]
) -> None:
    before = outputs(base)
    completed = command(*tiny, cwd=base, python=("-X", "importtime"))
    assert completed.returncode == 0
    assert imported(completed) & HEAVY == set()
    assert outputs(base) == before
    assert len(re.findall(r"^  \w+ +cached$", completed.stdout, re.MULTILINE)) == len(before)


@pytest.mark.parametrize(
    "words", [("action=plan",), ("action=plan", "experiment=7b"), ("action=status",), ("--help",)], ids=" ".join
)
def test_looking_imports_neither_torch_nor_ray_nor_mlflow_and_writes_nothing(
    command: Command, tmp_path: Path, words: tuple[str, ...]
) -> None:
    completed = command(*words, cwd=tmp_path, python=("-X", "importtime"))
    assert completed.returncode == 0
    assert imported(completed) & HEAVY == set()
    assert completed.stdout
    assert list(tmp_path.iterdir()) == []


def test_another_growth_runs_what_is_planned_and_that_is_what_depends_on_it(
    copy_of_base: Path, command: Command, tiny: list[str]
) -> None:
    words = [*tiny, "growth=fpi", "tracking.enabled=false"]
    plan = command(*words, "action=plan", cwd=copy_of_base).stdout
    before = outputs(copy_of_base)
    completed = command(*words, cwd=copy_of_base)
    assert completed.returncode == 0, completed.stderr
    made = {record["stage"] for name, record in outputs(copy_of_base).items() if name not in before}
    assert made == {"scale_up", "dense", "scale_out", "moe", "evaluate", "export"}
    assert set(re.findall(r"^(\w+) +to run ", plan, re.MULTILINE)) == made
    assert "growth.method aki_pro -> fpi" in plan
    grown = next(r for name, r in outputs(copy_of_base).items() if r["stage"] == "scale_up" and name not in before)
    assert grown["metrics"]["preserving"] is (grown["metrics"]["max_abs_dlogit"] < 1e-3)


def test_the_status_shows_what_is_complete_and_what_is_missing(
    copy_of_base: Path, command: Command, tiny: list[str]
) -> None:
    shutil.rmtree(next((copy_of_base / "runs" / "stages").glob("export-*")))
    completed = command(*tiny, "action=status", cwd=copy_of_base)
    assert completed.returncode == 0
    assert completed.stdout.startswith("embedded: not running\n")
    assert "  export: to run, no output yet\n" in completed.stdout
    assert completed.stdout.count("complete") == 10


def test_an_experiment_is_chosen_with_or_without_a_plus(command: Command, tmp_path: Path) -> None:
    at = "cluster.flops_per_s=1e10"  # not measured again
    with_plus = command("+experiment=smoke", "action=plan", at, cwd=tmp_path)
    assert with_plus.returncode == 0
    assert with_plus.stdout.startswith("smoke: ")
    assert command("experiment=smoke", "action=plan", at, cwd=tmp_path).stdout == with_plus.stdout


def test_an_experiment_too_large_for_this_machine_is_refused_in_one_line_and_shows_its_plan(
    command: Command, tmp_path: Path
) -> None:
    completed = command("+experiment=7b", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert re.fullmatch(
        r"error: experiment 7b: needs 256 GPUs with 80 GB each, this machine has \d+ \(and \d+ CPUs\); set "
        r"cluster.address to a Ray cluster that has them, or view its plan: "
        r"python workflows/efficientscale.py \+experiment=7b action=plan\n",
        completed.stderr,
    )
    assert list(tmp_path.iterdir()) == []
    plan = command("+experiment=7b", "action=plan", cwd=tmp_path)
    assert plan.returncode == 0
    assert all(size in plan.stdout for size in ("8.22B", "16.7B", "105B", "29.2B"))


def test_a_second_driver_ends_in_one_line_and_leaves_the_store_alone(
    command: Command, tmp_path: Path, tiny: list[str]
) -> None:
    with Store(tmp_path / "runs").lock():
        completed = command(*tiny, cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: {tmp_path}/runs: in use by process {os.getpid()} since .*; wait for it, or give this run a directory "
        r"of its own with paths.root=DIR\n",
        completed.stderr,
    )
    assert outputs(tmp_path) == {}


def test_an_interrupted_run_states_that_the_same_command_continues(
    tmp_path: Path, tiny: list[str], ambush: Callable[[str, str], dict[str, str]]
) -> None:
    trap = tmp_path / "trap"
    driver = subprocess.Popen(
        [sys.executable, str(WORKFLOW), *tiny, "tracking.enabled=false"],
        cwd=tmp_path,
        env=os.environ | ambush(r"tokens-\w+\.partial/tokens.json", str(trap)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(trap.exists, driver)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 130
    assert stderr == "\ninterrupted; the same command continues where this stopped\n"


def test_a_run_killed_at_many_points_ends_with_the_bytes_of_one_that_was_not(
    base: Path, tmp_path: Path, command: Command, tiny: list[str], ambush: Callable[[str, str], dict[str, str]]
) -> None:
    words = [*tiny, "tracking.enabled=false"]
    for point in (
        r"tokenizer-\w+\.partial/tokenizer.json",  # in a stage that does not resume
        r"prepare-\w+\.partial/checkpoints/",  # before the first checkpoint
        r"prepare-\w+\.partial/checkpoints/.*step-0*8\b",  # in the middle of writing the fourth
        r"scale_up-\w+\.partial/model/config.json",  # in a growth
        r"moe-\w+\.partial/checkpoints/.*step-0*6\b",
        r"moe-[0-9a-f]{12}$",  # complete but for its name
    ):
        killed = command(*words, cwd=tmp_path, **ambush(point, "kill"))
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
        stage = point.partition("-")[0]
        assert list((tmp_path / "runs" / "stages").glob(f"{stage}-*.partial")), point
        assert not [record for record in outputs(tmp_path).values() if record["stage"] == stage and stage != "moe"]
    completed = command(*words, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert not list((tmp_path / "runs" / "stages").glob("*.partial"))
    assert weights_and_metrics(tmp_path) == weights_and_metrics(base)
    resumed = {record["stage"]: record["resumed"] for record in outputs(tmp_path).values()}
    assert resumed.pop("prepare")
    assert resumed.pop("moe")
    assert not any(resumed.values())


@dataclass
class Driver:
    """A run on Ray, and all the processes that it started, known by a mark in their environment."""

    words: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Driver":
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, str(WORKFLOW), *self.words],
            cwd=self.folder,
            env=os.environ | self.environment | {"STARTED_BY": self.mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.communicate()

    def ending(self) -> tuple[int, list[str]]:
        """Its exit status, when it has ended, and the lines of its standard error."""
        _, stderr = self.process.communicate(timeout=PATIENCE_S)
        lines = [line for line in stderr.splitlines() if not line.startswith("waiting for workers: ")]
        return self.process.returncode, lines

    def processes(self, name: str = "") -> list[int]:
        """Those alive whose command begins with `name`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                marked = self.mark.encode() in (path / "environ").read_bytes()
                if marked and (path / "cmdline").read_bytes().startswith(name.encode()):
                    found.append(int(path.name))
        return found


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for those of sockets, unlike that of `tmp_path`."""
    with TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_run_on_ray_whose_driver_is_terminated_and_killed_ends_with_the_bytes_of_one_without_ray(
    base: Path,
    tmp_path: Path,
    tiny: list[str],
    ambush: Callable[[str, str], dict[str, str]],
    short_folder: Path,
) -> None:
    later = ("scale_up", "dense", "scale_out", "moe", "control", "evaluate", "export")
    words = [
        *(word for word in tiny if not word.startswith(("cluster=", *(f"stages.{stage}." for stage in later)))),
        *("cluster=local", "tracking.enabled=false", "report.chain=[prepare]", "report.control=null"),
        *(f"stages.{stage}=null" for stage in later),
    ]
    for signal_sent, status, expected in (
        (signal.SIGTERM, 128 + signal.SIGTERM, ["", "interrupted; the same command continues where this stopped"]),
        (signal.SIGKILL, -signal.SIGKILL, []),
    ):
        trap, temporary = tmp_path / signal_sent.name, short_folder / signal_sent.name
        temporary.mkdir()
        in_training = ambush(r"prepare-\w+\.partial/checkpoints/.*step-0*8\b", str(trap))
        in_training |= {"TMPDIR": str(temporary)}
        with Driver(words, tmp_path, in_training) as driver:
            until(trap.exists, driver.process)
            assert driver.processes("ray::RayTrainWorker")
            driver.process.send_signal(signal_sent)
            assert driver.ending() == (status, expected)
            until(lambda: not driver.processes("ray::RayTrainWorker"))  # which may write to the stage
            assert list((tmp_path / "runs" / "stages").glob("prepare-*.partial"))
            assert signal_sent == signal.SIGKILL or not list(temporary.iterdir())
    with Driver(words, tmp_path) as again:
        assert again.ending() == (0, [])
        assert not processes.left(processes.of(again.processes()))
    ours, theirs = weights_and_metrics(tmp_path), weights_and_metrics(base)
    assert ours == {name: theirs[name] for name in ours}
    (prepare,) = (record for record in outputs(tmp_path).values() if record["stage"] == "prepare")
    assert prepare["resumed"]
