"""The benchmark of growth: its contestants can be grown, its ratios rank them, its page marks missed goals."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.cli import hydra_cli
from aquilamoe.cli.program import GROW
from aquilamoe.config.grow import parse
from aquilamoe.growth.tool.request import resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("growth_benchmark", ROOT / "benchmarks/growth.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def row(seconds: float, num_bytes: float = 1e9, memory: float = 1e8) -> dict[str, float]:
    return {"seconds": seconds, "bytes": num_bytes, "memory": memory, "cpu": 1.0}


def test_seconds_count_per_byte_and_memory_as_it_is(benchmark: ModuleType) -> None:
    found = {"a": row(2.0, 4e9, 1e8), "b": row(3.0, 1e9, 2e9)}
    assert benchmark.ratio(benchmark.Goal("a", "b", "seconds", 1), found) == pytest.approx(6.0)
    assert benchmark.ratio(benchmark.Goal("a", "b", "memory", 1), found) == pytest.approx(20.0)
    assert benchmark.ratio(benchmark.Goal("a", "c", "memory", 1), found) is None


def test_a_goal_that_is_missed_is_marked(benchmark: ModuleType) -> None:
    at_goal = {"replicate": row(1.0), "dd oflag=direct": row(0.95), "cp + sync": row(2.4)}
    direct, cached = benchmark.goals(at_goal)[2:]
    assert direct.endswith("| 0.95x | 0.95 |")
    assert cached.endswith("| 2.40x | 2.5, missed |")


def test_every_goal_is_about_contestants_that_there_are(benchmark: ModuleType) -> None:
    known = {*benchmark.OURS, *benchmark.COMMANDS, *benchmark.PEERS, *benchmark.LIMITS, benchmark.COLD}
    assert {name for goal in benchmark.GOALS for name in (goal.first, goal.second)} <= known


def test_every_growth_of_ours_is_one_that_can_be_done(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("HIDDEN", 64), ("FFN", 96), ("VOCABULARY", 32)):
        monkeypatch.setattr(benchmark, name, size)
    benchmark.make_source(tmp_path / "source", 0)
    benchmark.make_source(tmp_path / "mixture", 0, experts=4)
    for name in benchmark.OURS:
        source = tmp_path / ("mixture" if name in benchmark.MIXTURES else "source")
        benchmark.prepare(name, source)(source, tmp_path / name)
        benchmark.make_durable(tmp_path / name)
    sizes = {name: benchmark.bytes_of(tmp_path / name) for name in ("source", "mixture", *benchmark.OURS)}
    assert min(sizes, key=sizes.__getitem__) == "source"
    assert sizes["width x2, depth x4/3"] > sizes["width x2"] > 2 * sizes["source"]
    assert sizes["mixture, width x2"] > 2 * sizes["mixture"]
    assert sizes["mixture, experts x2"] > 1.3 * sizes["mixture"]


def test_whole_commands_are_those_of_the_same_growths(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("HIDDEN", 64), ("FFN", 96), ("VOCABULARY", 32)):
        monkeypatch.setattr(benchmark, name, size)
    benchmark.make_source(tmp_path / "source", 0)
    benchmark.make_source(tmp_path / "mixture", 0, experts=4)
    for name in benchmark.COMMANDS:
        short = name.removesuffix(benchmark.WHOLE)
        source = tmp_path / ("mixture" if short in benchmark.MIXTURES else "source")
        _, program, *words = benchmark.command_words(name, source, tmp_path / "target")
        assert program.endswith("workflows/grow.py")
        (values,) = hydra_cli.composed(GROW, words)
        request = resolve(parse(values))
        benchmark.prepare(short, source)(source, tmp_path / name)
        assert request.model == read_config(tmp_path / name), name


def test_a_contestant_prints_what_it_took(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("HIDDEN", 64), ("FFN", 96), ("VOCABULARY", 32)):
        monkeypatch.setattr(benchmark, name, size)
    benchmark.make_source(tmp_path / "source", 0)
    words = [sys.executable, str(ROOT / "benchmarks/growth.py"), "--contestant", "replicate"]
    paths = [str(tmp_path / "source"), str(tmp_path / "target")]
    done = subprocess.run([*words, *paths], capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["bytes"] == benchmark.bytes_of(tmp_path / "target")
    assert printed["seconds"] > 0
    assert 2**24 < printed["memory"] < 2**30
