"""An ablation that runs: every stage once, failures alone, the same results after SIGKILL."""

import html
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import command, descendants, left
from waiting import until

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]
TWO_METHODS = (
    "ablation.exclude=[{method:random},{method:lemon},{method:aki_pro},{method:hypercloning},{depth:interpolate}]"
)
TRIALS = ("dense", "scratch", "continued")  # stages of one trial each
ONE_RATIO = "ablation.controls.scratch_learning_rate_ratios=[1.0]"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tiny: list[str], tmp_path: Path) -> Iterator[Start]:
    """Start a small ablation of two methods in a process of its own."""
    kept = [
        word
        for word in tiny
        if not word.startswith(("name=", "stages.moe", "stages.control", "stages.scale_out", "stages.ev"))
    ]

    def started(*runs: list[str], **changes: str) -> "subprocess.Popen[str]":
        script = REPOSITORY / "workflows" / "ablations.py"
        always = ["+ablation=scale_up", TWO_METHODS, ONE_RATIO, "tracking.enabled=false", *kept]
        words: list[str | Path] = [script, *always, *runs[0]]
        if "cluster=local" in runs[0]:
            words = ["-c", IN_ONE_PROCESS, script, json.dumps([[*always, *run] for run in runs])]
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tmp_path,
            env=os.environ | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    running: list[subprocess.Popen[str]] = []
    yield started
    for process in running:
        process.kill()
        process.communicate()


def finished(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


def results(root: Path) -> dict[str, Any]:
    folder = root / "runs" / "ablations" / "ablation_scale_up"
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in found.items() if key != "command"}


def losses(root: Path) -> dict[str, dict[str, float]]:
    """The objective of every variant by seed."""
    entries = [entry for entry in results(root)["entries"] if entry["control"] is None]
    return {e["name"]: {seed: found["value"] for seed, found in e["seeds"].items()} for e in entries}


def outputs(root: Path) -> dict[str, list[str]]:
    """Fingerprints of what is in the store, by stage."""
    found: dict[str, list[str]] = {}
    for path in (root / "runs" / "stages").iterdir():
        stage, _, fingerprint = path.name.rpartition("-")
        found.setdefault(stage, []).append(fingerprint)
    return found


def test_shared_stages_run_once_a_second_run_finds_all_and_a_failed_variant_costs_only_itself(
    start: Start, tmp_path: Path
) -> None:
    out = finished(start(["seeds=2"]))
    made = outputs(tmp_path)
    assert len(made["tokens"]) == 1 and len(made["prepare"]) == 2 and len(made["dense"]) == 4
    found, measured = results(tmp_path), losses(tmp_path)
    assert measured.keys() == {"fpi, stack", "aki, stack"}
    assert len(found["entries"]) == 2 + 4 and all(entry["missing"] == {} for entry in found["entries"])
    for entry in found["entries"][:2]:
        for seed in entry["seeds"].values():
            assert {"loss_jump", "kl", "rank_grown", "rank_end"} <= seed["figures"].keys()
            assert 0 < seed["figures"]["rank_end"] <= 1 and len(seed["curve"]) >= 2
    for name, by_seed in measured.items():
        assert f"{sum(by_seed.values()) / 2:.4f}" in next(line for line in out.splitlines() if f" {name} " in line)
    again = finished(start(["seeds=2"]))
    assert re.search(r"^(\d+) stages, \1 of them there", again, re.MULTILINE)
    assert outputs(tmp_path) == made and results(tmp_path) == found
    # A rate at which nothing stays finite.
    spoiled = finished(start(["seeds=2", "+ablation.axes.method.values.broken=['stages.dense.learning_rate=1e30']"]))
    assert losses(tmp_path) == measured | {"broken, stack": {}}
    (broken,) = [entry for entry in results(tmp_path)["entries"] if entry["name"] == "broken, stack"]
    assert set(broken["missing"]) == {"1", "2"} and "is nan at step" in broken["missing"]["1"]
    page = re.search(r"^report +(\S+)", spoiled, re.MULTILINE)
    assert page and "'broken, stack' has no result for seed 1 and 2" in html.unescape((tmp_path / page[1]).read_text())
    status = finished(start(["seeds=2", "action=status"]))
    assert "not running; 12 of 12 results are there" in status and page[0].split()[1] in status
    failed = [line for line in spoiled.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("is nan at step" in line or "is inf at step" in line for line in failed)


def test_what_another_machine_has_computed_is_fetched_from_the_remote(start: Start, tmp_path: Path) -> None:
    remote = f"paths.remote={tmp_path / 'shared'}"
    finished(start(["seeds=1", remote]))
    computed, found = outputs(tmp_path), results(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    planned = finished(start(["seeds=1", remote, "action=plan"]))
    assert re.search(r"^(\d+) stages, \1 of them there", planned, re.MULTILINE)
    finished(start(["seeds=1", remote]))
    assert outputs(tmp_path) == computed and results(tmp_path) == found
    records = (tmp_path / "runs" / "stages").glob("*/record.json")
    assert all(
        path.read_bytes() == (tmp_path / "elsewhere" / path.relative_to(tmp_path / "runs")).read_bytes()
        for path in records
    )


# Runs commands one after the other in one process, and prints whether Ray still reserves anything after them.
IN_ONE_PROCESS = """
import json, runpy, sys, time
from pathlib import Path

script = Path(sys.argv[1])
sys.path.insert(0, str(script.parent))
for words in json.loads(sys.argv[2]):
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")

import ray

# Ray Train and Ray Data keep one book each in a session. They stay, and reserve a thousandth of the head node.
BOOKS = {"TrainStateActor", "_AutoscalingCoordinatorActor"}

def actors():
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException
    try:
        # By its address: there may be other sessions on this machine.
        session = ray.get_runtime_context().gcs_address
        alive = list_actors(session, filters=[("state", "!=", "DEAD")], limit=1000)
    except RayStateApiException as error:  # the state API is busy: request again
        return [str(error)]
    return sorted(actor.class_name for actor in alive if actor.class_name not in BOOKS)

def reserved():
    free = ray.available_resources()
    # Objects in the memory of the session are no reservation.
    kinds = {name: amount for name, amount in ray.cluster_resources().items() if name != "object_store_memory"}
    held = {name: amount - free.get(name, 0.0) for name, amount in kinds.items() if amount != free.get(name, 0.0)}
    return {name: amount for name, amount in held.items() if name != "node:__internal_head__"} | dict.fromkeys(actors())

deadline = time.monotonic() + 600  # Tune polls its workers once a second, through Ray's state API
while reserved() and time.monotonic() < deadline:
    time.sleep(0.5)
print("still reserved:", reserved())
"""
# At this rate nothing is learnt: a trial that is compared with others falls behind.
LAZY = "+ablation.axes.method.values.lazy=['growth=fpi','stages.dense.learning_rate=1e-9']"


def test_under_ray_a_killed_ablation_goes_on_early_stopping_ends_who_falls_behind_and_nothing_stays_reserved(
    start: Start, tmp_path: Path, ambush: Callable[..., dict[str, str]]
) -> None:
    whole = ("cluster=local", "cluster.cpus_per_worker=1", "seeds=1", "stages.dense.total_tokens=16384")
    stages = tmp_path / "runs" / "stages"
    # One trial is finished, and another in training for a while.
    trap, ends = tmp_path / "trap", [str(stages / f"{kind}*[0-9a-f]") for kind in TRIALS]
    process = start([*whole], **ambush(rf"({'|'.join(TRIALS)}).*/\.step-0*([4-9]|\d\d+)\b", str(trap), after=ends))
    until(trap.exists, process)
    trials = [found for found in descendants(process.pid) if "ImplicitFunc" in command(found)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not left(trials)  # a trial outlives its driver for a moment, and may end what it is at
    before = {path.name: (path / "record.json").read_bytes() for path in finished_trials(stages)}
    partials = {path.parents[1] for path in stages.glob("*.partial/checkpoints/step-*")}
    underway = {path.stem for path in partials if not (path / "record.json").exists()}  # else only its name is missing
    assert before and underway
    out = finished(start([*whole], [*whole, LAZY, "scheduler=asha"]))
    assert {name: (stages / name / "record.json").read_bytes() for name in before} == before
    assert all(json.loads((stages / name / "record.json").read_text())["resumed"] for name in underway)
    with_lazy = losses(tmp_path)
    assert with_lazy["lazy, stack"] == {}
    (lazy,) = [entry for entry in results(tmp_path)["entries"] if entry["name"] == "lazy, stack"]
    assert lazy["missing"]["1"].startswith("stopped early after ")
    assert re.search(r"lazy, stack: dense, seed 1  stopped early: \d\.\d{4} after \d\S* tokens", out)
    assert "failed" not in out and out.rstrip().endswith("still reserved: {}")
    (tmp_path / "runs").rename(tmp_path / "killed")
    finished(start([*whole[2:], "cluster=local_process"]))
    assert losses(tmp_path) | {"lazy, stack": {}} == with_lazy


@pytest.mark.slow
def test_trials_on_several_workers_are_stopped_with_all_that_they_reserved(start: Start, tmp_path: Path) -> None:
    """Two of two cores for each trial: the next trial can start only when one that was stopped has let go."""
    words = ["cluster=local", "cluster.workers=2", "cluster.cpus_per_worker=1", "seeds=1", "scheduler=asha", LAZY]
    out = finished(start([*words, "stages.dense.total_tokens=16384"]))
    assert "lazy, stack: dense, seed 1  stopped early" in out and "failed" not in out
    assert losses(tmp_path)["fpi, stack"].keys() == {"1"}, "the first has no other to fall behind"
    assert out.rstrip().endswith("still reserved: {}")


def finished_trials(stages: Path) -> list[Path]:
    """What trials have published: of the stages, those that no other trial needs."""
    return [path for kind in TRIALS for path in stages.glob(f"{kind}*[0-9a-f]")]
