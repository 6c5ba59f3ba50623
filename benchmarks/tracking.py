"""What tracking costs a training: seconds of the same training without MLflow, with it, and with MLflow in trouble.

python benchmarks/tracking.py [--rounds N] [--tokens N] [--threads N]

A stage is trained in this process (where the thread that talks to MLflow shares the interpreter with the training:
the worst case; Ray's workers have interpreters of their own), without tracking and then with a database, a server, a
server that answers after 5 s, a server that refuses everything because its disk is full, and one that is killed on the
way. The order is turned every round; medians count. In the end every server answers again, and what a next run finds
missing there is counted.
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).resolve().parent
SLOW_S, KILL_AFTER_S, START_S = 5.0, 2.0, 60.0
MODES = ("no tracking", "database", "server", "slow server", "full server", "killed server")
STAGES = ("corpus", "tokenizer", "tokens", "prepare")
GOAL = 0.02


@dataclass
class Measured:
    """train_s: of the stage, by its record. cpu_s: of the thread that talks to MLflow. end_s: what the end waited."""

    train_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)


@dataclass
class Bench:
    """The experiment cut to one training stage, and an MLflow server for each mode that has one."""

    folder: Path
    values: dict[str, Any]
    uris: dict[str, str]

    def train(self, mode: str, seed: int) -> tuple[float, float, float]:
        """Train once; return seconds of the stage, CPU seconds of tracking, and what the end waited for."""
        from aquilamoe.config import graph
        from aquilamoe.pipeline import plan as planning
        from aquilamoe.pipeline import runner
        from aquilamoe.pipeline.store import Store

        values = deepcopy(self.values)
        values["stages"]["prepare"]["seed"] = seed
        experiment = graph.parse(values)
        store = Store(self.folder / "runs")
        plan = planning.make(graph.build(experiment), store, experiment.cluster.flops_per_s)
        tracker = tracker_of(self.uris.get(mode), store.root) if mode != MODES[0] else None
        if tracker is not None:
            tracker.pipeline_started(mode, "", experiment.model_dump(mode="json"), store.root)
        done = runner.run(plan, store, experiment.cluster, [tracker] if tracker is not None else [])
        before = time.monotonic()
        if tracker is not None:
            tracker.pipeline_finished(True, None)
        end_s = time.monotonic() - before
        return float(done["prepare"].record["seconds"]), tracker.cpu_s if tracker is not None else 0.0, end_s


def configuration(root: Path, tokens: int, threads: int) -> dict[str, Any]:
    """The embedded experiment up to its first training."""
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
    """A tracker that knows what its thread used."""
    from aquilamoe.tracking.observer import Tracker

    class Timed(Tracker):
        cpu_s = 0.0

        def _work(self) -> None:
            started = time.thread_time()
            super()._work()
            self.cpu_s = time.thread_time() - started

    return Timed(uri, root)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(words: list[str], port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on loopback that answers; ended when it is not needed any more."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + START_S
        while not answers(port):
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


def answers(port: int) -> bool:
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


def train_while_killed(bench: Bench, seed: int) -> tuple[float, float, float]:
    """Train with a server of its own that is killed two seconds after the training began."""
    port = int(bench.uris["killed server"].rpartition(":")[2])
    with process(mlflow(bench.folder, port, "killed.db"), port, bench.folder) as started:
        timer = Timer(KILL_AFTER_S, end, [started])
        timer.start()
        try:
            return bench.train("killed server", seed)
        finally:
            timer.join()


def measure(bench: Bench, rounds: int) -> dict[str, Measured]:
    """Every mode in every round, each round beginning with another one."""
    measured = {mode: Measured() for mode in MODES}
    for index in range(rounds):
        for position in range(len(MODES)):
            mode = MODES[(index + position) % len(MODES)]
            seed = 100 + index * len(MODES) + MODES.index(mode)
            killed = mode == "killed server"
            train_s, cpu_s, end_s = train_while_killed(bench, seed) if killed else bench.train(mode, seed)
            row = measured[mode]
            row.train_s.append(train_s)
            row.cpu_s.append(cpu_s)
            row.end_s.append(end_s)
            print(f"  {mode:<14} {train_s:6.2f} s", flush=True)
    return measured


def deliver_the_rest(bench: Bench, mode: str) -> tuple[int, int]:
    """A next run, when the server of a mode is well again: points of all stages on disk, and those that arrived."""
    from mlflow import MlflowClient

    from aquilamoe.pipeline.store import METRICS, read_points

    root, uri = bench.folder / "runs", bench.uris[mode]
    tracker = tracker_of(uri, root)
    tracker.pipeline_started("next", "", {}, root)
    note = tracker.pipeline_finished(True, None)
    assert note is None, note
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(mode)
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'prepare'")
    arrived = sum(len(client.get_metric_history(run.info.run_id, "train/loss")) for run in runs)
    stages = [root / "stages" / Path(run.data.tags["directory"]).name for run in runs]
    due = sum("train/loss" in point for stage in stages for point in read_points(stage / METRICS))
    return due, arrived


def show(measured: dict[str, Measured]) -> bool:
    """Print the table; return whether no mode slows the training by more than the goal."""
    without = statistics.median(measured[MODES[0]].train_s)
    print(f"\n{'':<14} {'training':>10} {'ratio':>7} {'CPU of tracking':>16} {'share':>7} {'wait at the end':>16}")
    worst = 0.0
    for mode, row in measured.items():
        train_s, cpu_s, end_s = (statistics.median(values) for values in (row.train_s, row.cpu_s, row.end_s))
        share = cpu_s / train_s
        worst = max(worst, share)
        print(f"{mode:<14} {train_s:8.2f} s {train_s / without:7.3f} {cpu_s:14.3f} s {share:7.2%} {end_s:14.2f} s")
    print(f"\nlargest share of the CPU: {worst:.2%} of the training's seconds (goal {GOAL:.0%})")
    return worst <= GOAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=327_680, help="of each training")
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left
    folder = Path(tempfile.mkdtemp(prefix="tracking-"))
    try:
        with ExitStack() as stack:
            values = configuration(folder / "runs", arguments.tokens, arguments.threads)
            bench = Bench(folder, values, servers(stack, folder))
            began = time.thread_time()
            bench.train("database", 0)  # imports, tables, corpus and tokens: once, and not measured
            print(f"warm ({time.thread_time() - began:.1f} s of CPU)", flush=True)
            measured = measure(bench, arguments.rounds)
            reached = show(measured)
        with ExitStack() as stack:
            for mode, database in {
                "slow server": "server.db",
                "full server": "server.db",
                "killed server": "killed.db",
            }.items():
                port = int(bench.uris[mode].rpartition(":")[2])
                with process(mlflow(folder, port, database), port, folder):
                    due, arrived = deliver_the_rest(bench, mode)
                print(f"{mode:<14} {arrived} of {due} points are in MLflow after the next run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
