"""A pipeline that another process runs, as its files show: what it announced, records, points, signs of life."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from aquilamoe.cli import view
from aquilamoe.cli.progress import PipelineProgress, StageProgress
from aquilamoe.config.messages import UserError
from aquilamoe.config.points import is_number, note
from aquilamoe.files import write_atomically
from aquilamoe.pipeline import records
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import METRICS, RECORD, Record, Store, read_points
from aquilamoe.process import standard_output
from aquilamoe.process.stopping import request_stop

RUNNING = "running.json"
REFRESHES_PER_S = 2
SILENT_S = 30.0  # a stage whose driver gave no sign of life for so long does not run


@contextmanager
def announced(store: Store, name: str, plan: Sequence[Planned]) -> Iterator[None]:
    """Keep a record of what runs, for queries from other processes. The caller holds the store's lock."""
    stages = [
        {
            "name": planned.name,
            "fingerprint": planned.fingerprint,
            "cached": planned.state == "cached",
            "tokens": planned.node.tokens,
            "flops": planned.node.flops,
            "expected_s": planned.seconds,
        }
        for planned in plan
    ]
    path = store.root / RUNNING
    write_atomically(path, json.dumps({"name": name, "stages": stages}))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_announcement(value: Any) -> bool:
    """Whether a JSON value is what `announced` writes."""
    if not (isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("stages"), list)):
        return False
    return bool(value["stages"]) and all(
        isinstance(stage, dict)
        and all(isinstance(stage.get(key), str) for key in ("name", "fingerprint"))
        and isinstance(stage.get("cached"), bool)
        and is_number(stage.get("tokens"))
        and is_number(stage.get("flops"))
        and (stage.get("expected_s") is None or is_number(stage["expected_s"]))
        for stage in value["stages"]
    )


def stop(store: Store) -> str:
    """Have what another process trains in this store save and stop; return the consequence.

    UserError if nothing trains.
    """
    running = Watched.find(store)
    if running is None:
        raise UserError(f"{store.root}: no pipeline runs here; name its paths.root, or see action=status")
    return (
        f"stage {running.stop()} saves after its current step and ends; the command that started it resumes from there"
    )


class Watched:
    """What another process runs in a store."""

    def __init__(self, store: Store, announcement: dict[str, Any]) -> None:
        self.store, self.name = store, str(announcement["name"])
        self.stages: list[dict[str, Any]] = announcement["stages"]
        self.width = max(len(stage["name"]) for stage in self.stages)
        self._records: dict[str, Record] = {}
        self._shown: set[str] = set()

    @staticmethod
    def find(store: Store) -> "Watched | None":
        """The pipeline of the process that holds the store's lock, None if nothing runs."""
        if store.holder() is None:
            return None
        try:
            announcement = json.loads((store.root / RUNNING).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # it has just started, or just ended
            return None
        if not _is_announcement(announcement):
            note(f"{store.root / RUNNING}: is damaged; how far the running pipeline is cannot be shown")
            return None
        return Watched(store, announcement)

    def stop(self) -> str:
        """Request that the stage in training saves and stops; return its name.

        UserError if none trains now.
        """
        running = self.read().running
        stage = next((each for each in self.stages if running and each["name"] == running.name), None)
        if stage is None or not stage["tokens"]:
            what = f"stage {stage['name']} does not train" if stage else "no stage runs now"
            raise UserError(f"{self.store.root}: {what}, and only a training can be stopped; end the command by Ctrl-C")
        request_stop(self.store.partial(stage["name"], stage["fingerprint"]))
        return str(stage["name"])

    def read(self) -> PipelineProgress:
        """Its progress now."""
        return PipelineProgress(self.name, [self._stage(stage) for stage in self.stages])

    def _stage(self, stage: dict[str, Any]) -> StageProgress:
        name = stage["name"]
        progress = StageProgress(
            name=name, tokens=stage["tokens"], flops=stage["flops"], expected_s=stage["expected_s"]
        )
        record = self._records.get(name) or self._record(stage["fingerprint"])
        if record is not None:
            self._records[name] = record
            progress.state = "cached" if stage["cached"] else "run"
            progress.seconds = float(record["seconds"])
            return progress
        partial = self.store.partial(name, stage["fingerprint"])
        attempts = Attempts(self.store.root, self.store.directory(name, stage["fingerprint"]).name)
        alive, begun = attempts.last_alive(), attempts.read()
        # A killed one left its files in place.
        if partial.exists() and begun and alive is not None and time.time() - alive < SILENT_S:
            progress.start(begun[-1].started)
            progress.add(read_points(partial / METRICS))
        return progress

    def _record(self, fingerprint: str) -> Record | None:
        """Of a complete output, whatever name made it."""
        for path in self.store.stages.glob(f"*-{fingerprint}/{RECORD}"):
            with suppress(UserError):
                return records.read(path.parent)
        return None

    def newly_finished(self) -> list[Text]:
        """Lines of the stages that are complete and were not printed yet, in order."""
        lines = []
        for stage in self.stages:
            name = stage["name"]
            if name in self._records and name not in self._shown:
                self._shown.add(name)
                lines.append(view.finished(name, self.width, self._records[name], stage["cached"]))
        return lines


def show(out: Console, watched: Watched) -> None:
    """The view of this moment."""
    pipeline = watched.read()
    for line in [*watched.newly_finished(), *view.present(pipeline, time.time(), out.width)]:
        line.rstrip()
        out.print(line, no_wrap=True, overflow="ellipsis")


def follow(out: Console, watched: Watched) -> None:
    """The same view as the one that runs it has, until it ends or the user stops looking; lines where it is none."""
    with suppress(KeyboardInterrupt):
        if out.is_terminal:
            _follow_on_a_terminal(out, watched)
        else:
            _follow_in_lines(out, watched)
    watched.read()
    for line in watched.newly_finished():
        out.print(line)


def _follow_on_a_terminal(out: Console, watched: Watched) -> None:
    present = view.Present(watched.read(), time.time)
    with Live(present, console=out, refresh_per_second=REFRESHES_PER_S, transient=True):
        while watched.store.holder() is not None:
            present.pipeline = watched.read()
            for line in watched.newly_finished():
                out.print(line)
            time.sleep(1 / REFRESHES_PER_S)


def _follow_in_lines(out: Console, watched: Watched) -> None:
    """The view of this moment, then what finishes, and now and then how far the running stage is."""
    show(out, watched)
    printed_at = time.monotonic()
    while watched.store.holder() is not None and not standard_output.is_lost():
        running = watched.read().running
        for line in watched.newly_finished():
            out.print(line)
            printed_at = time.monotonic()
        if running is not None and time.monotonic() - printed_at > view.PLAIN_EVERY_S:
            out.print(f"  {running.name:<{watched.width}}  {view.plain(running, time.time())}")
            printed_at = time.monotonic()
        time.sleep(1 / REFRESHES_PER_S)
