"""A run leaves nothing in the folder for temporary files, and works wherever that is and for every user."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.process import temporary
from aquilamoe.training import sessions
from aquilamoe.training.ray import session, worker_pool

pytestmark = pytest.mark.process

LITTER = """
import os, sys, tempfile
from multiprocessing import util
from pathlib import Path
from aquilamoe.process import temporary

temporary.use()
before = os.environ["RAY_TMPDIR"]
folder = Path(tempfile.mkdtemp())
assert folder.parent.parent == Path(before) and Path(util.get_temp_dir()).parent == folder.parent
if sys.argv[1] == "interrupted":
    raise KeyboardInterrupt
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


def run(code: str, *words: str, prefix: tuple[str, ...] = (), **changes: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in (os.environ | changes).items() if value}
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("how", ["ended", "interrupted"])
def test_what_libraries_leave_behind_goes_with_the_process(how: str, tmp_path: Path) -> None:
    (tmp_path / "of others").touch()
    completed = run(LITTER, how, TMPDIR=str(tmp_path))
    assert "AssertionError" not in completed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["of others"]


def test_what_a_killed_run_left_is_removed_by_the_next_and_nothing_of_others(tmp_path: Path) -> None:
    run(LITTER, "killed", TMPDIR=str(tmp_path))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(temporary.PREFIX)
    held, foreign = tmp_path / f"{temporary.PREFIX}held", tmp_path / f"{temporary.PREFIX}foreign"
    for folder in (held, foreign):
        folder.mkdir()
    with (held / temporary.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(LITTER, "ended", TMPDIR=str(tmp_path))
    assert sorted(tmp_path.iterdir()) == [foreign, held]


def test_a_path_too_long_for_sockets_is_replaced_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / ("x" * temporary.SHORT)))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(temporary, "ELSEWHERE", (tmp_path / "nowhere", tmp_path))
    assert temporary.for_sockets() == tmp_path == Path(os.environ["TMPDIR"])
    monkeypatch.setattr(temporary, "ELSEWHERE", (tmp_path / "nowhere",))
    with pytest.raises(UserError, match=r"^TMPDIR: .* bytes, sockets in it allow \d+, .*; set TMPDIR"):
        temporary.for_sockets()


SESSION = """
import sys
from aquilamoe.process import temporary
from aquilamoe.training import example; from aquilamoe.training.ray import session

temporary.name_user()
session.start_session(example.cluster(executor="ray"))
import ray
print(ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()), session.sessions._started[0])
"""


def test_rays_session_starts_for_a_nameless_user_with_a_long_path_and_leaves_nothing(tmp_path: Path) -> None:
    nameless = ("unshare", "--map-user=12345")
    if subprocess.run([*nameless, "true"], capture_output=True).returncode:
        pytest.skip("this machine has no other user")
    long = tmp_path / ("x" * 40)
    long.mkdir()
    nameless_environment = dict.fromkeys(("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "RAY_TMPDIR"), "")
    completed = run(SESSION, prefix=nameless, TMPDIR=str(long), **nameless_environment)
    assert completed.returncode == 0, completed.stderr
    seven, _, folder = completed.stdout.strip().partition(" ")
    assert seven == "7" and folder.startswith(str(temporary.ELSEWHERE[0])) and not Path(folder).exists()


# Ray's message when it ends a worker for memory; abridged from ray 2.60.
NO_MEMORY = """Task was killed due to the node running low on memory.
1 worker(s) were killed due to the node running low on memory. Workers (tasks / actors) killed due to memory pressure:
Memory on the node (IP: 10.0.0.7, ID: 4f) was 7.61GB used / 8.00GB limit (0.951250)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io
PID\tMEM(GB)\tCOMMAND
17\t5.10\tray::RayTrainWorker"""


class LostError(Exception):
    """As Ray Train reports a worker that died."""

    def __init__(self, text: str) -> None:
        self.health_check_failure = RuntimeError(text)


def test_a_worker_ended_for_memory_is_one_line_with_what_was_used_and_what_to_reduce() -> None:
    line = str(worker_pool.cause("small", 2, {1: LostError(NO_MEMORY)}))
    assert line == (
        "stage small: worker 1, restarted 2 times (cluster.max_failures), was ended for memory: 7.61 of 8.00 GB of the "
        "machine were in use; reduce cluster.micro_batch_tokens or cluster.workers, or end other programs; "
        "the same command resumes from the last checkpoint"
    )


def test_any_other_error_of_rays_is_one_line_that_names_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_started", [tmp_path])
    monkeypatch.setattr(sessions, "_kept", set())
    line = str(sessions.lost("small", "the crew", RuntimeError("The actor\ndied " + "x" * 1000)))
    assert line.startswith("stage small: the crew was lost (The actor died x") and "\n" not in line
    assert line.endswith(f"; see {tmp_path}/logs; the same command resumes from the last checkpoint")
    assert sessions._kept == {tmp_path}


def test_a_session_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised, sessions.removed_at_exit(tmp_path):
        (tmp_path / "session_x").mkdir()
        raise RuntimeError("Failed to start\nGCS")
    assert str(raised.value) == (
        f"Ray: no session starts on this machine (Failed to start GCS); see {tmp_path}/session_x/logs, and run again"
    )


def test_a_session_without_its_server_is_one_line_and_not_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import worker

    class Node:
        def dead_processes(self) -> list[tuple[str, object]]:
            return [("dashboard", None), ("gcs_server", None)]

    monkeypatch.setattr(sessions, "_started", [tmp_path])
    monkeypatch.setattr(sessions, "_kept", set())
    monkeypatch.setattr(worker, "_global_node", Node())
    with pytest.raises(UserError, match=f"^Ray: its process gcs_server has ended, .*; see {tmp_path}/logs; the same "):
        session.check_session()
