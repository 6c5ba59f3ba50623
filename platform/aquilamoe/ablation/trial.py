"""One trial of an ablation: computing it, and recording how it ended."""

import hashlib
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aquilamoe.ablation.plan import Task
from aquilamoe.config import stage_cluster
from aquilamoe.config.messages import one_line
from aquilamoe.config.passwords import learn, without_passwords
from aquilamoe.config.points import note
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.files import write_atomically
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.runner import Observer
from aquilamoe.pipeline.store import Store
from aquilamoe.training.ray.launch import workers_for


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result: the message, and the file with its traceback."""

    message: str
    log: Path


@dataclass(frozen=True)
class Stopped:
    """Where early stopping ended a trial: after so many tokens of the compared stage, with this held-out loss."""

    tokens: int
    loss: float


# Called after every trial with: its task, and what it ended with if not with a result.
OnEnd = Callable[[Task, Failure | Stopped | None], None]


@dataclass(frozen=True)
class Stopping:
    """Early stopping by asynchronous successive halving (ASHA) against tokens.

    by_recovery: whether trials compare how far they are from their source's loss, else by the held-out loss itself.
    """

    by_recovery: bool


class Field:
    """The trials of a run, how each ended, and which of them early stopping ended in an earlier run.

    Stopped trials are recorded for this set alone: compared with others, one of them might have been among the best.
    """

    def __init__(self, tasks: Sequence[Task], store: Store, on_end: OnEnd) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.store = store
        self.on_end = on_end
        self.logs = store.root / "logs"
        digest = hashlib.sha256("\n".join(sorted(self.tasks)).encode()).hexdigest()[:12]
        self.notes = store.root / "ablations" / f"stopped-{digest}.json"
        self.stopped = self._read()
        self.failures: dict[str, Failure] = {}

    def waiting(self) -> list[str]:
        """Trials with no result that were not stopped."""
        return [name for name, task in self.tasks.items() if not self.is_done(name) and name not in self.stopped]

    def is_done(self, name: str) -> bool:
        """Whether the trial's result is in the store."""
        leaf = self.tasks[name].leaf
        return self.store.find(leaf.stage, leaf.fingerprint) is not None

    def ended(self, name: str, lost: str | None = None, stopped: Stopped | None = None) -> None:
        """Pass on how a trial ended. lost: why there is no log of a failure."""
        log, _ = _notes(self.logs, name)
        message = lost or (log.read_text(encoding="utf-8").split("\n")[0] if log.exists() else None)
        if message:
            self.failures[name] = Failure(message, log)
            self.on_end(self.tasks[name], self.failures[name])
        elif stopped and not self.is_done(name):
            self.stopped[name] = stopped
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            plain = {stopped_name: asdict(where) for stopped_name, where in self.stopped.items()}
            write_atomically(self.notes, json.dumps(plain, indent=1))
            self.logs.mkdir(parents=True, exist_ok=True)
            where = f"stopped early after {stopped.tokens:,} tokens, at a loss of {stopped.loss:.4f}"
            _notes(self.logs, name)[1].write_text(f"{where}\n", encoding="utf-8")
            self.on_end(self.tasks[name], stopped)
        else:
            self.on_end(self.tasks[name], None)

    def _read(self) -> dict[str, Stopped]:
        try:
            noted = json.loads(self.notes.read_text(encoding="utf-8"))
            stopped = {name: Stopped(int(where["tokens"]), float(where["loss"])) for name, where in noted.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError):
            note(f"{self.notes}: is damaged; trials that were stopped early run again")
            return {}
        return stopped


def _notes(logs: Path, name: str) -> tuple[Path, Path]:
    """The files that record that a trial failed, and that it was stopped early."""
    return logs / f"{name}.log", logs / f"{name}.stopped"


def compute(task: Task, store: Store, cluster: ClusterConfig, logs: Path, observers: Sequence[Observer]) -> None:
    """Compute a task. Failures are deterministic, so they are recorded instead of raised."""
    learn([cluster.model_dump(), *(planned.node.stage.model_dump() for planned in task.stages)])
    log, stopped = _notes(logs, task.name)
    for each in (log, stopped):
        each.unlink(missing_ok=True)
    try:
        # Ray Train's notes are separate for each trial: starting workers clears the folder of those before.
        trained = [planned.node for planned in task.stages if planned.node.stage.kind == "pretrain"]
        clusters = [stage_cluster.of(node, cluster) for node in trained]
        with workers_for(clusters, store.root / "trials" / task.name, task.name):
            runner.run(
                task.stages,
                store,
                cluster,
                observers,
                alone=lambda planned: store.stage_lock(planned.fingerprint),
            )
    except Exception as error:
        if stopped.exists():  # its process is being ended: errors of its threads are consequences of that
            return
        logs.mkdir(parents=True, exist_ok=True)
        message = without_passwords(one_line(error))
        log.write_text(f"{message}\n\n{without_passwords(traceback.format_exc())}", encoding="utf-8")
