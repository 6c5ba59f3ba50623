"""What tracking costs a training: the same training without MLflow, with it, and with MLflow failing.

python benchmarks/tracking.py [--rounds N] [--tokens N,N] [--threads N] [--modes NAME,NAME]

A stage is trained without tracking and then with a database, a server, a server that responds after 5 s, one that
refuses everything because its disk is full, and one that is killed on the way. Each training is a process, in which the
thread that talks to MLflow shares the interpreter with the training: the worst case, as Ray's workers have interpreters
of their own. What that thread takes has MLflow's late imports and the opening of the database in it. The order is
turned every round; medians count, and of ratios those to the training without tracking of the same round. Trainings of
two lengths separate what is paid once - loading MLflow, opening a database, start and end of a stage - from what
grows with the training. In the end every server responds again, and what a next run finds missing there is counted.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from aquilamoe.estimates.duration import Speed

HERE = Path(__file__).resolve().parent
SLOW_S, KILL_AFTER_S, START_S = 5.0, 2.0, 180.0
MODES = ("no tracking", "database", "server", "slow server", "full server", "killed server")
Measurements = dict[str, list["Measured"]]  # by mode, of each round
STAGES = ("corpus", "tokenizer", "tokens", "prepare")
GOAL = 0.02


@dataclass(frozen=True)
class Measured:
    """Seconds of one training: by its record; of the CPU, in all and of tracking; and for what the end waited."""

    clock_s: float
    cpu_s: float
    tracking_cpu_s: float
    end_s: float


@dataclass(frozen=True)
class Bench:
    """The experiment cut to one training stage, and an MLflow server for each mode that has one."""

    folder: Path
    threads: int
    uris: dict[str, str]

    def train(self, mode: str, seed: int, tokens: int) -> Measured:
        """Train once, in a process of its own."""
        values = configuration(self.folder / "runs", tokens, self.threads)
        values["stages"]["prepare"]["seed"] = seed
        request = json.dumps([values, mode, self.uris.get(mode), str(self.folder / "runs")])
        done = subprocess.run([sys.executable, __file__, "--one"], input=request, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{mode}: the training ended with status {done.returncode}")
        return Measured(**json.loads(done.stdout.splitlines()[-1]))


def train_one(values: dict[str, Any], mode: str, uri: str | None, root: Path) -> Measured:
    """The training of this process."""
    from aquilamoe.tracking import connection

    os.environ.update(connection.ENVIRONMENT)  # before MLflow is imported
    import mlflow  # noqa: F401  # before the clocks start
    import torch  # noqa: F401

    from aquilamoe.config import graph
    from aquilamoe.pipeline import plan as planning
    from aquilamoe.pipeline import runner
    from aquilamoe.pipeline.store import Store
    from aquilamoe.training import loop  # noqa: F401

    experiment = graph.parse(values)
    store = Store(root)
    plan = planning.make(graph.build(experiment), store, Speed.of(experiment.cluster))
    tracker = tracker_of(uri, root) if mode != MODES[0] else None
    began = time.process_time()
    if tracker is not None:
        tracker.pipeline_started(mode, "", experiment.model_dump(mode="json"), root)
    done = runner.run(plan, store, experiment.cluster, [tracker] if tracker is not None else [])
    before = time.monotonic()
    if tracker is not None:
        tracker.pipeline_finished(True, None)
    cpu_s, tracking_s = time.process_time() - began, tracker.cpu_s() if tracker is not None else 0.0
    return Measured(float(done["prepare"].record["seconds"]), cpu_s, tracking_s, time.monotonic() - before)


def configuration(root: Path, tokens: int, threads: int) -> dict[str, Any]:
    """The experiment of conf/config.yaml up to its first training."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    overrides = ["cluster=local_process", f"cluster.cpus_per_worker={threads}"]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(HERE.parent / "conf"), version_base="1.3"):
        composed: Any = OmegaConf.to_container(hydra.compose("config", overrides), resolve=True)
    composed["stages"] = {name: composed["stages"][name] for name in STAGES}
    composed["stages"]["prepare"] |= {"total_tokens": tokens, "validate_every_tokens": tokens // 2}
    composed["report"] = {"chain": ["prepare"], "control": None}
    composed["paths"]["root"] = str(root)
    return dict(composed)


def tracker_of(uri: str | None, root: Path) -> Any:
    """A tracker that measures what its thread used."""
    from aquilamoe.tracking.observer import Tracker

    class Timed(Tracker):
        clock: int | None = None

        def _work(self) -> None:
            self.clock = time.pthread_getcpuclockid(threading.get_ident())
            super()._work()
            self.spent = self.cpu_s()
            self.clock = None

        def cpu_s(self) -> float:
            """Of the thread, which may still wait for a slow server."""
            return time.clock_gettime(self.clock) if self.clock is not None else self.spent

    return Timed(uri, root)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(words: list[str], port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on loopback that responds; stopped when it is no longer needed."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + START_S
        while not responds(port):
            if time.monotonic() > deadline or started.poll() is not None:
                raise SystemExit(f"{' '.join(words)}: did not start in {START_S:.0f} s")
            time.sleep(0.1)
        yield started
    finally:
        end(started)


def end(started: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def responds(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2 * SLOW_S).close()
    except OSError:
        return False
    return True


def mlflow(folder: Path, port: int, database: str = "server.db") -> list[str]:
    where = ["--backend-store-uri", f"sqlite:///{folder / database}", "--artifacts-destination", str(folder / "art")]
    return ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *where]


def servers(stack: ExitStack, folder: Path) -> dict[str, str]:
    """A server for every mode; what is behind the slow and the full one is the real one of `server`."""
    ports = {mode: free_port() for mode in MODES[2:]}
    real = ports["server"]
    stack.enter_context(process(mlflow(folder, real), real, folder))
    proxy = str(HERE / "slow_proxy.py")
    slow, full = ports["slow server"], ports["full server"]
    stack.enter_context(process([proxy, str(slow), str(real), str(SLOW_S)], slow, folder))
    stack.enter_context(process([proxy, str(full), str(real), "0", "507"], full, folder))
    return {mode: f"http://127.0.0.1:{port}" for mode, port in ports.items()}


def train_while_killed(bench: Bench, seed: int, tokens: int) -> Measured:
    """Train with a server of its own that is killed a while after the training began."""
    port = int(bench.uris["killed server"].rpartition(":")[2])
    with process(mlflow(bench.folder, port, "killed.db"), port, bench.folder) as started:
        stages = bench.folder / "runs" / "stages"
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.1) and not any(stages.glob("prepare-*.partial")):
                pass
            if not stop.wait(KILL_AFTER_S):
                end(started)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            return bench.train("killed server", seed, tokens)
        finally:
            stop.set()
            killer.join()


def measure(bench: Bench, modes: Sequence[str], rounds: int, tokens: int) -> Measurements:
    """Every mode in every round, each round beginning with another one."""
    measured: Measurements = {mode: [] for mode in modes}
    for index in range(rounds):
        for position in range(len(modes)):
            mode = modes[(index + position) % len(modes)]
            seed = 100 + index * len(MODES) + MODES.index(mode)
            train = partial(train_while_killed, bench) if mode == "killed server" else partial(bench.train, mode)
            found = train(seed, tokens)
            measured[mode].append(found)
            print(f"  {mode:<14} {found.clock_s:6.2f} s, {found.cpu_s:6.2f} s of CPU", flush=True)
    return measured


def deliver_the_rest(mode: str, uri: str, root: Path) -> None:
    """A next run, when the server of a mode is well again: return how many points of all stages on disk arrived.

    In a process of its own: MLflow remembers where it once sent files to.
    """
    from mlflow import MlflowClient

    from aquilamoe.pipeline.store import METRICS, read_points

    tracker = tracker_of(uri, root)
    tracker.pipeline_started("next", "", {}, root)
    note = tracker.pipeline_finished(True, None)
    assert note is None, note
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(mode)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'prepare'")
    arrived = sum(len(client.get_metric_history(run.info.run_id, "train/loss")) for run in runs)
    stages = [root / "stages" / Path(run.data.tags["directory"]).name for run in runs]
    due = sum("train/loss" in point for stage in stages for point in read_points(stage / METRICS))
    print(f"{mode:<14} {arrived} of {due} points are in MLflow after the next run")


def show(measured: Measurements, tokens: int) -> None:
    """Print the table of one length."""
    print(f"\n{tokens:,} tokens")
    head = ("training", "ratio", "CPU", "ratio", "tracking", "share", "end waits")
    print(f"\n{'':<14} {head[0]:>9} {head[1]:>6} {head[2]:>9} {head[3]:>6} {head[4]:>9} {head[5]:>6} {head[6]:>10}")
    for mode, rows in measured.items():
        pairs = list(zip(rows, measured[MODES[0]], strict=True))
        clock_s, cpu_s, tracking_s, end_s = map(median, zip(*(asdict(row).values() for row in rows), strict=True))
        clock = median(row.clock_s / other.clock_s for row, other in pairs)
        cpu = median(row.cpu_s / other.cpu_s for row, other in pairs)
        share = median(row.tracking_cpu_s / (row.cpu_s - row.tracking_cpu_s) for row in rows)
        print(
            f"{mode:<14} {clock_s:7.2f} s {clock:6.3f} {cpu_s:7.2f} s {cpu:6.3f} {tracking_s:7.3f} s {share:6.2%} "
            f"{end_s:8.2f} s"
        )


def compare(short: Measurements, long: Measurements) -> bool:
    """Print what is paid once and what grows with a training; return whether the longer one reaches the goal."""
    reached = True
    print(f"\n{'':<14} {'once':>9} {'of each further second':>23} {f'under {GOAL:.0%} from':>15}")
    for mode in list(short)[1:]:
        less_s, spent_s = _shares(short[mode])
        more_s, spent_more_s = _shares(long[mode])
        rate = (spent_more_s - spent_s) / (more_s - less_s)
        once_s = spent_s - rate * less_s
        enough = f"{max(0.0, once_s) / (GOAL - rate):.0f} s of CPU" if rate < GOAL else "never"
        print(f"{mode:<14} {once_s:7.2f} s {rate:23.2%} {enough:>15}")
        reached &= spent_more_s / more_s < GOAL
    print(f"goal: under {GOAL:.0%} in the longer training: {'reached' if reached else 'missed'}")
    return reached


def _shares(rows: Sequence[Measured]) -> tuple[float, float]:
    """CPU seconds of the training itself, and of tracking."""
    return median(row.cpu_s - row.tracking_cpu_s for row in rows), median(row.tracking_cpu_s for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", default="131072,524288", help="of each training: a shorter and a longer one")
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    parser.add_argument("--modes", default=",".join(MODES), help="which of them; always also without tracking")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rest", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rest:
        mode, uri, root = arguments.rest
        deliver_the_rest(mode, uri, Path(root))
        return
    if arguments.one:
        values, mode, uri, root = json.load(sys.stdin)
        print(json.dumps(asdict(train_one(values, mode, uri, Path(root)))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left
    folder = Path(tempfile.mkdtemp(prefix="tracking-"))
    try:
        with ExitStack() as stack:
            bench = Bench(folder, arguments.threads, servers(stack, folder))
            shorter, longer = map(int, arguments.tokens.split(","))
            bench.train("database", 0, shorter)  # tables, corpus and tokens: once, and not measured
            selected = [mode for mode in MODES if mode in (MODES[0], *arguments.modes.split(","))]
            short = measure(bench, selected, arguments.rounds, shorter)
            show(short, shorter)
            healthy = [mode for mode in selected if mode in MODES[:3]]
            long = measure(bench, healthy, arguments.rounds, longer)
            show(long, longer)
            reached = compare({mode: short[mode] for mode in healthy}, long)
        with ExitStack() as stack:
            for mode in [mode for mode in MODES[3:] if mode in selected]:
                database = "killed.db" if mode == "killed server" else "server.db"
                port = int(bench.uris[mode].rpartition(":")[2])
                with process(mlflow(folder, port, database), port, folder):
                    words = [mode, bench.uris[mode], str(folder / "runs")]
                    subprocess.run([sys.executable, __file__, "--rest", *words], check=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
