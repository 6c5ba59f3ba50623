"""The pipeline's observer: queues events, and a thread of its own sends them to MLflow, so that no caller waits."""

import hashlib
import json
import queue
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from aquilamoe.config.messages import without_passwords
from aquilamoe.pipeline.store import Record
from aquilamoe.tracking.connection import LatencyMonitor, first_line, is_away, is_reachable, shown, tracking_uri
from aquilamoe.tracking.database import Repairs
from aquilamoe.tracking.sync_state import (
    FOLDER,
    Pipeline,
    Point,
    Stage,
    SyncState,
    finished_stage,
    key_of,
    still_known,
    undelivered,
)

SEND_EVERY_S = 2.0  # curves; the start and the end of a stage are sent at once
SEND_SHARE = 0.002  # of the time goes into sending curves, which is done less often if it takes more
QUIET_S = 30.0  # but at least so often; and how long until a server that did not respond is tried again
FLUSH_S = 60.0  # how long the end of a pipeline waits for the last points
# How long it waits for a slow server: so many seconds, or that share of what the pipeline took.
SLOW_FLUSH_S, SLOW_FLUSH_SHARE = 5.0, 0.02
JOIN_S = 0.1
DELIVERING = Lock()  # one thread at a time: an abandoned one may still wait for its last response
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit")


class Tracker:
    """Sends the events of a pipeline to MLflow.

    uri: None is `<root>/mlflow.db`, with small files in `<root>/mlartifacts`.

    Calls return at once and never fail: while MLflow is away, the run continues, and what it misses is sent later: at
    the end of a stage, of the pipeline, or by the next run. Not for several pipelines at a time.
    """

    def __init__(self, uri: str | None, root: Path) -> None:
        self.uri = tracking_uri(uri, root)
        self.root = root
        self._events: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._thread: Thread | None = None
        self._stages: dict[str, Stage] = {}
        self._current: dict[str, Stage] = {}  # by the name that this pipeline gives it
        self._pipelines: dict[str, Pipeline] = {}
        self._pipeline: Pipeline | None = None
        self._writer: Any = None
        self._problem = ""  # why the last attempt did not succeed
        self._broken = ""  # an error of our own: not everything was taken note of
        self._closing = False
        self._abandoned = False  # nothing waits any more: what is left is for the next run
        self._watch = LatencyMonitor()
        self._repairs = Repairs()
        self._known: dict[str, bool] | None = None  # runs of the database, and whether MLflow shows them
        self._started = 0.0

    @property
    def experiment_id(self) -> str | None:
        """MLflow's number of the experiment, once MLflow knows it."""
        return self._pipeline.receipt["experiment_id"] if self._pipeline else None

    def pipeline_started(self, experiment: str, description: str, config: dict[str, Any], root: Path) -> None:
        assert self._thread is None and not self._abandoned, "one pipeline at a time"
        self._stages = {}
        self._current = {}
        self._pipelines = {}
        self._closing = False
        self._repairs = Repairs()
        self._started = time.monotonic()
        self._thread = Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        now_ms = time.time_ns() // 1_000_000
        self._events.put(partial(self._on_pipeline_started, now_ms, experiment, description, config, root))

    def stage_started(
        self, stage: str, fingerprint: str, directory: Path, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> None:
        now_ms = time.time_ns() // 1_000_000
        started = partial(self._on_stage_started, now_ms, stage, fingerprint)
        self._events.put(partial(started, directory=directory, recipe=recipe, inputs=inputs))

    def stage_progress(self, stage: str, points: list[Point]) -> None:
        self._events.put(partial(self._on_stage_progress, stage, points))

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        self._events.put(partial(self._on_stage_finished, stage, directory, record, cached))

    def stage_failed(self, stage: str, message: str) -> None:
        self._events.put(partial(self._on_stage_failed, stage, message))

    def pipeline_finished(self, succeeded: bool, report: Path | None) -> str | None:
        """Send what is left; return lines about what could not be delivered or was repaired, None if all is well."""
        assert self._thread is not None, "pipeline_started comes first"
        self._events.put(partial(self._on_pipeline_finished, succeeded, report))
        waited_s = self._wait(self._thread)
        if self._thread.is_alive():
            self._abandoned = True
            self._problem = f"{shown(self.uri)} is slow: waited {waited_s:.0f} s"
        self._thread = None
        return self._note()

    def _wait(self, thread: Thread) -> float:
        """Give the thread time for what is left, less if the server is slow; return the seconds that it had."""
        began = time.monotonic()
        slow_s = max(SLOW_FLUSH_S, SLOW_FLUSH_SHARE * (began - self._started))
        while thread.is_alive():
            waited_s = time.monotonic() - began
            if waited_s > FLUSH_S or (waited_s > slow_s and self._watch.is_slow):
                break
            thread.join(JOIN_S)
        return time.monotonic() - began

    def _on_pipeline_started(
        self, now_ms: int, experiment: str, description: str, config: dict[str, Any], root: Path
    ) -> bool:
        self._known = still_known(self.uri, root)
        self._pipelines, stages = undelivered(root, self.uri, self._known)
        self._stages = {stage.key: stage for stage in stages}
        identity = json.dumps([experiment, config.get("stages", config)], sort_keys=True, default=str)
        recipe = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._pipeline = Pipeline(receipt=SyncState(root, f"pipeline-{recipe}", self.uri), latest_ms=now_ms)
        self._pipelines[recipe] = self._pipeline
        for stage in self._stages.values():
            stage.pipeline = self._pipelines[stage.pipeline.recipe]  # one object for the current one
        first_ms = self._pipeline.receipt["started_ms"] or now_ms
        self._pipeline.receipt.update(
            experiment=experiment, description=description, config=config, started_ms=first_ms
        )
        return False

    def _on_stage_started(
        self,
        now_ms: int,
        name: str,
        fingerprint: str,
        *,
        directory: Path,
        recipe: dict[str, Any],
        inputs: dict[str, dict[str, Any]],
    ) -> bool:
        assert self._pipeline is not None, "pipeline_started comes first"
        final = directory.with_name(key_of(directory))
        receipt = SyncState(self.root, final.name, self.uri)
        receipt.update(stage=name, pipeline=self._pipeline.recipe, directory=final.name, delivered=False)
        stage = Stage(
            name=name,
            directory=directory,
            recipe=recipe,
            inputs=inputs,
            fingerprint=fingerprint,
            pipeline=self._pipeline,
            receipt=receipt,
            started_ms=now_ms,
        )
        self._announce(stage, final)
        self._pipeline.save(wanted_status="RUNNING")
        return True

    def _on_stage_progress(self, name: str, points: list[Point]) -> bool:
        self._current[name].add(points)
        self._current[name].dirty = True
        return False

    def _on_stage_finished(self, name: str, directory: Path, record: Record, cached: bool) -> bool:
        assert self._pipeline is not None, "pipeline_started comes first"
        receipt = SyncState(self.root, directory.name, self.uri)
        stage = finished_stage(directory, record, name, pipeline=self._pipeline, receipt=receipt, known=self._known)
        self._announce(stage, directory)
        if stage.dirty:
            receipt.update(stage=name, pipeline=self._pipeline.recipe, directory=directory.name, delivered=False)
            self._pipeline.save()
            self._pipeline.dirty = True
        return not cached

    def _on_stage_failed(self, name: str, message: str) -> bool:
        if name in self._current:  # it may have failed before it started
            stage = self._current[name]
            stage.message = without_passwords(message)
            stage.status = "KILLED" if message in INTERRUPTIONS else "FAILED"
            stage.dirty = True
        return True

    def _on_pipeline_finished(self, succeeded: bool, report: Path | None) -> bool:
        self._closing = True
        assert self._pipeline is not None, "pipeline_started comes first"
        for stage in self._current.values():
            if stage.record is None and stage.status == "RUNNING":
                stage.status = "KILLED"
                stage.message = "interrupted"
                stage.dirty = True
        status = "FINISHED" if succeeded else "FAILED"
        self._pipeline.status, self._pipeline.report = status, report
        self._pipeline.save(wanted_status=status)
        if report and report.is_relative_to(self.root):
            self._pipeline.save(report=str(report.relative_to(self.root)))
        hidden = self._known is not None and not self._known.get(self._pipeline.receipt["run_id"], False)
        self._pipeline.dirty |= hidden or self._pipeline.receipt["status"] != status
        return True

    def _announce(self, stage: Stage, directory: Path) -> None:
        assert self._pipeline is not None
        self._stages[stage.key] = self._current[stage.name] = stage
        self._pipeline.stages[stage.name] = directory

    def _work(self) -> None:
        """Take events as they come; deliver at the ends of stages, and between them now and then."""
        next_s = 0.0
        while not self._closing:
            idle = not any(stage.dirty for stage in self._stages.values())
            urgent = self._take_events(None if idle else max(0.0, next_s - time.monotonic()))
            if urgent or time.monotonic() >= next_s:
                began_s = time.thread_time()
                self._deliver()
                next_s = time.monotonic() + self._pause_s(None if urgent else time.thread_time() - began_s)

    def _pause_s(self, spent_s: float | None) -> float:
        """How long curves wait for their next delivery; spent_s: of the processor, by one that had only curves."""
        if self._problem:
            return QUIET_S
        return min(QUIET_S, max(SEND_EVERY_S, (spent_s or 0.0) / SEND_SHARE))

    def _take_events(self, timeout_s: float | None) -> bool:
        """Apply all events there are, waiting for the first; return whether one of them is urgent."""
        urgent = False
        try:
            event = self._events.get(timeout=timeout_s)
            while True:
                try:
                    urgent |= event()
                except Exception as error:  # e.g. a full disk: no reason to stop a training
                    self._broken = self._broken or without_passwords(f"{type(error).__name__}: {error}")
                event = self._events.get_nowait()
        except queue.Empty:
            return urgent

    def _deliver(self) -> None:
        """Bring MLflow up to date, stages in order; after a sign that it is away, leave the rest for later."""
        stages = [stage for stage in self._stages.values() if stage.dirty or stage.assumed]
        if not any(stage.dirty for stage in stages) and not any(each.dirty for each in self._pipelines.values()):
            return
        self._problem = ""
        with DELIVERING:
            if self._abandoned or not self._attempt("connection", lambda: None):
                return
            stages = [stage for stage in self._stages.values() if stage.dirty or stage.assumed]
            steps = [(stage.name, partial(self._sync_stage, stage)) for stage in stages]
            steps += [("pipeline", partial(self._conclude, each)) for each in self._pipelines.values() if each.dirty]
            for what, step in steps:
                if self._abandoned or not self._attempt(what, step):
                    return

    def _sync_stage(self, stage: Stage) -> None:
        self._writer.sync_stage(stage)
        stage.dirty = stage.assumed = False

    def _conclude(self, pipeline: Pipeline) -> None:
        self._writer.finish_pipeline(pipeline)
        pipeline.dirty = False

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Do one thing with MLflow; return whether the next is worth trying. Nothing that MLflow raises is our end."""
        try:
            if self._writer is None:
                self._connect()
            action()
        except Exception as error:
            # What the server has may differ from what we thought: query it again, and read all points again.
            self._writer = None
            for stage in self._stages.values():
                stage.points, stage.reread = [], True
            away = is_away(error)
            problem = f"{shown(self.uri)} does not respond" if away else f"{what}: {first_line(error)}"
            self._problem = self._problem or problem
            return not away
        return True

    def _connect(self) -> None:
        """Import MLflow only for a server that responds: its own timeouts are long."""
        with self._watch.call():
            if not is_reachable(self.uri):
                raise ConnectionError(self.uri)
        from aquilamoe.tracking.mlflow_writer import MlflowWriter

        replaced = len(self._repairs.replaced)
        self._writer = MlflowWriter(self.uri, self.root, self._watch, self._repairs)
        if len(self._repairs.replaced) > replaced:
            self._send_all_again()

    def _send_all_again(self) -> None:
        """MLflow's database is a new one: whatever receipts claim, it has nothing."""
        self._known = {}
        pipelines, stages = undelivered(self.root, self.uri, self._known)
        self._pipelines = {**pipelines, **self._pipelines}
        for stage in stages:
            stage.pipeline = self._pipelines[stage.pipeline.recipe]
            self._stages.setdefault(stage.key, stage)
        for stage in self._stages.values():
            stage.points = []
            stage.reread = True
            stage.dirty = True
            stage.assumed = False
            stage.pipeline.dirty = True

    def _note(self) -> str | None:
        """Lines about what was not delivered, and what had to be repaired."""
        late = self._late()
        return "\n".join([*self._repairs.lines(), *([late] if late else [])]) or None

    def _late(self) -> str | None:
        if self._broken:
            return f"tracking: incomplete ({self._broken})"
        late = [stage for stage in self._stages.values() if stage.dirty]
        late_pipelines = [pipeline for pipeline in self._pipelines.values() if pipeline.dirty]
        if not late and not late_pipelines:
            return None
        points = sum(stage.count_unsent() for stage in late)
        stages = f"{len(late)} stage{'s' if len(late) != 1 else ''}"
        count = f"{points:,} points of {stages}" if points else f"news of {stages}" if late else "the final status"
        return f"tracking: {count} kept in {self.root / FOLDER}, will be sent by the next run ({self._problem})"
