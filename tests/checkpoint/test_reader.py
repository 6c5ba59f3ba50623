"""Writing and reading safetensors directories."""

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from aquilamoe.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Reader, write
from aquilamoe.config.messages import UserError

Shapes = dict[str, tuple[int, ...]]

SHAPES: Shapes = {"embed": (6, 4), "layers.0.norm": (4,), "layers.0.up": (8, 4), "lm_head": (6, 4)}
shape_maps = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


def random_tensors(shapes: Shapes, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def read_all(directory: Path) -> dict[str, Tensor]:
    with Reader(directory) as reader:
        return {name: reader.get(name).clone() for name in reader.names}


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
    )


def sharded(directory: Path) -> dict[str, Tensor]:
    tensors = random_tensors(SHAPES, torch.float32)
    write(directory, SHAPES, torch.float32, tensors.items(), max_shard_bytes=130)
    return tensors


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    shapes=shape_maps,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    max_shard_bytes=st.integers(1, 400),
)
def test_what_is_written_is_read_back_by_us_and_by_safetensors(
    shapes: Shapes, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    tensors = random_tensors(shapes, dtype)
    with TemporaryDirectory() as name:
        directory = Path(name)
        write(directory, shapes, dtype, tensors.items(), max_shard_bytes)
        assert equal(read_all(directory), tensors)
        by_library: dict[str, Tensor] = {}
        for file in directory.glob("*.safetensors"):
            by_library |= load_file(file)
        assert equal(by_library, tensors)
        with Reader(directory) as reader:
            assert {name: reader.shape(name) for name in reader.names} == shapes
            assert all(reader.dtype(name) == dtype for name in reader.names)
        assert not list(directory.glob("*.partial"))


def test_no_shard_exceeds_the_limit_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == (24 + 4 + 32 + 24) * 4
    assert list(index["weight_map"]) == list(SHAPES)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= 130


def test_a_model_within_the_limit_is_one_file_without_index(tmp_path: Path) -> None:
    write(tmp_path, SHAPES, torch.float32, random_tensors(SHAPES, torch.float32).items(), max_shard_bytes=336)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_tensors_are_cast_and_need_not_be_contiguous(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).t()
    write(tmp_path, {"weight": (6, 4)}, torch.bfloat16, [("weight", tensor)])
    assert equal(read_all(tmp_path), {"weight": tensor.bfloat16()})


@pytest.mark.parametrize("max_shard_bytes", [100, 10**9])
def test_the_writer_releases_each_tensor_before_it_requests_the_next(tmp_path: Path, max_shard_bytes: int) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, shape in SHAPES.items():
            assert len(alive) == 0, f"a tensor before {name} is still held"
            tensor = torch.zeros(shape)
            alive.add(tensor)
            yield name, tensor
            del tensor

    write(tmp_path, SHAPES, torch.float32, stream(), max_shard_bytes)
    assert len(alive) == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.zeros(2))], "tensor 'b' is missing"),
        ([("b", torch.zeros(3)), ("a", torch.zeros(2))], "unexpected tensor 'b' where 'a' was due"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))], "unexpected tensor 'c' after"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(3, 1))], r"tensor 'b' has shape \(3, 1\), not \(3,\)"),
    ],
)
def test_a_wrong_stream_is_refused_and_leaves_the_old_weights_alone(
    tmp_path: Path, tensors: list[tuple[str, Tensor]], message: str
) -> None:
    old = sharded(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        write(tmp_path, {"a": (2,), "b": (3,)}, torch.float32, tensors)
    assert sorted(tmp_path.iterdir()) == before
    assert equal(read_all(tmp_path), old)


def test_every_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def record(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        assert not [
            path for path in tmp_path.iterdir() if path.stat().st_ino == synced[-1] and path.suffix != ".partial"
        ]

    monkeypatch.setattr(os, "fsync", record)
    sharded(tmp_path)
    assert set(synced) == {path.stat().st_ino for path in [tmp_path, *tmp_path.iterdir()]}
    assert synced[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize(("first", "second"), [(130, 10**9), (10**9, 130), (130, 200)])
def test_new_weights_replace_the_old_whatever_the_sharding(tmp_path: Path, first: int, second: int) -> None:
    for seed, limit in enumerate((first, second)):
        tensors = random_tensors(SHAPES, torch.float32, seed)
        write(tmp_path, SHAPES, torch.float32, tensors.items(), max_shard_bytes=limit)
    assert equal(read_all(tmp_path), tensors)
    fresh = tmp_path / "fresh"
    write(fresh, SHAPES, torch.float32, tensors.items(), max_shard_bytes=second)
    assert {path.name for path in tmp_path.iterdir()} - {"fresh"} == {path.name for path in fresh.iterdir()}


def test_changing_a_tensor_that_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    with Reader(tmp_path) as reader:
        reader.get("layers.0.up").zero_()
    assert equal(read_all(tmp_path), tensors)


def refusal(directory: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(UserError) as caught:
        read_all(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_by_name(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name)
        sharded(directory)
        path = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        assert refusal(directory).startswith(f"{path}: is damaged or cut short at {path.stat().st_size} bytes (")


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x10" + b"\0" * 7, b""])
def test_a_file_with_a_damaged_header_is_refused_by_name(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, SHAPES, torch.float32, random_tensors(SHAPES, torch.float32).items())
    path = tmp_path / SINGLE_FILE
    path.write_bytes(damage + path.read_bytes()[len(damage) :] + (b"x" if not damage else b""))
    assert refusal(tmp_path).startswith(f"{path}: is damaged")


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.unlink()
    assert refusal(tmp_path) == f"{path}: this shard of the checkpoint is missing; copy it again"


def test_a_shard_without_a_tensor_that_the_index_promises_is_refused_by_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert refusal(tmp_path).startswith(f"{second}: lacks the tensor 'layers.0.up'")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text, encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{tmp_path / INDEX_FILE}: ")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: has neither {SINGLE_FILE} nor {INDEX_FILE}")


def test_an_absent_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    sharded(tmp_path)
    with Reader(tmp_path) as reader, pytest.raises(UserError, match=r"there is no tensor 'layers\.9\.up' among"):
        reader.get("layers.9.up")


def test_a_tensor_of_whole_numbers_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": (2,)}, torch.float32, [("a", torch.zeros(2))])
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    assert refusal(tmp_path).startswith(f"{path}: tensor 'a' is stored as I32")
