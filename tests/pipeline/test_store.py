import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.files import take_lock, write_atomically
from aquilamoe.pipeline.store import METRICS, RECORD, SCRATCH, Store, read_points
from stage_records import stage_record

DIGEST = "0123456789ab"
HOLD = """
import sys, time
from pathlib import Path
from aquilamoe.pipeline.store import Store
with Store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def partial(store: Store) -> Path:
    """An unfinished output with files at two levels."""
    path = store.partial("prepare", DIGEST)
    (path / "model").mkdir(parents=True)
    (path / "model" / "weights.bin").write_bytes(b"w" * 1000)
    (path / METRICS).write_text('{"step": 1}\n')
    return path


def record_of(stage: str = "prepare", fingerprint: str = DIGEST, finished: str = "2026-01-01") -> dict[str, Any]:
    return stage_record(stage=stage, fingerprint=fingerprint, finished=finished)


def fail(*_: object) -> None:
    raise OSError("no space left on device")


def test_a_published_output_is_found_by_its_recipe(store: Store, partial: Path) -> None:
    record = store.publish(partial, record_of())
    assert store.find("prepare", DIGEST) == (store.directory("prepare", DIGEST), record)
    assert store.history("prepare") == [record]


def test_an_output_is_found_whatever_name_its_stage_had(store: Store, partial: Path) -> None:
    record = store.publish(partial, record_of())
    assert store.find("pretraining", DIGEST) == (store.directory("prepare", DIGEST), record)


def test_a_partial_output_is_never_served(store: Store, partial: Path) -> None:
    write_atomically(partial / RECORD, json.dumps(record_of()))
    assert store.find("prepare", DIGEST) is None
    assert store.history("prepare") == []


def test_a_record_lists_every_other_file_with_its_bytes_and_sha256(store: Store, partial: Path) -> None:
    files = store.publish(partial, record_of())["files"]
    out = store.directory("prepare", DIGEST)
    assert files == {
        name: {"sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(), "bytes": (out / name).stat().st_size}
        for name in ("model/weights.bin", METRICS)
    }
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"weights.bin", METRICS, RECORD}


@pytest.mark.parametrize("step", ["aquilamoe.pipeline.integrity.entry", "aquilamoe.files.sync_directory"])
def test_the_record_is_written_after_all_files_are_hashed_and_durable(
    step: str, store: Store, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no space"):
        store.publish(partial, record_of())
    assert not (partial / RECORD).exists()


def test_the_output_has_its_name_only_after_the_record_is_written(
    store: Store, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.files.write_atomically", fail)
    with pytest.raises(OSError, match="no space"):
        store.publish(partial, record_of())
    assert partial.exists()
    assert store.find("prepare", DIGEST) is None


def test_a_run_killed_between_record_and_name_is_published_by_the_next(
    store: Store, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (partial / SCRATCH).mkdir()
    with monkeypatch.context() as patches:
        patches.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no space"):
            store.publish(partial, record_of())
    record = store.finish_publishing(partial)
    assert record is not None
    assert store.find("prepare", DIGEST) == (store.directory("prepare", DIGEST), record)
    assert set(record["files"]) == {"model/weights.bin", METRICS}


def test_an_unfinished_output_is_not_published(store: Store, partial: Path) -> None:
    assert store.finish_publishing(partial) is None
    assert partial.exists()


def test_checkpoints_of_a_stage_stay_until_its_record_is_written_and_are_no_part_of_the_output(
    store: Store, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = partial / SCRATCH / "step-1" / "weights.bin"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")
    with monkeypatch.context() as patches:
        patches.setattr("aquilamoe.files.write_atomically", fail)
        with pytest.raises(OSError, match="no space"):
            store.publish(partial, record_of())
    assert checkpoint.exists()
    record = store.publish(partial, record_of())
    assert set(record["files"]) == {"model/weights.bin", METRICS}
    assert not (store.directory("prepare", DIGEST) / SCRATCH).exists()


def test_what_a_killed_run_left_of_its_record_is_no_part_of_the_output(store: Store, partial: Path) -> None:
    (partial / f".{RECORD}.tmp").write_text("{")
    assert set(store.publish(partial, record_of())["files"]) == {"model/weights.bin", METRICS}
    assert store.find("prepare", DIGEST) is not None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(Path.unlink, "is missing"), (lambda path: path.write_bytes(b"short"), "has 5 bytes")],
)
def test_an_output_that_lost_bytes_is_refused_with_what_to_remove(
    store: Store, partial: Path, damage: Callable[[Path], object], problem: str
) -> None:
    store.publish(partial, record_of())
    out = store.directory("prepare", DIGEST)
    damage(out / "model" / "weights.bin")
    with pytest.raises(UserError) as caught:
        store.find("prepare", DIGEST)
    assert str(caught.value) == (
        f"{out}/model/weights.bin: {problem}, its record states 1000 bytes; remove {out} and run again to rebuild it"
    )


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_an_output_without_a_readable_record_is_refused_with_what_to_remove(
    store: Store, partial: Path, damage: Callable[[Path], object]
) -> None:
    store.publish(partial, record_of())
    out = store.directory("prepare", DIGEST)
    damage(out / RECORD)
    with pytest.raises(UserError) as caught:
        store.find("prepare", DIGEST)
    assert str(caught.value).startswith((f"{out}/{RECORD}: cannot be read (", f"{out}/{RECORD}: is missing"))
    assert str(caught.value).endswith(f"remove {out} and run again to rebuild it")


def test_history_is_of_one_stage_newest_first_and_not_of_those_whose_names_begin_alike(store: Store) -> None:
    for stage, fingerprint, finished in [
        ("dense", "a" * 12, "2026-01-01"),
        ("dense", "b" * 12, "2026-01-03"),
        ("dense-2", "c" * 12, "2026-01-02"),
    ]:
        path = store.partial(stage, fingerprint)
        path.mkdir(parents=True)
        store.publish(path, record_of(stage, fingerprint, finished))
    assert [record["fingerprint"][0] for record in store.history("dense")] == ["b", "a"]
    assert [record["fingerprint"][0] for record in store.history()] == ["b", "c", "a"]


def test_discarding_what_is_not_there_is_no_error(store: Store, partial: Path) -> None:
    store.discard(partial)
    store.discard(partial)
    assert not partial.exists()


@contextmanager
def holding(root: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another driver: a process that holds the lock of a store."""
    driver = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        yield driver
    finally:
        driver.kill()
        driver.wait()
        assert driver.stdout is not None
        driver.stdout.close()


def test_a_second_driver_learns_in_one_line_who_holds_the_store(store: Store) -> None:
    with holding(store.root) as other:
        with pytest.raises(UserError) as caught, store.lock():
            pass
        line = str(caught.value)
        assert line.startswith(f"{store.root}: in use by process {other.pid} since 20")
        assert line.endswith("; wait for it, or give this run a directory of its own with paths.root=DIR")
        assert "\n" not in line
        holder = store.holder()
        assert holder is not None
        assert holder.startswith(f"process {other.pid} since ")


def test_a_driver_that_is_killed_lets_go_of_the_store(store: Store) -> None:
    with holding(store.root) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert store.holder() is None
        with store.lock():
            assert "since" in (store.root / ".lock").read_text()


def test_a_lock_is_free_again_after_an_error(store: Store) -> None:
    with pytest.raises(KeyError), store.lock():
        raise KeyError
    assert store.holder() is None
    with store.lock():
        pass


def test_reading_the_holder_does_not_turn_a_driver_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.lock():
        pass
    reader = (store.root / ".lock").open()
    assert take_lock(reader, 0)
    monkeypatch.setattr(time, "sleep", lambda _: reader.close())
    with store.lock():
        pass


def test_two_processes_that_look_for_the_holder_do_not_take_each_other_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.stages.mkdir(parents=True)
    (store.root / ".lock").write_text("process 1 since 2026-01-01 00:00:00, which was killed")
    reader = (store.root / ".lock").open()
    assert take_lock(reader, 0)
    monkeypatch.setattr(time, "sleep", lambda _: reader.close())
    assert store.holder() is None


def test_the_holder_is_found_through_a_lock_file_that_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.lock():
        monkeypatch.setattr("os.access", lambda *_: False)
        holder = store.holder()
        assert holder is not None and holder.startswith("process ")
    assert store.holder() is None


def test_a_file_system_without_locks_has_no_holder_and_no_driver(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.lock():
        pass

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert store.holder() is None
    with pytest.raises(OSError, match="No locks available"), store.lock():
        pass


def test_a_store_that_does_not_exist_has_no_holder_no_history_and_is_not_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    assert (store.holder(), store.history(), store.find("prepare", DIGEST)) == (None, [], None)
    assert not (tmp_path / "runs").exists()


def test_points_are_read_without_a_half_written_last_line(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert read_points(tmp_path / METRICS) == [{"step": 1}, {"step": 2}]


def test_a_file_of_points_that_is_not_there_yet_has_none(tmp_path: Path) -> None:
    assert read_points(tmp_path / METRICS) == []


def test_a_file_written_atomically_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a", "old")
    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
