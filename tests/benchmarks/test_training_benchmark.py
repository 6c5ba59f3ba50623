"""The benchmark of training: every contestant trains the same thing, ratios rank them, missed goals are marked."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    return load("training_page")


@pytest.fixture(scope="module")
def benchmark(pages: ModuleType) -> ModuleType:  # which imports the other
    return load("training")


@pytest.fixture(scope="module")
def contestants() -> ModuleType:
    return load("training_contestants")


def result(benchmark: ModuleType, name: str, seconds: float, shape: str = "8M") -> Any:
    rounds = [{"seconds": seconds, "cpu": 2 * seconds, "memory": 0}]
    return benchmark.Result(shape, 256, name, 4096, benchmark.configuration(shape), rounds)


def test_the_fastest_of_ours_is_compared_with_the_fastest_of_theirs(benchmark: ModuleType, pages: ModuleType) -> None:
    found = [result(benchmark, name, s) for name, s in (("ours a", 3.0), ("ours b", 2.0), ("transformers a", 5.0))]
    found += [result(benchmark, "transformers b", 4.0)]
    goal = pages.Goal("", "transformers", False, 1.5)
    assert pages.ratio(found, goal) == pytest.approx(2.0)
    assert pages.ratio(found, pages.Goal("", "litgpt", False, 1.5)) is None


def test_a_goal_that_is_missed_is_marked_and_a_failure_is_reported(benchmark: ModuleType, pages: ModuleType) -> None:
    found = [result(benchmark, "ours autocast", 1.0), result(benchmark, "transformers sdpa autocast", 1.9)]
    config = benchmark.configuration("8M")
    found += [benchmark.Result("8M", 256, "litgpt bf16", 4096, config, error="ImportError: no litgpt")]
    peaks = {"bfloat16": 1e12, "float32": 1e11}
    best, stock = list(pages.goals(found, peaks))[2:]
    assert best.endswith("| transformers at its best | 1.90x | 1.5 |")
    assert stock.endswith("| transformers, bf16 autocast as it comes | 1.90x | 2, missed |")
    assert any("ImportError: no litgpt" in line for line in pages.table(found, peaks))


def test_experts_are_judged_by_active_flops_beside_the_dense_network_of_their_size(
    benchmark: ModuleType, pages: ModuleType
) -> None:
    pair = [result(benchmark, "ours autocast", 1.0), result(benchmark, "ours autocast", 2.0, "8M x8")]
    dense, sparse = pair
    expected = 0.5 * sparse.config.flops_per_token(256) / dense.config.flops_per_token(256)
    line = next(each for each in pages.goals(pair, {"bfloat16": 1e12}) if "per active FLOP" in each)
    assert f"| {expected:.2f}x |" in line


def test_every_chosen_shape_exists_and_fits_its_lengths(benchmark: ModuleType) -> None:
    for shape, length in [*benchmark.CPU, *benchmark.QUICK, *benchmark.CUDA]:
        assert length <= benchmark.SHAPES[shape]["max_position_embeddings"]
    sizes = {name: benchmark.configuration(name).num_params for name in ("0.7M", "8M", "30M", "42M", "1.8B")}
    for name, size in sizes.items():
        stated = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        assert size == pytest.approx(stated, rel=0.05)


@pytest.mark.parametrize("experts", [False, True])
def test_ours_and_transformers_start_at_the_same_loss_with_as_many_parameters(
    benchmark: ModuleType, contestants: ModuleType, experts: bool
) -> None:
    shape = benchmark.dense(64, 32, 48, 2, 4, 2)
    shape = benchmark.sparse(shape) if experts else shape
    made = [contestants.Contestant(f"{name} fp32", shape, 2, 16, "cpu") for name in ("ours", "transformers sdpa")]
    ours, theirs = (sum(p.numel() for p in each.model.parameters()) for each in made)
    assert ours == theirs
    losses = [each.steps(1)["loss"] for each in made]
    assert losses == pytest.approx([torch.tensor(64.0).log().item()] * 2, rel=0.02)
    assert made[0].steps(20)["loss"] < losses[0]


def test_a_profile_divides_the_whole_step_among_its_regions(benchmark: ModuleType, contestants: ModuleType) -> None:
    contestant = contestants.Contestant("ours autocast", benchmark.dense(64, 32, 48, 2, 4, 2), 2, 16, "cpu")
    shares = contestant.profile()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(shares[region] > 0 for region in shares if region != "experts")


@pytest.mark.process
def test_the_whole_command_measures_and_writes_its_page(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", {"tiny": benchmark.dense(64, 32, 48, 2, 4, 2)})
    monkeypatch.setattr(benchmark, "TURN_S", 0.01)
    who = ["--who", "ours autocast", "ours bf16 master", "ours fp32", "--threads", "1"]
    words = ["--shapes", "tiny:16", "--batch-tokens", "64", "--rounds", "2", "--out", str(tmp_path / "page.md")]
    monkeypatch.setattr(benchmark, "OURS", [name for name in benchmark.OURS if "compiled" not in name])
    benchmark.main([*words, *who])
    page = (tmp_path / "page.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| tiny | 16 |")]
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert [row[2] for row in rows] == [name for name in benchmark.OURS if has_bf16 or "fp32" in name]
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)
