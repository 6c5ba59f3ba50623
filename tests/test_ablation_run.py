"""An ablation that runs: every stage once, failures alone, the same results after SIGKILL."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent
TWO_METHODS = (
    "ablation.exclude=[{method:random},{method:lemon},{method:aki_pro},{method:hypercloning},{depth:interpolate}]"
)
ONE_RATIO = "ablation.controls.scratch_learning_rate_ratios=[1.0]"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environment: dict[str, str], tiny: list[str], tmp_path: Path) -> Start:
    """Start a small ablation of two methods in a process of its own."""
    kept = [
        word for word in tiny if not word.startswith(("stages.moe", "stages.control", "stages.scale_out", "stages.ev"))
    ]

    def started(*words: str) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            REPOSITORY / "workflows" / "ablations.py",
            "+ablation=scale_up",
            TWO_METHODS,
            ONE_RATIO,
            "tracking.enabled=false",
        ]
        return subprocess.Popen(
            [*command, *kept, *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def finished(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=900)
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
    out = finished(start("seeds=2"))
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
    again = finished(start("seeds=2"))
    assert re.search(r"^(\d+) stages, \1 of them there", again, re.MULTILINE)
    assert outputs(tmp_path) == made and results(tmp_path) == found
    # A rate at which nothing stays finite.
    spoiled = finished(start("seeds=2", "+ablation.axes.method.values.broken=['stages.dense.learning_rate=1e30']"))
    assert losses(tmp_path) == measured | {"broken, stack": {}}
    (broken,) = [entry for entry in results(tmp_path)["entries"] if entry["name"] == "broken, stack"]
    assert set(broken["missing"]) == {"1", "2"} and "is nan at step" in broken["missing"]["1"]
    page = re.search(r"^report +(\S+)", spoiled, re.MULTILINE)
    assert page and "'broken, stack' has no result for seed 1 and 2" in (tmp_path / page[1]).read_text()
    status = finished(start("seeds=2", "action=status"))
    assert "not running; 12 of 12 results are there" in status and page[0].split()[1] in status
    failed = [line for line in spoiled.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("is nan at step" in line or "is inf at step" in line for line in failed)


def test_under_ray_an_ablation_that_was_killed_goes_on_and_ends_with_the_same_numbers(
    start: Start, tmp_path: Path
) -> None:
    whole = ("cluster=local", "cluster.cpus_per_worker=1", "seeds=1", "stages.dense.total_tokens=16384")
    process = start(*whole)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs" / "stages").glob("*-*.partial/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished(start(*whole))
    resumed = results(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "killed")
    finished(start(*whole[2:], "cluster=local_process", "cluster.cpus_per_worker=1"))
    assert results(tmp_path) == resumed
