import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.checkpoint_sync import CheckpointSync, newest, place_of
from aquilamoe.pipeline.cost import Rates
from aquilamoe.pipeline.records import seal
from aquilamoe.pipeline.remote import Remote, UnwantedError
from aquilamoe.pipeline.store import RECORD, Store
from stage_records import stage_record
from waiting import until

pytestmark = pytest.mark.process

FILES = {"model/a.safetensors": os.urandom(70_000), "model/config.json": b"{}", "metrics.jsonl": b'{"step": 1}\n'}
PRINT = "0123456789ab"


def published(root: Path, remote: Remote) -> tuple[Store, Path, dict[str, Any]]:
    """A store with one complete output."""
    store = Store(root, remote)
    partial = store.partial("prepare", PRINT)
    for name, content in FILES.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    record = store.publish(partial, stage_record(fingerprint=PRINT))
    return store, store.directory("prepare", PRINT), record


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket of an S3 server on this machine."""
    pytest.importorskip("moto", reason="pip install -c constraints.txt 'moto[server]' (an S3 server)")
    folder = tmp_path_factory.mktemp("s3")
    (folder / "serve.py").write_text(SERVE)
    words = [sys.executable, "serve.py"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield f"s3://bucket/prefix?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        finally:
            process.kill()


SERVE = """
import os, threading, time, urllib.request
from moto.server import ThreadedMotoServer
parent = os.getppid()
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
_, port = server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"))
print(port, flush=True)
while os.getppid() == parent:
    time.sleep(0.2)
os._exit(0)
"""


@pytest.fixture(params=["directory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Storage that two stores share; every test has a place of its own."""
    if request.param == "directory":
        return Remote(str(tmp_path / "shared"))
    address = request.getfixturevalue("s3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Remote(address.replace("prefix", tmp_path.name))


def test_what_one_store_publishes_another_fetches_byte_for_byte(remote: Remote, tmp_path: Path) -> None:
    store, directory, record = published(tmp_path / "a", remote)
    store.push(directory, record)
    store.push(directory, record)  # it is there: nothing to do
    other = Store(tmp_path / "b", remote)
    # Under another name: a recipe is one output, whatever its stage is called.
    found = other.fetch("first", PRINT)
    assert found is not None
    assert found[0] == other.directory("first", PRINT)
    assert found[1] == record
    assert content(found[0]) == content(directory)
    assert other.find("first", PRINT) == found
    assert other.fetch("first", "ffffffffffff") is None
    assert [path.name for path in other.stages.iterdir()] == [f"first-{PRINT}"]


def test_an_output_without_a_whole_record_is_not_there_and_is_copied_again(remote: Remote, tmp_path: Path) -> None:
    store, directory, record = published(tmp_path / "a", remote)
    files, root = remote._open()
    target = f"{root}/stages/{directory.name}"
    for half in (None, b"", (directory / RECORD).read_bytes()[:40]):
        files.create_dir(f"{target}/model")
        with files.open_output_stream(f"{target}/model/a.safetensors") as out:
            out.write(b"half")
        if half is not None:
            with files.open_output_stream(f"{target}/{RECORD}") as out:
                out.write(half)
        assert Store(tmp_path / "b", remote).fetch("prepare", PRINT) is None
    store.push(directory, record)
    found = Store(tmp_path / "b", remote).fetch("prepare", PRINT)
    assert found is not None
    assert content(found[0]) == content(directory)


def test_a_byte_that_changed_over_there_is_found_and_nothing_is_served(remote: Remote, tmp_path: Path) -> None:
    store, directory, record = published(tmp_path / "a", remote)
    store.push(directory, record)
    files, root = remote._open()
    changed = bytearray(FILES["model/a.safetensors"])
    changed[4] ^= 1
    with files.open_output_stream(f"{root}/stages/{directory.name}/model/a.safetensors") as out:
        out.write(bytes(changed))
    other = Store(tmp_path / "b", remote)
    with pytest.raises(UserError, match=r"a.safetensors has SHA-256 [0-9a-f]{64}, its record states") as caught:
        other.fetch("prepare", PRINT)
    assert "\n" not in str(caught.value)
    assert other.find("prepare", PRINT) is None
    assert other.history() == []


# Copies in blocks of a part of a file, and waits before the n-th one.
PUSH = """
import sys, threading, time
from pathlib import Path
from aquilamoe.pipeline import remote
from aquilamoe.pipeline.store import Store
store = Store(Path(sys.argv[1]), remote.Remote(sys.argv[2]))
directory, record = store.find("prepare", sys.argv[3])
left, lock, chunks = int(sys.argv[4]), threading.Lock(), remote._chunks

def held(stream):
    global left
    for chunk in chunks(stream):
        with lock:
            left -= 1
            if left == 0:
                print("waits", flush=True)
                time.sleep(600)
        yield chunk

remote.CHUNK_BYTES, remote.COPIES_AT_ONCE, remote._chunks = 4096, 1, held
store.push(directory, record)
"""


def test_a_push_that_is_killed_leaves_nothing_that_is_served_and_is_done_by_the_next(
    remote: Remote, tmp_path: Path
) -> None:
    store, directory, record = published(tmp_path / "a", remote)
    blocks = sum(-(-len(data) // 4096) for data in FILES.values())
    for at in (1, blocks // 2, blocks + 1):  # the last one is the record's
        words = [sys.executable, "-c", PUSH, str(tmp_path / "a"), remote.address, PRINT, str(at)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"waits\n"
            process.send_signal(signal.SIGKILL)
        assert Store(tmp_path / f"b{at}", remote).fetch("prepare", PRINT) is None
    store.push(directory, record)
    found = Store(tmp_path / "c", remote).fetch("prepare", PRINT)
    assert found is not None
    assert content(found[0]) == content(directory)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "model/../../outside"])
def test_a_record_from_elsewhere_that_leads_out_of_its_directory_is_none(name: str, tmp_path: Path) -> None:
    remote = Remote(str(tmp_path / "shared"))
    store, directory, record = published(tmp_path / "a", remote)
    store.push(directory, record)
    path = tmp_path / "shared" / "stages" / directory.name / RECORD
    path.write_text(seal({**record, "files": {name: {"sha256": "0", "bytes": 1}}}))
    assert Store(tmp_path / "b", remote).fetch("prepare", PRINT) is None  # as one whose writing was cut short
    assert not (tmp_path / "b" / "stages" / "outside").exists()


def test_an_interrupted_fetch_starts_over(tmp_path: Path) -> None:
    remote = Remote(str(tmp_path / "shared"))
    store, directory, record = published(tmp_path / "a", remote)
    store.push(directory, record)
    other = Store(tmp_path / "b", remote)
    left = other.stages / f"prepare-{PRINT}.fetched.partial"
    left.mkdir(parents=True)
    (left / "garbage").write_text("of a fetch that was killed")
    found = other.fetch("prepare", PRINT)
    assert found is not None
    assert content(found[0]) == content(directory)


def test_storage_that_does_not_respond_and_keys_in_an_address_are_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="holds a key; leave it out"):
        Remote("s3://key:secret@bucket/prefix")
    with pytest.raises(UserError, match="holds a key; leave it out"):
        Remote("s3://bucket/prefix?secret_key=x")
    (tmp_path / "shared").write_text("a file where a directory is expected")
    store, directory, record = published(tmp_path / "a", Remote(str(tmp_path / "shared")))
    with pytest.raises(UserError, match=f"cannot write prepare-{PRINT}") as caught:
        store.push(directory, record)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path / "a", Remote("nonsense://x")).fetch("prepare", PRINT)


# Checkpoints of a stage in progress


def in_progress(root: Path, remote: Remote, *steps: int) -> CheckpointSync:
    """A stage that was started once and has left these checkpoints and its points."""
    partial = Store(root).partial("prepare", PRINT)
    folder = partial / "checkpoints"
    (folder / ".step-000000099").mkdir(parents=True, exist_ok=True)  # one that is being written
    attempts = Attempts(root, f"prepare-{PRINT}")
    attempts.begin(Rates(1, 0.0, 0.0))
    (partial / "metrics.jsonl").write_text(f'{{"step": {steps[-1]}}}\n')
    for step in steps:  # last: an observer takes what is there when a checkpoint gets its name
        hidden = folder / f".step-{step:09d}"
        (hidden / "model").mkdir(parents=True)
        (hidden / "model" / "a.safetensors").write_bytes(os.urandom(1000 + step))
        hidden.rename(folder / hidden.name[1:])
    return CheckpointSync(remote, partial, PRINT, attempts)


def empty(root: Path, remote: Remote) -> CheckpointSync:
    """The same stage where it has never run."""
    return CheckpointSync(remote, Store(root).partial("prepare", PRINT), PRINT, Attempts(root, f"prepare-{PRINT}"))


def test_the_newest_checkpoint_is_copied_while_a_stage_runs_and_another_machine_goes_on_from_it(
    remote: Remote, tmp_path: Path
) -> None:
    here, there = in_progress(tmp_path / "a", remote, 10, 20), empty(tmp_path / "b", remote)
    with here.follow():
        for step in (20, 30):
            until(lambda name=f"step-{step:09d}": newest(remote, PRINT) == name)  # type: ignore[misc]
            if step == 20:
                in_progress(tmp_path / "a", remote, 30)
    assert [name for name, _ in remote.saved(place_of(PRINT))] == ["step-000000030"]  # those before it went
    before = time.time()
    there.fetch()
    local = content(here.partial)
    kept = {name: data for name, data in local.items() if "/step-00000001" not in name and "/step-00000002" not in name}
    assert content(there.partial) == kept
    assert there.attempts.read() == here.attempts.read()
    # Copied with the checkpoint, which is as old as the time at which it came.
    assert before - 1 <= (there.attempts.last_alive() or 0) <= time.time() + 1
    there.forget()
    there.forget()
    assert newest(remote, PRINT) is None


def test_a_checkpoint_that_is_here_is_not_replaced_and_a_damaged_or_half_one_is_not_taken(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, root = remote._open()
    here, there = in_progress(tmp_path / "a", remote, 10), empty(tmp_path / "b", remote)
    checkpoint = here.partial / "checkpoints" / "step-000000010"
    with pytest.raises(UnwantedError):
        remote.save(f"{place_of(PRINT)}/step-000000010", {"a": checkpoint / "model" / "a.safetensors"}, lambda: False)
    assert newest(remote, PRINT) is None
    there.fetch()
    assert not there.partial.exists()
    here.copy(checkpoint)
    before = content(here.partial)
    (here.partial / "metrics.jsonl").write_text("later\n")
    here.fetch()
    assert content(here.partial) == {**before, "metrics.jsonl": b"later\n"}
    with files.open_output_stream(f"{root}/{place_of(PRINT)}/step-000000010/metrics.jsonl") as out:
        out.write(b"other")
    there.fetch()
    assert not there.partial.exists()
    assert "is passed over" in caplog.text


def test_storage_that_fails_does_not_stop_a_stage_and_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").write_text("a file where a directory is expected")
    here = in_progress(tmp_path / "a", Remote(str(tmp_path / "shared")), 10)
    monkeypatch.setattr("aquilamoe.pipeline.checkpoint_sync.POLL_S", 0.01)
    tried, copy = list[Path](), here.copy

    def counting(checkpoint: Path) -> None:
        tried.append(checkpoint)
        copy(checkpoint)

    monkeypatch.setattr(here, "copy", counting)
    with here.follow():
        until(lambda: len(tried) > 2)
    assert caplog.text.count("training goes on") == 1


def test_checkpoints_that_cannot_be_removed_do_not_fail_the_stage_that_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Remote(str(tmp_path / "shared"))
    here = in_progress(tmp_path / "a", remote, 10)
    here.copy(here.partial / "checkpoints" / "step-000000010")
    place = tmp_path / "shared" / here.place
    place.rename(tmp_path / "elsewhere")
    place.write_text("a file where a directory is expected")
    here.forget()
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"cannot remove {here.place}" in line and "stays there; the stage is finished" in line


def test_a_training_that_was_killed_goes_on_on_another_machine_and_ends_with_the_same_bytes(
    s3: str,
    tmp_path: Path,
    tiny: list[str],
    command: Callable[..., Any],
    ambush: Callable[[str, str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    keys["AWS_EC2_METADATA_DISABLED"] = "true"
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    only = [
        f"stages.{name}=null" for name in ("scale_up", "dense", "scale_out", "moe", "control", "evaluate", "export")
    ]
    words = [*tiny, *only, "report={chain: [], control: null}", "tracking.enabled=false"]
    words += ["stages.prepare.total_tokens=24576", "stages.prepare.validate_every_tokens=12288"]
    words += ["cluster.checkpoint_every_tokens=8192", f"paths.remote='{s3.replace('prefix', tmp_path.name)}'"]
    workflow = Path(__file__).parents[2] / "workflows" / "efficientscale.py"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    remote = Remote(s3.replace("prefix", tmp_path.name))
    # It trains no further than to its second checkpoint, however fast it is: the first has all time to be copied.
    held = os.environ | ambush(r"prepare-\w+\.partial/checkpoints/.*step-0*64\b", str(tmp_path / "held"))
    with subprocess.Popen([sys.executable, workflow, *words], cwd=tmp_path / "a", env=held) as process:
        try:
            saved = until(lambda: progress_of(remote), process)
        finally:
            process.kill()
    assert saved == ["step-000000032"]
    plan = command(*words, "action=plan", cwd=tmp_path / "b", **keys)
    assert "to fetch" in plan.stdout and f"from {saved[0]}" in " ".join(plan.stdout.split())
    for folder in ("b", "a"):
        completed = command(*words, cwd=tmp_path / folder, **keys)
        assert completed.returncode == 0, completed.stderr
    (here,), (there,) = ((tmp_path / folder / "runs" / "stages").glob("prepare-*[!l]") for folder in "ab")
    assert content(here / "model") == content(there / "model")
    assert content(here / "training") == content(there / "training")
    assert json.loads((there / RECORD).read_text())["cost"]["attempts"] == 2
    assert progress_of(remote) == []


def progress_of(remote: Remote) -> list[str]:
    """The checkpoints of the one stage in progress that the remote has."""
    from pyarrow import fs

    files, root = remote._open()
    found = files.get_file_info(fs.FileSelector(f"{root}/progress", allow_not_found=True))
    return [name for stage in found for name, _ in remote.saved(place_of(stage.base_name))]
