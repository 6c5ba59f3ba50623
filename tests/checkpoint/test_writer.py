"""Writing checkpoints around the page cache: the same bytes in any order and on any disk, and nothing or the whole."""

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from aquilamoe.checkpoint import direct_io, writer
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.safetensors_header import SINGLE_FILE
from aquilamoe.checkpoint.sharding import PAGE
from aquilamoe.checkpoint.writer import CheckpointWriter
from aquilamoe.config.messages import UserError

Shapes = dict[str, tuple[int, ...]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES: Shapes = {"up": (96, 512), "odd": (31, 513), "norm": (512,), "down": (512, 96), "head": (700, 300)}


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_all(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9) -> dict[str, str]:
    """Write tensors of one type in the order given, whole; return their digests."""
    shapes = {name: tuple(tensors[name].shape) for name in sorted(tensors)}
    dtype = next(iter(tensors.values())).dtype
    with CheckpointWriter(directory, shapes, dtype, max_shard_bytes) as out:
        for name, tensor in tensors.items():
            out.write(name, [tensor])
    return out.digests


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture
def small_buffers() -> Iterator[None]:
    """Buffers of two pages and direct writes from one page on, so that small tensors meet every boundary."""
    with (
        patch.object(direct_io, "BUFFER_BYTES", 2 * PAGE),
        patch.object(writer, "BUFFER_BYTES", 2 * PAGE),
        patch.object(direct_io, "DIRECT_BYTES", PAGE),
    ):
        yield


def blocks_of(tensor: Tensor, cuts: random.Random) -> list[Tensor]:
    """Cut the rows of a tensor anywhere; some of the blocks lie in memory by columns, some are of another type."""
    if tensor.dim() == 0 or len(tensor) == 0:
        return [tensor]
    places = sorted({0, len(tensor), *(cuts.randint(0, len(tensor)) for _ in range(3))})
    blocks = [tensor[start:stop] for start, stop in pairwise(places)]
    return [
        block.double() if cuts.random() < 0.3 else block.movedim(0, -1).contiguous().movedim(-1, 0) for block in blocks
    ]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 3, 32, 64, 100]), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(DTYPES),
    max_shard_bytes=st.sampled_from([1, 50_000, 10**9]),
    seed=st.integers(0, 2**20),
)
@pytest.mark.usefixtures("small_buffers")
def test_any_order_any_blocks_and_any_disk_give_the_same_files_and_right_digests(
    sizes: list[tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int, seed: int
) -> None:
    shapes = {f"tensor.{index}": shape for index, shape in enumerate(sizes)}
    tensors, draw = random_tensors(shapes, dtype, seed), random.Random(seed)
    order = draw.sample(sorted(tensors), len(tensors))
    with TemporaryDirectory() as plain, TemporaryDirectory() as cut:
        with patch.object(direct_io, "DIRECT", 0):
            write_all(Path(plain), {name: tensors[name] for name in shapes}, max_shard_bytes)
        with CheckpointWriter(Path(cut), dict(sorted(shapes.items())), dtype, max_shard_bytes) as out:
            for name in order:
                out.write(name, blocks_of(tensors[name], draw))
        assert contents(Path(cut)) == contents(Path(plain))
        assert out.digests == {name: sha256(tensor) for name, tensor in tensors.items()}
        found: dict[str, Tensor] = {}
        for file in Path(cut).glob("*.safetensors"):
            found |= load_file(file)
        assert {name: sha256(tensor) for name, tensor in found.items()} == out.digests


@pytest.mark.parametrize("max_shard_bytes", [300_000, 10**9])
@pytest.mark.usefixtures("small_buffers")
def test_what_is_written_under_several_names_is_read_once_and_is_the_same_under_each(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    tensors = random_tensors(SHAPES)
    shapes: Shapes = {f"{name}.{copy}": shape for copy in range(3) for name, shape in SHAPES.items()}
    taken: list[str] = []

    def stream(name: str) -> Iterator[Tensor]:
        taken.append(name)
        yield from tensors[name].split(7)

    with CheckpointWriter(tmp_path, shapes, torch.float32, max_shard_bytes) as out:
        for name in SHAPES:
            out.write([f"{name}.{copy}" for copy in range(3)], stream(name))
    assert taken == list(SHAPES)
    with Reader(tmp_path) as reader:
        for name in shapes:
            assert torch.equal(reader.get(name), tensors[name.partition(".")[0]])
            assert out.digests[name] == sha256(tensors[name.partition(".")[0]]) == reader.digest(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_buffers")
def test_copied_bytes_are_the_sources(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(SHAPES, dtype)
    digests = write_all(tmp_path / "source", tensors)
    with RawReader(tmp_path / "source") as source, CheckpointWriter(tmp_path / "target", SHAPES, dtype, 400_000) as out:
        for name in reversed(SHAPES):
            out.copy(name, source, name)
    assert out.digests == digests
    with Reader(tmp_path / "target") as reader:
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def test_several_threads_may_write_at_once(tmp_path: Path) -> None:
    tensors = random_tensors({f"tensor.{index}": (300, 1000) for index in range(24)}, torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with CheckpointWriter(tmp_path, shapes, torch.bfloat16) as out, ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda name: out.write(name, tensors[name].split(11)), tensors))
    assert out.digests == {name: sha256(tensor) for name, tensor in tensors.items()}
    with Reader(tmp_path) as reader:
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def refuses_direct_writes(directory: Path) -> bool:
    probe = directory / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | direct_io.DIRECT))
    except OSError:
        return True
    finally:
        probe.unlink(missing_ok=True)
    return direct_io.DIRECT == 0


def test_large_tensors_go_around_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if refuses_direct_writes(tmp_path):
        pytest.skip("this file system refuses direct writes")
    pwrite, direct = os.pwrite, list[int]()

    def counting(descriptor: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io.DIRECT:
            direct.append(len(data))  # atomic: several threads write
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    # The second size is no multiple of a page: all but its two ends goes directly, all the same.
    tensors = random_tensors({"even": (1024, 1024), "odd": (1023, 1025)})
    write_all(tmp_path / "model", tensors)
    assert sum(direct) > sum(tensor.nbytes for tensor in tensors.values()) - 2 * PAGE


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_file_system_that_refuses_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    tensors = random_tensors({"even": (256, 1024), "odd": (255, 1025)})
    write_all(tmp_path / "expected", tensors)
    pwrite, open_ = os.pwrite, os.open
    refused = []

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if when == "write" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io.DIRECT:
            refused.append(when)
            raise OSError(errno.EINVAL, "no direct writes")
        return pwrite(descriptor, data, offset)

    def open_file(path: Path, flags: int, *mode: int) -> int:
        if when == "open" and flags & direct_io.DIRECT:
            refused.append(when)
            raise OSError(errno.EINVAL, "no direct writes")
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "open", open_file)
    write_all(tmp_path / "found", tensors)
    assert refused or refuses_direct_writes(tmp_path)
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")


def test_memory_as_a_disk_gets_the_same_bytes(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("there is no /dev/shm")
    tensors = random_tensors({"even": (256, 1024), "odd": (255, 1025)}, torch.bfloat16)
    with TemporaryDirectory(dir=shared) as name:
        write_all(tmp_path / "model", tensors)
        write_all(Path(name) / "model", tensors)
        assert contents(Path(name) / "model") == contents(tmp_path / "model")


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([("a", [(2, 3)]), ("c", [(4,)])], r"unexpected tensor 'c'"),
        ([("a", [(2, 3)]), ("a", [(2, 3)])], r"tensor 'a' is written twice"),
        ([("a", [(2, 3)])], r"tensor 'b' is missing"),
        ([("a", [(1, 3)])], r"tensor 'a' has shape \(2, 3\), its blocks 1 rows instead of 2"),
        ([("a", [(1, 3), (2, 3)])], r"its blocks 3 rows instead of 2"),
        ([("a", [(2, 4)])], r"tensor 'a' has shape \(2, 3\), a block of it \(2, 4\)"),
        ([("a", [(3,)])], r"a block of it \(3,\)"),
        ([(["a", "b"], [(2, 3)])], r"tensors 'a' \(2, 3\) and 'b' \(4,\) differ in shape"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused_and_the_old_weights_stay(
    tmp_path: Path, calls: list[tuple[str | list[str], list[tuple[int, ...]]]], message: str
) -> None:
    write_all(tmp_path / "old", random_tensors(SHAPES))
    before = contents(tmp_path / "old")
    for directory in (tmp_path / "old", tmp_path / "new"):
        with (
            pytest.raises(ValueError, match=message),
            CheckpointWriter(directory, {"a": (2, 3), "b": (4,)}, torch.float32) as out,
        ):
            for names, shapes in calls:
                out.write(names, [torch.zeros(shape) for shape in shapes])
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_arrays_are_written_as_tensors_are(tmp_path: Path, dtype: str) -> None:
    array = np.random.default_rng(0).standard_normal((300, 7000))  # several buffers, and rows that end inside of one
    ways: dict[str, list[Any]] = {"array": [array[:50], array[50:]], "tensor": [torch.from_numpy(array)]}
    for name, blocks in ways.items():
        with CheckpointWriter(tmp_path / name, {"a": array.shape}, dtype) as out:
            out.write("a", blocks)
    first, second = (tmp_path / name / SINGLE_FILE for name in ("array", "tensor"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("block", [torch.full((4, 5), 66000.0), np.full((4, 5), 66000.0)])
def test_numbers_beyond_float16_are_refused_by_name(tmp_path: Path, block: Any) -> None:
    with (
        pytest.raises(UserError, match="tensor 'a': one of its weights becomes 66000, float16 ends at 65504"),
        CheckpointWriter(tmp_path / "target", {"a": (4, 5)}, torch.float16) as out,
    ):
        out.write("a", [block])
    assert not (tmp_path / "target").exists()


def test_a_tensor_that_broke_off_halfway_is_missing_even_if_the_writer_continued(tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(1, 3)
        raise KeyError("source")

    with (
        pytest.raises(ValueError, match="tensor 'a' is missing"),
        CheckpointWriter(tmp_path / "new", {"a": (2, 3)}, torch.float32) as out,
        pytest.raises(KeyError),
    ):
        out.write("a", broken())
    assert not (tmp_path / "new").exists()


def test_only_bytes_of_the_same_shape_and_type_are_copied(tmp_path: Path) -> None:
    write_all(tmp_path / "source", random_tensors(SHAPES))
    with (
        RawReader(tmp_path / "source") as source,
        pytest.raises(ValueError, match=r"tensor 'a' is F16 \(512,\), 'norm' of the source F32 \(512,\)"),
        CheckpointWriter(tmp_path / "target", {"a": (512,)}, torch.float16) as out,
    ):
        out.copy("a", source, "norm")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_no_numbers_are_not_copied(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = random_tensors(SHAPES, dtype)
    tensors["head"][650, 17] = value
    write_all(tmp_path / "source", tensors)
    with (
        RawReader(tmp_path / "source") as source,
        pytest.raises(UserError) as caught,
        CheckpointWriter(tmp_path / "target", {"head": SHAPES["head"]}, dtype) as out,
    ):
        out.copy("head", source, "head")
    start = f"{tmp_path / 'source' / SINGLE_FILE}: tensor 'head' (700, 300) is infinite or no number at element "
    assert str(caught.value).startswith(f"{start}{650 * 300 + 17}; ")
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_cut_while_it_is_read_is_refused_by_name(tmp_path: Path) -> None:
    write_all(tmp_path / "source", random_tensors(SHAPES))
    path = tmp_path / "source" / SINGLE_FILE
    with (
        RawReader(tmp_path / "source") as source,
        pytest.raises(UserError, match=f"{re.escape(str(path))}: tensor 'odd' ends at byte"),
        CheckpointWriter(tmp_path / "target", {"odd": SHAPES["odd"]}, torch.float32) as out,
    ):
        os.truncate(path, path.stat().st_size - 5000)
        out.copy("odd", source, "odd")
    assert not (tmp_path / "target").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    target = tmp_path / "target"
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError) as caught, CheckpointWriter(target, {"a": (free, 10)}, torch.bfloat16):
        pass
    number = r"[\d.]+ [kMGT]B"
    expected = f"{re.escape(str(target))}: needs {number}, {number} are free; free {number} or name a directory"
    assert re.match(expected, str(caught.value))
    assert not target.exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota"), (errno.EIO, "cannot be writ")],
)
def test_a_disk_that_becomes_full_leaves_the_old_weights_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    write_all(tmp_path / "model", random_tensors(SHAPES))
    before = contents(tmp_path / "model")
    pwrite, room = os.pwrite, [20 * 2**20]

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        if room[0] < len(data):
            raise OSError(number, os.strerror(number))
        room[0] -= len(data)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    shapes = {f"tensor.{index}": (1024, 1024) for index in range(40)}
    with pytest.raises(UserError) as caught, CheckpointWriter(tmp_path / "model", shapes, torch.float32, 10**7) as out:
        for name in shapes:
            out.write(name, [torch.zeros(1024, 1024)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "model") == before


SMALL_DISK = """
import os, sys
from pathlib import Path
import torch
from aquilamoe.config.messages import UserError
from aquilamoe.checkpoint.writer import CheckpointWriter
target = Path(sys.argv[1], "model")
try:
    with CheckpointWriter(target, {"a": (1000, 1000), "b": (1000, 1000)}, "F32") as out:
        Path(sys.argv[1], "other").write_bytes(bytes(6_000_000))
        out.write("a", [torch.zeros(1000, 1000)])
        out.write("b", [torch.zeros(1000, 1000)])
except UserError as error:
    print(error, target.exists())
"""


def test_a_real_disk_that_another_process_fills_midway_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=10m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted on this machine")
    script = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, SMALL_DISK], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert re.match(rf"{re.escape(str(tmp_path))}/model/\S+: the disk is full: .*B are free.* False\n$", done.stdout)


def test_a_file_that_may_not_become_so_large_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    code = SMALL_DISK.replace("write_bytes(bytes(6_000_000))", "touch()")
    code = code.replace("1000, 1000", "2000, 2000")
    limited = ["sh", "-c", 'ulimit -f 9000 && exec "$0" "$@"', sys.executable]  # blocks of 512 or 1024 bytes
    done = subprocess.run([*limited, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "the file may not become that large" in done.stdout
    assert done.stdout.endswith("False\n")


KILLS = 5
FOREVER = """
import sys
from pathlib import Path
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.writer import CheckpointWriter
source = RawReader(Path("source"))
shapes = {f"{name}.{copy}": source.shape(name) for name in source.names for copy in range(4)}
while True:
    with CheckpointWriter(Path("target"), shapes, "F32", 3_000_000) as out:
        for name in source.names:
            out.copy([f"{name}.{copy}" for copy in range(4)], source, name)
    print("once", flush=True)
"""


def test_a_kill_at_any_moment_leaves_no_file_half_written_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES)
    write_all(tmp_path / "source", tensors)
    draw, seen = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", FOREVER], cwd=tmp_path, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in (tmp_path / "target").glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert torch.equal(tensor, tensors[name.partition(".")[0]])
                seen += 1
    assert seen >= KILLS * 4
    write_all(tmp_path / "target", tensors)
    assert [path.name for path in (tmp_path / "target").iterdir()] == [SINGLE_FILE]


MEMORY = """
import json, re
from pathlib import Path
entries, end = {}, 0
for index in range(12):
    entries[str(index)] = {"dtype": "BF16", "shape": [2500, 4000], "data_offsets": [end, end + 20_000_000]}
    end += 20_000_000
text = json.dumps(entries).encode()
Path("source").mkdir()
with open("source/model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.writer import CheckpointWriter
shapes = {name: (2500, 4000) for name in entries}
with RawReader(Path("source")) as source, CheckpointWriter(Path("target"), shapes, "BF16") as out:
    for name in source.names:
        out.copy(name, source, name)
print(peak())
del source, out  # or its buffers would count twice
from aquilamoe.checkpoint.reader import Reader
with Reader(Path("source")) as source, CheckpointWriter(Path("target"), shapes, "BF16") as out:
    for name in source.names:
        out.write(name, (source.rows(name, row, row + 500) for row in range(0, 2500, 500)))
        source.release(name)
print(peak())
"""


@pytest.mark.process
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "target")
    copying, converting = map(int, done.stdout.split())
    assert copying < 128 * 2**20  # of 240 MB
    assert converting < 256 * 2**20 + 2 * 20_000_000  # torch itself is most of it
