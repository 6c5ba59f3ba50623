"""Whatever the operating system refuses is one line and status 1, and the same command ends with the same bytes."""

import builtins
import errno
import io
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import commands
from aquilamoe.format import size
from aquilamoe.pipeline.store import RECORD
from aquilamoe.process import ending, errors, interruption, standard_output
from aquilamoe.process.errors import described

pytestmark = pytest.mark.process

WORKFLOW = Path(__file__).parents[2] / "workflows" / "efficientscale.py"
LATER = ("scale_up", "dense", "scale_out", "moe", "control", "evaluate", "export")
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)


@pytest.fixture(scope="module")
def short(tiny: list[str]) -> list[str]:
    """The tiny experiment as far as its first model, without tracking."""
    kept = [word for word in tiny if not word.startswith(tuple(f"stages.{stage}." for stage in LATER))]
    kept += [f"stages.{stage}=null" for stage in LATER]
    return [*kept, "report={chain: [], control: null}", "tracking.enabled=false", "stages.prepare.total_tokens=2048"]


@pytest.fixture(scope="module")
def data_only(short: list[str]) -> list[str]:
    """Its data, which is ready before a process has imported torch."""
    return [*(word for word in short if not word.startswith("stages.prepare.")), "stages.prepare=null"]


@pytest.mark.parametrize("number", [*NUMBERS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOMEM, errno.EPIPE])
def test_every_error_of_the_system_is_one_line_with_its_path_and_a_remedy(number: int) -> None:
    line = described(OSError(number, os.strerror(number), "/some/where"))
    assert line is not None and "\n" not in line
    assert line.startswith(f"/some/where: {os.strerror(number)}") and "; " in line


def test_what_libraries_make_of_an_error_of_the_system_is_that_error() -> None:
    class SafetensorError(Exception):
        pass

    texts = ("I/O error: No space left on device (os error 28)", "[Errno 28] Error writing bytes", "errno: 28")
    wrapped: list[Exception] = [SafetensorError(text) for text in texts]
    wrapped += [sqlite3.OperationalError("database or disk is full"), RuntimeError("write: No space left on device")]
    wrapped += [ExceptionGroup("tasks", [OSError(errno.ENOSPC, "full")]), RuntimeError("worker failed")]
    wrapped[-1].__cause__ = OSError(errno.ENOSPC, "full")
    for error in wrapped:
        found = errors.of_system(error)
        assert found is not None and found.errno == errno.ENOSPC
    assert [errors.of_system(error) for error in (KeyError("x"), ValueError("28 things"), None)] == [None] * 3
    assert described(AssertionError("ours")) is None and described(MemoryError()) is not None


def test_a_full_disk_is_named_with_what_is_free_there(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, errors.at(tmp_path / "not there yet"):
        raise OSError(errno.ENOSPC, "No space left on device")
    line = described(raised.value)
    assert line is not None
    assert re.match(rf"{tmp_path}/not there yet: No space left on device, [\d.]+ \w+ are free; make room", line)


def test_a_link_to_nothing_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(OSError) as raised:
        (tmp_path / "link").mkdir()
    assert described(raised.value) == (
        f"{tmp_path}/link: is a link to gone, which does not exist; move what is there, or name another place"
    )


def test_sizes_have_the_unit_that_fits() -> None:
    assert [size(value) for value in (0, 999, 999_600, 2_940_000, 1.3e15)] == [
        *("0 B", "999 B", "1 MB", "2.94 MB", "1,300 TB"),
    ]


# A pipeline in this process, in which one write fails


class Writes:
    """Counts what changes files below a folder, and has the n-th such call fail. 0: none."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.count, self.fails_at, self.number = root, 0, 0, 0
        self.path_of: dict[int, str] = {}
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "truncate"):
            patch.setattr(os, name, self._by_path(getattr(os, name)))
        for name in ("write", "pwrite", "fsync", "fdatasync", "ftruncate"):
            patch.setattr(os, name, self._by_descriptor(getattr(os, name)))
        for module in (io, builtins):
            patch.setattr(module, "open", self._opened(io.open))

    def _now(self, *path: str) -> None:
        self.count += 1
        if self.count == self.fails_at:
            raise OSError(self.number, os.strerror(self.number), *path)

    def _by_path(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if str(path).startswith(str(self.root)):
                self._now(str(path))
            return call(path, *arguments, **keywords)

        return called

    def _by_descriptor(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(descriptor: int, *arguments: Any) -> Any:
            if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(str(self.root)):
                self._now()
            return call(descriptor, *arguments)

        return called

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            if str(file).startswith(str(self.root)) and set(mode) & set("wax+"):
                self._now(str(file))
            return call(file, mode, *arguments, **keywords)

        return called


@contextmanager
def as_a_program(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `in_one_line` does, without what it does to this process."""
    patch.setattr(interruption, "handle", lambda: None)
    patch.setattr(standard_output, "guard", lambda: None)
    with ending.in_one_line():
        yield


def outcome(root: Path) -> dict[str, bytes]:
    """All that has been computed; curves have times in them, and records of theirs."""
    stages = (path for path in (root / "stages").rglob("*") if path.is_file())
    kept = {str(path.relative_to(root)): path for path in stages if path.name not in (RECORD, "metrics.jsonl")}
    return {name: path.read_bytes() for name, path in kept.items()}


def test_any_write_that_fails_is_one_line_and_the_rerun_ends_with_the_same_bytes(
    short: list[str], compose: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(root: Path, fails_at: int = 0, number: int = errno.ENOSPC) -> tuple[str | None, int]:
        with pytest.MonkeyPatch.context() as patch:
            writes = Writes(patch, root)
            writes.fails_at, writes.number = fails_at, number
            line = None
            try:
                with as_a_program(patch):
                    commands.execute(compose(*short, f"paths.root={root}"), "test")
            except SystemExit as ended:
                line = str(ended.code)
            return line, writes.count

    line, total = run(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert line is None and total > 50 and len(expected) > 5
    draw = random.Random(0)
    for fails_at in sorted(draw.sample(range(1, total + 1), 12)):
        root, number = tmp_path / str(fails_at), draw.choice(NUMBERS)
        line, _ = run(root, fails_at, number)
        if line is not None:  # what is only for observers may fail without harm
            assert re.fullmatch(r"error: .+: .+; .+", line), (fails_at, line)
        assert run(root)[0] is None
        assert outcome(root) == expected, fails_at
    assert "Traceback" not in "".join(capsys.readouterr())


# Processes of their own, on disks of their own


def on_a_small_disk(script: str, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script in which `disk OPTIONS` mounts a disk at the folder, for the script alone, and `run` runs."""
    mount = f'disk() {{ mount -t tmpfs -o $1 none {folder}; }}\nrun() {{ {sys.executable} {WORKFLOW} "$@"; }}\n'
    if subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} disk size=1m"], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted on this machine")
    command = ["unshare", "-rm", "bash", "-c", mount + script, "bash", *words, f"paths.root={folder}/runs"]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_full_disk_is_one_line_and_with_room_the_same_command_completes(data_only: list[str], tmp_path: Path) -> None:
    script = f"""
    disk size=60k
    run "$@" data.validation_fraction=0.02 || echo "status $?"
    mount -o remount,size=100m {tmp_path}
    run "$@" && echo complete
    """
    # What is needed is known before it starts; here another process takes it meanwhile.
    completed = on_a_small_disk(script, tmp_path, *data_only)
    assert completed.stderr.startswith(f"error: {tmp_path}/runs"), completed.stderr
    assert (
        completed.stderr.count("\n") == 1
        and "status 1\n" in completed.stdout
        and completed.stdout.endswith("complete\n")
    )


def test_a_run_that_finds_all_complete_works_on_a_disk_that_cannot_be_written(
    data_only: list[str], tmp_path: Path
) -> None:
    script = f"""
    disk size=100m
    run "$@" > /dev/null && mount -o remount,ro {tmp_path} && run "$@" tracking.enabled=true
    run "$@" stages.tokenizer.vocab_size=310 || echo "status $?"
    """
    completed = on_a_small_disk(script, tmp_path, *data_only)
    assert completed.stdout.count("cached") >= 3 and completed.stdout.endswith("status 1\n"), completed
    (line,) = completed.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/runs/.lock: Read-only file system; ")


@pytest.mark.parametrize(("redirection", "reason"), [("> /dev/full", "No space"), ("| head -c 1", "closed")])
def test_a_log_that_cannot_be_written_costs_nothing_that_is_computed(
    redirection: str, reason: str, data_only: list[str], tmp_path: Path
) -> None:
    script = f'set -o pipefail; {sys.executable} {WORKFLOW} "$@" {redirection}'
    words = ["bash", "-c", script, "bash", *data_only, f"paths.root={tmp_path}/runs"]
    completed = subprocess.run(words, capture_output=True, text=True)
    assert completed.returncode == 1
    (line,) = completed.stderr.splitlines()
    assert line.startswith("error: standard output: ") and reason in line
    assert list((tmp_path / "runs" / "stages").glob(f"tokens-*[!l]/{RECORD}"))


@pytest.mark.parametrize("action", ["plan", "run"])
@pytest.mark.parametrize("root", ["file", "file/below", "link", "a" * 300, "link/below", "/dev/null"])
def test_a_root_that_can_be_none_is_one_line(
    root: str,
    action: str,
    short: list[str],
    compose: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("gone")
    try:
        with as_a_program(monkeypatch):
            commands.execute(compose(*short, f"paths.root={root}", f"action={action}"), "test")
    except SystemExit as ended:
        assert str(ended.code).startswith("error: ") and "\n" not in str(ended.code)
    else:
        assert action == "plan"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_name_that_no_file_could_have_is_refused_before_anything_runs(
    compose: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ending.UserError, match=r"^name: .* should have at most 100 characters"):
        commands.execute(compose(f"name={'a' * 250}", f"paths.root={tmp_path}"), "test")
