"""What a checkpoint declares, and how one that declares something impossible is refused."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from aquilamoe.checkpoint import safetensors_header
from aquilamoe.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE, TensorInfo
from aquilamoe.config.messages import UserError

Entries = dict[str, dict[str, Any]]

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}


def put(path: Path, entries: Any, num_bytes: int = 40, header: bytes | None = None) -> Path:
    """A safetensors file with this header and as many bytes of tensors."""
    text = json.dumps(entries).encode() if header is None else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        safetensors_header.read(directory)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_found_where_it_is(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(())}
    save_file(tensors, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    found = safetensors_header.read(tmp_path)
    assert found.keys() == tensors.keys()
    for name, info in found.items():
        assert (info.file, info.dtype, info.shape) == (SINGLE_FILE, "F32", tuple(tensors[name].shape))
        assert content[info.start : info.end] == tensors[name].numpy().tobytes()


def test_shards_are_found_by_their_index_whatever_their_names(tmp_path: Path) -> None:
    put(tmp_path / "x.safetensors", {"a": A, "b": B})
    put(tmp_path / "y.safetensors", {"c": {**B, "data_offsets": [0, 16]}}, 16)
    weight_map = {"c": "y.safetensors", "b": "x.safetensors", "a": "x.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: info.file for name, info in safetensors_header.read(tmp_path).items()} == weight_map
    assert list(safetensors_header.read(tmp_path)) == list(weight_map)


def test_reading_headers_imports_no_torch() -> None:
    code = (
        "import sys, aquilamoe.checkpoint.safetensors_header, aquilamoe.checkpoint.sharding; print('torch' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


numbers = st.one_of(st.integers(-1, 50), st.sampled_from([2**40, 2**63, 1.0, True, None, "8"]))
entries = st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F31", 3, None]),
    st.one_of(st.lists(st.integers(0, 6), max_size=2), st.lists(numbers, max_size=2), st.none()),
    st.one_of(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), st.lists(numbers, max_size=3), st.none()),
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    header=st.one_of(
        st.dictionaries(st.sampled_from("abc"), entries, max_size=3),
        st.dictionaries(st.sampled_from("ab"), st.sampled_from([A, B, {**B, "dtype": "F16", "shape": [8]}])),
        st.sampled_from([[], 3, None, "a", {"a": []}, {"a": 1}, {"__metadata__": {"x": "y"}, "a": A, "b": B}]),
    ),
    num_bytes=st.sampled_from([0, 24, 39, 40, 41]),
)
def test_what_the_library_refuses_is_refused_with_the_file_named(header: Any, num_bytes: int) -> None:
    with TemporaryDirectory() as name:
        path = put(Path(name) / SINGLE_FILE, header, num_bytes)
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            assert refusal(path.parent).startswith(f"{path}: ")
            return
        try:
            assert {key: info.shape for key, info in safetensors_header.read(path.parent).items()} == shapes
        except UserError as error:  # right for the library, but nothing to compute with
            assert "is stored as" in str(error)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data())
def test_a_byte_changed_anywhere_in_a_header_is_refused_or_harmless_but_never_a_crash(data: st.DataObject) -> None:
    with TemporaryDirectory() as name:
        path = put(Path(name) / SINGLE_FILE, {"a": A, "b": B})
        content = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, len(content) - 41))
        content[where] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            found = safetensors_header.read(path.parent)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert all(0 <= info.start <= info.end <= len(content) for info in found.values())


@pytest.mark.parametrize(
    ("header", "num_bytes", "tensor", "facts"),
    [
        ({"a": A, "b": B}, 36, "b", ["cut short at", "ends at byte"]),
        ({"a": A, "b": {**B, "data_offsets": [20, 36]}}, 36, "b", ["inside 'a'"]),
        ({"a": A, "b": {**B, "data_offsets": [28, 44]}}, 44, "b", ["belong to no tensor"]),
        ({"a": A, "b": {**B, "data_offsets": [24, 44]}}, 44, "b", ["16 bytes", "20"]),
        ({"a": A, "b": {**B, "data_offsets": [24, 23]}}, 40, "b", ["-1"]),
        ({"a": A, "b": {**B, "shape": [-4]}}, 40, "b", ["whole numbers"]),
        ({"a": A, "b": {**B, "shape": "4"}}, 40, "b", ["shape"]),
        ({"a": A, "b": {"dtype": "F32"}}, 40, "b", ["shape"]),
        ({"a": A, "b": {**B, "dtype": "I32"}}, 40, "b", ["I32", "BF16"]),
        ({"a": A, "b": B}, 41, "b", ["ends at byte"]),
    ],
)
def test_an_impossible_tensor_is_refused_with_file_tensor_and_both_values(
    tmp_path: Path, header: Entries, num_bytes: int, tensor: str, facts: list[str]
) -> None:
    path = put(tmp_path / SINGLE_FILE, header, num_bytes)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: ")
    assert f"tensor '{tensor}'" in message
    assert [fact for fact in facts if fact not in message] == []


def test_tensors_may_differ_in_type_and_most_bytes_decide_which_one_a_checkpoint_has(tmp_path: Path) -> None:
    half = {**B, "dtype": "F16", "shape": [8]}
    put(tmp_path / SINGLE_FILE, {"a": A, "b": half})
    found = safetensors_header.read(tmp_path)
    assert [info.dtype for info in found.values()] == ["F32", "F16"]
    assert safetensors_header.main_dtype(found) == "F32"
    put(tmp_path / SINGLE_FILE, {"a": {**A, "dtype": "BF16", "shape": [12]}, "b.rotary_emb.inv_freq": B})
    assert safetensors_header.main_dtype(safetensors_header.read(tmp_path)) == "BF16"


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    path = put(tmp_path / SINGLE_FILE, None, header=text)
    assert refusal(tmp_path).startswith(f"{path}: is damaged or cut short at {path.stat().st_size} bytes (")


def test_a_header_longer_than_the_file_or_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "should have 4611686018427387904 bytes, 2 are there" in refusal(tmp_path)
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_008)
    assert "more than 33554432" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x\0y"])
def test_an_index_that_points_out_of_its_directory_is_refused(tmp_path: Path, file: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    put(tmp_path / "x.safetensors", {"a": A, "b": B})
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file}}))
    message = refusal(directory)
    assert message.startswith(f"{directory / INDEX_FILE}: puts tensor 'a' into {file!r}")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for file in ("x.safetensors", "y.safetensors"):
        put(tmp_path / file, {"a": A, file[0]: B})
    weight_map = {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'y.safetensors'}: has tensor 'a', which x.safetensors has too")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_not_opened(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: has only pickled weights ({file}), which are never opened")
    assert not Path("pwned").exists()


def test_bytes_of_a_tensor_are_counted_from_the_beginning_of_the_file() -> None:
    assert TensorInfo("f", "F32", (2,), 100, 108).num_bytes == 8
