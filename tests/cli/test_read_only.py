"""A complete store on a read-only disk: everything that reads works, and reports what it could not write."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import commands
from aquilamoe.config.messages import UserError


@pytest.fixture
def root(finished_store: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished experiment, mounted so that the kernel refuses every write, also of a superuser."""
    root = tmp_path / "runs"
    shutil.copytree(finished_store, root)
    for words in (["--bind", str(root), str(root)], ["-o", "remount,bind,ro", str(root)]):
        if subprocess.run(["mount", *words], capture_output=True).returncode:
            subprocess.run(["umount", str(root)], capture_output=True)
            pytest.skip("mounting needs rights that this user does not have")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_run_that_finds_all_complete_works_where_nothing_can_be_written(
    root: Path,
    tiny: list[str],
    compose: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*tiny, f"paths.root={root}"]
    for action in ("run", "plan", "status", "verify"):
        commands.execute(compose(*words, f"action={action}"), "another command than the one that wrote the report")
    shown = capsys.readouterr().out
    assert "Done in " in shown
    with pytest.raises((UserError, OSError)):
        commands.execute(compose(*words, "stages.export.dtype=bfloat16"), "")
