"""Runs a plan: every stage that is not cached, in order, notifying observers of what happens."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from aquilamoe.config import stage_cluster
from aquilamoe.config.points import parse_points
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline import cost, integrity
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.checkpoint_sync import CheckpointSync
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.stage import Context, Input, module
from aquilamoe.pipeline.store import METRICS, Record, Store
from aquilamoe.process import errors, interruption

POLL_S = 0.2
PACKAGES = ("aquilamoe", "torch", "ray", "mlflow", "transformers", "tokenizers", "safetensors", "grain", "numpy")
Point = dict[str, Any]


class Observer(Protocol):
    """Is notified of what happens: the terminal, the tracking server. Calls never overlap."""

    def stage_started(
        self, stage: str, fingerprint: str, directory: Path, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> None: ...

    def stage_progress(self, stage: str, points: list[Point]) -> None: ...

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None: ...

    def stage_failed(self, stage: str, message: str) -> None: ...


def run(
    plan: Sequence[Planned],
    store: Store,
    cluster: ClusterConfig,
    observers: Sequence[Observer],
    alone: Callable[[Planned], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, Input]:
    """Run what is not cached and return every stage's output. The caller holds the store's lock.

    Args:
        plan: the stages, inputs before their readers.
        store: where outputs are looked up and published.
        cluster: where stages run, but for keys that a stage has otherwise.
        observers: are notified of starts, points, ends and failures.
        alone: entered around each stage, for runs that share a store and its lock.

    Returns:
        Directory and record of every stage's output, by stage.

    Raises:
        UserError: what a user can repair; observers get it as the stage's failure.
    """
    done: dict[str, Input] = {}
    for planned in plan:
        try:
            interruption.check()
            with alone(planned), errors.at(store.partial(planned.name, planned.fingerprint)):
                # Looked up again: another stage of this plan, or another run, may have had the same recipe.
                found = store.find(planned.name, planned.fingerprint)
                found = found or store.fetch(planned.name, planned.fingerprint)
                if found is None:
                    stage_run = _StageRun(planned=planned, store=store, cluster=cluster, done=done, observers=observers)
                    done[planned.name] = stage_run.finish()
                    continue
        except BaseException as error:
            for observer in observers:
                observer.stage_failed(planned.name, str(error) or type(error).__name__)
            raise
        store.push(*found)
        done[planned.name] = Input(planned.name, *found)
        for observer in observers:
            observer.stage_finished(planned.name, *found, cached=True)
    return done


@dataclass(frozen=True, kw_only=True)
class _StageRun:
    """A stage of a plan on its way to an output; `done` are the stages before it."""

    planned: Planned
    store: Store
    cluster: ClusterConfig
    done: Mapping[str, Input]
    observers: Sequence[Observer]

    @cached_property
    def partial(self) -> Path:
        return self.store.partial(self.planned.name, self.planned.fingerprint)

    @cached_property
    def attempts(self) -> Attempts:
        return Attempts(self.store.root, self.planned.directory.name)

    @cached_property
    def checkpoint_sync(self) -> CheckpointSync | None:
        if self.store.remote is None:
            return None
        return CheckpointSync(self.store.remote, self.partial, self.planned.fingerprint, self.attempts)

    def finish(self) -> Input:
        """Run the stage, if it was not interrupted when it was complete, and publish its output."""
        planned, store = self.planned, self.store
        record = store.finish_publishing(self.partial)
        if record is None:
            record = store.publish(self.partial, self.execute())
        self.attempts.forget()
        store.push(planned.directory, record)
        if self.checkpoint_sync:
            self.checkpoint_sync.forget()
        for observer in self.observers:
            observer.stage_finished(planned.name, planned.directory, record, cached=False)
        return Input(planned.name, planned.directory, record)

    def execute(self) -> Record:
        """Run the stage in its partial directory; return its record, without the files."""
        planned = self.planned
        partial = self.partial
        attempts = self.attempts
        stage = module(planned.node.stage.kind)
        inputs = {role: self.done[name] for role, name in planned.node.stage.inputs.items()}
        for source in inputs.values():
            integrity.check(source.directory, source.record, f"stage {planned.name}")
        references = {role: _reference(source) for role, source in inputs.items()}
        if not stage.RESUMES:
            self.store.discard(partial)
        elif self.checkpoint_sync:
            self.checkpoint_sync.fetch()
        resumed = partial.exists()
        partial.mkdir(parents=True, exist_ok=True)
        for observer in self.observers:
            observer.stage_started(planned.name, planned.fingerprint, partial, planned.recipe, references)
        started = datetime.now(UTC)
        rates = cost.rates(planned.node, self.cluster)
        attempts.begin(rates)
        copying = self.checkpoint_sync.follow() if self.checkpoint_sync and stage.RESUMES else nullcontext()
        with _following(partial / METRICS, planned.name, self.observers, attempts), copying:
            where = stage_cluster.of(planned.node, self.cluster)
            metrics = stage.run(Context(planned.node, inputs, partial, where, self.store.root))
        finished = datetime.now(UTC)
        seconds = (finished - started).total_seconds()
        record = {
            "stage": planned.name,
            "kind": planned.node.stage.kind,
            "fingerprint": planned.fingerprint,
            "recipe": planned.recipe,
            "inputs": references,
            "metrics": metrics,
            "versions": _versions(),
            "git_commit": _git_commit(),
            "started": started.isoformat(timespec="milliseconds"),
            "finished": finished.isoformat(timespec="milliseconds"),
            "seconds": seconds,
            "resumed": resumed,
            "work": planned.estimate.work,
        }
        spent = attempts.cost(seconds) + cost.Cost(flops=planned.node.flops)
        known = [output.record for output in self.done.values()]
        return {**record, "cost": cost.entry(spent, record, known, len(attempts.read()), rates.devices)}


def _reference(source: Input) -> dict[str, str]:
    fingerprint = str(source.record["fingerprint"])
    sha256 = integrity.files_sha256(source.record)
    return {"stage": source.stage, "fingerprint": fingerprint, "directory": source.directory.name, "sha256": sha256}


@contextmanager
def _following(path: Path, stage: str, observers: Sequence[Observer], attempts: Attempts) -> Iterator[None]:
    """Hand new lines of a metrics file to the observers while a stage - here or in another process - writes them."""
    follower = _Follower(path)
    finished = Event()

    def tell() -> None:
        points = follower.new_points()
        if points:
            for observer in observers:
                observer.stage_progress(stage, points)

    def poll() -> None:
        while not finished.wait(POLL_S):
            attempts.touch()
            with suppress(OSError):  # reported when the stage ends, if it lasts
                tell()

    thread = Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        tell()


class _Follower:
    """Reads what was appended to a file of points; each step is handed out once.

    A worker that resumes replaces the file by its part up to the checkpoint and computes some steps again: those are
    skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = -1
        self.offset = 0
        self.last_step = -1

    def new_points(self) -> list[Point]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            complete = file.read().rpartition(b"\n")[0]
        if not complete:
            return []
        self.offset += len(complete) + 1
        return [point for point in parse_points(complete, self.path) if self._is_new(point)]

    def _is_new(self, point: Point) -> bool:
        if "step" not in point:
            return True
        new = point["step"] > self.last_step
        self.last_step = max(self.last_step, point["step"])
        return new


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@cache
def _git_commit() -> str | None:
    """The commit of the code, with `+changes` when the working tree differs; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
