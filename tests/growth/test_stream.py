"""Growing through files: memory that stays bounded, bytes that do not depend on threads, digests, damaged weights."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_checkpoints
from aquilamoe.checkpoint import hf_config, tensor_names
from aquilamoe.checkpoint.reader import CheckpointWriter, Reader
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import lazy_tensor, noise
from aquilamoe.growth.lazy_tensor import LazyTensor, as_rows, extended, gathered
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.units import UnitMap, circular
from small_checkpoints import upcycling

MEGABYTE = 2**20
FPI = GrowthConfig(
    method="fpi", scope="all", norm="exact", maps="circular", noise=0.5, depth="interpolate", new_layers="zero"
)
model = partial(
    small_checkpoints.model, vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8
)


def write_source(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    shapes, random = tensor_names.tensor_shapes(config), torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, shapes, dtype) as writer:
        for name, shape in shapes.items():
            writer.write(name, [torch.empty(shape, dtype=dtype).normal_(0.0, 0.1, generator=random)])
    hf_config.write_config(directory, config, str(dtype).removeprefix("torch."), eos_token_id=None)
    return directory


WIDER = {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 6, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GROWTHS: dict[str, tuple[GrowthConfig | UpcyclingConfig, dict[str, Any]]] = {
    "scale-up": (FPI, WIDER),
    "noise": (upcycling(method="noise", noise=0.1), EXPERTS),
    "drop": (upcycling(method="drop", drop_ratio=0.5), {**EXPERTS, "moe_intermediate_size": 24}),
}


def grow(name: str, source: Path, target: Path) -> dict[str, str]:
    how, sizes = GROWTHS[name]
    if isinstance(how, GrowthConfig):
        return scale_up(source, target, model(**sizes), how, seed=3)
    return scale_out(source, target, model(**sizes), how, seed=3)


@pytest.mark.parametrize("name", GROWTHS)
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_tensor, "BLOCK", 256)  # many blocks of every matrix
    monkeypatch.setattr(noise, "STREAM", 128)
    write_source(tmp_path / "source", model())
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        grow(name, tmp_path / "source", tmp_path / str(threads))
        assert torch.get_num_threads() == threads
    first, *others = ((tmp_path / str(threads) / "model.safetensors").read_bytes() for threads in (1, 2, 5))
    assert [other == first for other in others] == [True, True]


@pytest.mark.parametrize("name", GROWTHS)
def test_a_growth_knows_the_digest_of_every_tensor(name: str, tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    digests = grow(name, tmp_path / "source", tmp_path / "target")
    with Reader(tmp_path / "target") as reader:
        assert list(digests) == list(tensor_names.tensor_shapes(model(**GROWTHS[name][1])))
        for tensor, digest in digests.items():
            assert hashlib.sha256(reader.get(tensor).view(torch.uint8).numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("name", GROWTHS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("damaged", [tensor_names.EMBEDDING, "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers_are_refused_with_file_and_tensor(
    name: str, value: float, damaged: str, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model())
    with Reader(tmp_path / "source") as reader:
        place = reader.info(damaged)
    with (tmp_path / "source/model.safetensors").open("r+b") as file:
        file.seek(place.start + 34 * 2)
        file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    with pytest.raises(UserError, match=rf"source/model.safetensors: tensor '{damaged}' .* at element 34; ") as error:
        grow(name, tmp_path / "source", tmp_path / "target")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()


PEAK = """
import json, sys
from pathlib import Path
import torch
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
source, target, config, how = sys.argv[1:]
how = json.loads(how)
kind, grow = (GrowthConfig, scale_up) if "norm" in how else (UpcyclingConfig, scale_out)
grow(Path(source), Path(target), ModelConfig(**json.loads(config)), kind(**how), 0)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
LARGE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16384, "num_hidden_layers": 4}


@pytest.mark.process
@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        (FPI, {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 6}),
        (upcycling(method="noise", noise=0.1), EXPERTS),
        (upcycling(method="copy"), EXPERTS),
    ],
    ids=["width and depth", "noise", "copy"],
)
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(
    how: GrowthConfig | UpcyclingConfig, sizes: dict[str, int], tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model(**LARGE))
    target = model(**{**LARGE, **sizes})
    words = [tmp_path / "source", tmp_path / "target", target.model_dump_json(), json.dumps(how.model_dump())]
    command = [sys.executable, "-c", PEAK, *map(str, words)]
    threads = os.environ | {"OMP_NUM_THREADS": "4"}  # each has a block of its own
    peak = 1024 * int(subprocess.run(command, env=threads, capture_output=True, text=True, check=True).stdout)
    shapes = tensor_names.tensor_shapes(target).values()
    largest = max(2 * torch.Size(shape).numel() for shape in shapes)
    assert sum(2 * torch.Size(shape).numel() for shape in shapes) > 5 * largest
    assert peak < 256 * MEGABYTE + 2 * largest


def test_rows_are_tensors_to_arithmetic() -> None:
    first, second = (torch.randn(7, 3, dtype=torch.float64) for _ in range(2))
    one, two = as_rows(first), as_rows(second)
    computed = -(2 * one - two / 4 + 1) * two + (1 - one)
    expected = -(2 * first - second / 4 + 1) * second + (1 - first)
    torch.testing.assert_close(computed.whole(), expected, atol=0, rtol=0)
    torch.testing.assert_close(computed[slice(2, 5)], expected[2:5], atol=0, rtol=0)
    torch.testing.assert_close(one.map(torch.tanh)[torch.tensor([6, 0])], first[[6, 0]].tanh(), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"different shapes: \(7, 3\), \(6, 3\)"):
        one + as_rows(first[:6])
    with pytest.raises(TypeError, match="numbers and other rows"):
        one + first  # type: ignore[operator]


def test_what_is_read_of_many_blocks_is_what_is_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensor, "BLOCK", 12)
    whole = torch.randn(11, 4, dtype=torch.float64) + 3
    tensor = as_rows(whole)
    assert tensor.mean == pytest.approx(whole.mean().item())
    assert tensor.rms == pytest.approx(whole.square().mean().sqrt().item())
    assert tensor.std == pytest.approx(whole.std(unbiased=False).item())
    torch.testing.assert_close(tensor.mean_row, whole.mean(dim=0))
    longer = extended(tensor, 15, lambda: tensor.mean_row)
    expected = torch.cat([whole, whole.mean(dim=0).expand(4, 4)])
    for index in (slice(9, 13), slice(12, 14), torch.tensor([14, 0, 3])):
        torch.testing.assert_close(longer[index], expected[index])
    backwards = np.arange(10, -1, -1)
    torch.testing.assert_close(gathered(tensor, 11, lambda: backwards).whole(), whole.flip(0))


def test_drawn_rows_are_the_same_however_they_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "STREAM", 32)
    drawn: LazyTensor = noise.drawn((20, 5), 2.0, "F64", 0, "x")
    whole = drawn.whole()
    assert torch.equal(drawn[slice(7, 16)], whole[7:16])
    assert torch.equal(drawn[torch.tensor([19, 2, 7])], whole[[19, 2, 7]])
    assert not torch.equal(whole, noise.drawn((20, 5), 2.0, "F64", 0, "y").whole())
    assert len(whole.unique()) == 100


@pytest.mark.parametrize(
    "columns", [circular(40, 60), circular(40, 130), UnitMap((0, 1, 2, 2, 0, 1, 2, 2, 1), 3)], ids=["2", "3-4", "mixed"]
)
def test_noise_cancels_over_the_copies_of_a_unit_and_has_variance_one_in_each(columns: UnitMap) -> None:
    cancelling = noise.Cancelling(columns, "F64")
    block = torch.zeros(20_000, columns.size, dtype=torch.float64)
    cancelling.add(block, torch.randn(20_000, cancelling.size, dtype=torch.float64), size=0.5)
    sums = torch.zeros(20_000, columns.num_sources, dtype=torch.float64)
    sums.index_add_(1, torch.tensor(columns.sources), block)
    assert sums.abs().max() < 1e-12
    copies = torch.tensor(columns.copies)
    assert not block[:, copies == 1].any()
    torch.testing.assert_close(
        block.std(dim=0)[copies > 1], torch.full_like(block[0, copies > 1], 0.5), atol=0.02, rtol=0
    )
