"""Ray Train for real: the bytes of an in-process run, through a killed worker too; one session for the whole file."""

import asyncio
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from psutil import Process
from pydantic import ValidationError

import ray_workers
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.training import checkpoint as state
from aquilamoe.training import example, sessions
from aquilamoe.training.job import Job, Rank
from aquilamoe.training.loop import train
from aquilamoe.training.ray import metrics_exporter, session, worker_pool
from aquilamoe.training.ray.environment import WORKER_ENVIRONMENT
from aquilamoe.training.ray.launch import launch, release, run_on_workers
from held_training import HeldTraining
from processes import command, descendants, left
from token_files import write_token_file
from waiting import PATIENCE_S, until

# Ray Data, which Ray Train imports, warns of its own options, which are at their defaults.
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]

VOCABULARY, BATCH = example.VOCABULARY, example.BATCH
LISTENS = "0A"  # the state of a socket in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")  # IPv4, IPv6, both
LOSSES = ("train/loss", "train/balance_loss", "train/grad_norm", "val/loss", "val/loss/en", "val/loss/zh")


def cluster(executor: str, workers: int = 1, **changes: Any) -> ClusterConfig:
    every = {"max_failures": 2, "checkpoint_every_tokens": 10 * BATCH}
    return example.cluster(**every | {"executor": executor, "workers": workers} | changes)


LOCAL_PROCESS = cluster("process")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    sources: dict[str, dict[str, TokenCounts]] = {}
    for source, factor in (("en", 7), ("zh", 13)):
        for split, size in (("train", 5000), ("validation", 400)):
            numbers = np.arange(size, dtype=np.int64)
            stream = (numbers * factor + numbers // 9) % (VOCABULARY - 1)
            write_token_file(folder / f"{split}-{source}", VOCABULARY, np.array_split(stream, size // 100))
            sources.setdefault(source, {})[split] = TokenCounts(size, size // 100, size)
    write_record(folder, TokensRecord(VOCABULARY, VOCABULARY - 1, sources))
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of one Ray session for all tests; none of its processes is left after it."""
    environment = dict(os.environ)
    os.environ |= {"RAY_metrics_report_interval_ms": "1000"}  # not ten seconds
    session.start_session(cluster("ray", workers=2))
    import ray

    started = rays_own()
    assert len(started) > 3
    yield ray.get_runtime_context().gcs_address
    started |= rays_own()
    release()
    ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)
    assert not left(started)


def rays_own() -> set[Process]:
    """What this process has started of Ray: not a browser of other tests, which starts processes at any time."""
    return {process for process in descendants() if re.search("ray::|/ray/", command(process))}


def make_job(tokens: Path, out: Path, on: ClusterConfig, experts: int = 4, steps: int = 20, **changes: Any) -> Job:
    stage: dict[str, Any] = {
        "total_tokens": steps * BATCH,
        "mixture": {"en": 2.0, "zh": 1.0},
        "seed": 42,
        "schedule": {"name": "cosine", "warmup_tokens": 4 * BATCH, "min_lr_ratio": 0.1},
        "validation_tokens": 320,
    }
    return replace(example.job(tokens, out, num_experts=experts, **stage | changes), cluster=on)


def points(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(out: Path) -> list[dict[str, Any]]:
    """What is measured again by another run is no part of it."""
    measured = ("time", "tokens_per_s", "seconds", "wait_share")
    return [{key: value for key, value in point.items() if not key.endswith(measured)} for point in points(out)]


def result(out: Path) -> dict[str, bytes]:
    files = [path for part in ("model", "training") for path in (out / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@contextmanager
def disturbed(held: HeldTraining, at: int, saved: int, action: Callable[[], None]) -> Iterator[None]:
    """Have something done to a training that waits before step `at`, its checkpoint of step `saved` complete."""
    over = threading.Event()

    def is_there() -> bool:
        newest = next(iter(state.checkpoints(held.out)), None)
        return held.is_at(at) and newest is not None and state.step_of(newest) == saved

    def act() -> None:
        if until(lambda: "over" if over.is_set() else is_there()) != "over":
            action()

    with ThreadPoolExecutor(1) as pool:
        acted = pool.submit(act)
        try:
            yield
        finally:
            over.set()
    acted.result()


def kill_the_worker() -> None:
    (worker,) = until(lambda: alive if len(alive := ray_workers.alive()) == 1 else [])
    os.kill(worker["Pid"], signal.SIGKILL)


def test_a_run_through_ctrl_c_and_a_killed_worker_ends_with_the_bytes_of_an_undisturbed_run_in_process(
    tokens: Path, tmp_path: Path, address: str
) -> None:
    steps, out = 60, tmp_path / "small.partial"
    job = make_job(tokens, out, cluster("ray"), steps=steps)
    ctrl_c = signal.getsignal(signal.SIGINT)
    held = HeldTraining(job, tmp_path / "first", holds=[25])
    with disturbed(held, 25, 20, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        run_on_workers(job.name, held, job.cluster, tmp_path)
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    assert state.step_of(state.checkpoints(out)[0]) == 20
    held = HeldTraining(job, tmp_path / "second", holds=[45])

    def kill_and_let_the_next_go_on() -> None:
        kill_the_worker()
        held.go()

    with disturbed(held, 45, 40, kill_and_let_the_next_go_on):
        metrics = run_on_workers(job.name, held, job.cluster, tmp_path)
    assert len(ray_workers.started()) == 3
    expected = launch(make_job(tokens, tmp_path / "process", LOCAL_PROCESS, steps=steps), tmp_path)
    assert {**metrics, "tokens_per_s": 0} == {**expected, "tokens_per_s": 0}
    assert result(out) == result(tmp_path / "process") and len(result(out)) >= 4
    assert without_times(out) == without_times(tmp_path / "process")
    release()
    assert not list((tmp_path / "ray").iterdir())  # Ray's own notes


def test_two_workers_give_the_loss_curve_of_one(tokens: Path, tmp_path: Path, address: str) -> None:
    metrics = launch(make_job(tokens, tmp_path / "two", cluster("ray", workers=2)), tmp_path)
    expected = launch(make_job(tokens, tmp_path / "one", LOCAL_PROCESS), tmp_path)
    assert metrics.keys() == expected.keys()
    assert metrics["loss_end"] == pytest.approx(expected["loss_end"], abs=1e-5)
    for two, one in zip(points(tmp_path / "two"), points(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        assert [two[key] for key in LOSSES if key in two] == pytest.approx(
            [one[key] for key in LOSSES if key in one], abs=1e-5
        )


def test_a_stage_with_another_number_of_workers_gets_its_own_and_stages_of_one_shape_share_them(
    tokens: Path, tmp_path: Path, address: str
) -> None:
    spread = cluster("ray", workers=2, parallel="fsdp", expert_parallel=2)
    release()
    before = len(ray_workers.started())
    for name, experts, on in (("dense", 0, cluster("ray")), ("moe", 4, spread), ("again", 4, spread)):
        metrics = launch(make_job(tokens, tmp_path / name, on, experts=experts, steps=6), tmp_path)
        if name != "again":
            alone = launch(make_job(tokens, tmp_path / f"{name}-1", LOCAL_PROCESS, experts=experts, steps=6), tmp_path)
        assert metrics["loss_end"] == pytest.approx(alone["loss_end"], abs=1e-5)
    assert len(ray_workers.started()) == before + 1 + 2


@pytest.fixture
def another_session() -> Iterator[None]:
    """A foreign Ray session on this machine."""
    hold = "import ray, sys; ray.init('local', num_cpus=1, include_dashboard=False); print('up', flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as other:
        assert other.stdout and other.stdout.readline() == b"up\n"
        yield
        other.kill()


def test_a_mistake_that_a_worker_finds_is_one_line_and_is_not_tried_again(
    tokens: Path, tmp_path: Path, address: str, another_session: None
) -> None:
    launch(make_job(tokens, tmp_path / "first", cluster("ray", workers=2), steps=4), tmp_path)
    before = len(ray_workers.started())
    with pytest.raises(UserError) as raised:
        launch(make_job(tokens, tmp_path / "out", cluster("ray", workers=2), mixture={"fr": 1.0}), tmp_path)
    assert str(raised.value).startswith("mixture.fr: ") and "\n" not in str(raised.value)
    assert len(ray_workers.started()) == before  # standing workers were used
    # What they had reserved is free again.
    assert launch(make_job(tokens, tmp_path / "next", cluster("ray", workers=2), steps=4), tmp_path)["steps"] == 4


class Scraper(threading.Thread):
    """Reads again and again what Prometheus would read there: by metric, the labels of all series that there were."""

    def __init__(self, port: int, is_complete: Callable[[dict[str, set[str]]], bool], done: Callable[[], None]) -> None:
        """Read from a port, until what was found is complete; then call `done`."""
        super().__init__(daemon=True)
        self.url, self.metrics = f"http://127.0.0.1:{port}/metrics", dict[str, set[str]]()
        self.is_complete, self.done = is_complete, done
        self.over = threading.Event()

    def run(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.is_complete(self.metrics) and time.monotonic() < deadline_s and not self.over.wait(0.25):
            with suppress(OSError):  # the agent is busy
                self.read()
        self.done()

    def read(self) -> None:
        with urlopen(self.url, timeout=30) as completed:
            lines = completed.read().decode().splitlines()
        for line in lines:
            if line and not line.startswith("#"):
                name, _, labels = line.partition("{")
                self.metrics.setdefault(name.split()[0], set()).add(labels.partition("}")[0])

    def __enter__(self) -> "Scraper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_rays_endpoint_has_every_metric_that_a_panel_queries(
    tokens: Path, tmp_path: Path, address: str, queried_metrics: set[str]
) -> None:
    """But for those of GPUs, and Prometheus' own. Ray forgets a gauge soon when it is no longer set."""
    import ray

    of_others = ("ray_node_gpu", "ray_node_gram")
    expected = {name for name in queried_metrics if name != "up" and not name.startswith(of_others)}
    assert len(expected) > 30
    (node,) = ray.nodes()
    job = make_job(tokens, tmp_path / "small-123.partial", cluster("ray", workers=2), steps=100)
    held = HeldTraining(job, tmp_path / "held", holds=[100], pace_s=0.25)  # until all has been read

    def ours(metrics: dict[str, set[str]], name: str, *labels: str) -> set[str]:
        """Series of a metric of this training that have all these labels."""
        return {each for each in metrics[name] if all(label in each for label in ('fingerprint="123"', *labels))}

    def is_complete(metrics: dict[str, set[str]]) -> bool:
        loads, tokens_of = "ray_efficientscale_router_load", "ray_efficientscale_tokens_total"
        return (
            expected <= metrics.keys()
            and len(ours(metrics, loads)) == 8  # of two layers four experts
            and all(ours(metrics, tokens_of, f'rank="{rank}"') for rank in (0, 1))
        )

    with Scraper(node["MetricsExportPort"], is_complete, held.go) as scraper:
        run_on_workers(job.name, held, job.cluster, tmp_path)
    assert expected - scraper.metrics.keys() == set() and is_complete(scraper.metrics)
    assert all('stage="small"' in labels for name in scraper.metrics for labels in ours(scraper.metrics, name))


def test_workers_have_the_settings_that_precede_torch(address: str) -> None:
    import ray

    task = ray.remote(num_cpus=0)(lambda: {name: os.environ.get(name) for name in WORKER_ENVIRONMENT})
    found = ray.get(task.remote())
    assert found == WORKER_ENVIRONMENT


def listening(pids: set[int]) -> set[str]:
    """Addresses, as the kernel writes them in hexadecimal, at which these processes wait for TCP connections."""
    sockets = set()
    for path in (path for pid in pids for path in Path(f"/proc/{pid}").glob("fd/*")):
        with suppress(OSError):  # it was closed while we looked
            sockets.add(str(path.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENS and f"socket:[{rest[5]}]" in sockets:
                found.add(local.partition(":")[0])
    return found


def is_training_worker(pid: int) -> bool:
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it ended while we looked
        return False


SHIPPED = """
import json, os, sys
from pathlib import Path
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.training.ray import session

session.start_session(ClusterConfig.model_validate(json.loads(sys.argv[1])))
import ray

@ray.remote(num_cpus=0)
def seen():
    import aquilamoe.only_in_this_copy as found
    return found.__file__, found.VALUE, os.environ["A_WORD"], os.environ["GOMP_SPINCOUNT"]

print(json.dumps(ray.get(seen.remote())))
"""


def test_workers_run_the_code_that_a_driver_sends_them_whatever_is_installed(address: str, tmp_path: Path) -> None:
    package = Path(session.__file__).parent.parent
    copy = shutil.copytree(package, tmp_path / "aquilamoe", ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    (copy / "only_in_this_copy.py").write_text("VALUE = 'sent'\n")
    sent = cluster("ray", address=address, runtime_env={"py_modules": [str(copy)], "env_vars": {"A_WORD": "given"}})
    words = [sys.executable, "-c", SHIPPED, sent.model_dump_json()]
    completed = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(package.parent)}, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    where, *found = json.loads(completed.stdout.splitlines()[-1])
    assert found == ["sent", "given", WORKER_ENVIRONMENT["GOMP_SPINCOUNT"]]
    assert "/runtime_resources/py_modules_files/" in where


def test_a_runtime_environment_that_ray_does_not_take_is_one_line(tmp_path: Path) -> None:
    for mistake, line in (
        ({"py_modules": [str(tmp_path / "nowhere")]}, "cluster.runtime_env.py_modules: there is no directory /"),
        ({"pip": 3}, "cluster.runtime_env: "),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(line)}") as raised:
            session.start_session(cluster("ray", address="auto", runtime_env=mistake))
        assert "\n" not in str(raised.value)
    with pytest.raises(ValidationError, match="without address; it is for the machines of a cluster"):
        cluster("ray", runtime_env={"pip": ["x"]})


def test_a_session_of_our_own_listens_on_loopback_only(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)):  # ours is seen
        assert listening({os.getpid()}) >= {LOOPBACK[0]}
    # The store at which workers of torch find each other listens everywhere, which cannot be changed.
    found = listening({process.pid for process in descendants() if not is_training_worker(process.pid)})
    assert found and found <= set(LOOPBACK), found
    assert address.startswith("127.0.0.1:")


# Without workers


class Recorder:
    """Keeps what a training reports."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.parts: set[str] = set()
        self.steps: list[tuple[int, float]] = []
        self.points: list[tuple[int, Mapping[str, float], Mapping[str, Any] | None]] = []

    def begins(self, *of: Any) -> None:
        self.began.append(of[-1])  # the step

    def spent(self, part: str, seconds: float) -> None:
        assert seconds > 0
        self.parts.add(part)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, values["train/loss"]))

    def measured(self, step: int, values: Mapping[str, float], router: Mapping[str, Any] | None) -> None:
        self.points.append((step, values, router))


def test_a_meter_gets_every_step_and_every_point_of_the_journal_and_changes_no_byte(
    tokens: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    train(make_job(tokens, tmp_path / "recorder", LOCAL_PROCESS), Rank(meter=recorder))
    train(make_job(tokens, tmp_path / "untold", LOCAL_PROCESS))
    assert result(tmp_path / "recorder") == result(tmp_path / "untold")
    assert recorder.began == [0] and recorder.parts == {"wait", "step", "validation", "checkpoint"}
    assert [step for step, _ in recorder.steps] == list(range(1, 21))
    journal = points(tmp_path / "recorder")
    assert [(step, values.get("train/loss")) for step, values, _ in recorder.points] == [
        (point["step"], point.get("train/loss")) for point in journal
    ]
    assert recorder.steps == [(point["step"], point["train/loss"]) for point in journal[1:]]
    assert all(router and len(router["load"]) == 2 for step, _, router in recorder.points if step)


def test_outside_of_rays_workers_nothing_is_exported() -> None:
    assert metrics_exporter.meter("embedded") is None


def test_a_users_mistake_is_passed_on_and_an_error_of_ours_is_raised(tokens: Path, tmp_path: Path) -> None:
    """Raising makes Ray try again."""
    job = make_job(tokens, tmp_path, LOCAL_PROCESS, mixture={"fr": 1.0})
    found = worker_pool.perform(pickle.dumps(partial(train, job)), Rank())
    assert found.mistake is not None and found.mistake.startswith("mixture.fr: ") and found.value is None
    with pytest.raises(AttributeError):
        worker_pool.perform(pickle.dumps(partial(train, None)), Rank())  # type: ignore[arg-type]


class LostWorkerError(Exception):
    """As Ray reports a worker that died."""

    health_check_failure = OSError("The actor died\nunexpectedly.")


def test_workers_that_are_lost_too_often_are_one_line_with_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_kept", set())
    cause = worker_pool.cause("small", 2, {0: RuntimeError("Connection closed by peer"), 1: LostWorkerError()})
    assert isinstance(cause, UserError) and "\n" not in str(cause)
    assert str(cause).startswith("stage small: worker 1, restarted 2 times (cluster.max_failures), was lost (")
    assert "(The actor died unexpectedly.)" in str(cause)


def test_what_is_lost_after_a_notice_is_no_failure_and_what_is_lost_later_is_one() -> None:
    """The rank that waits for the one that is gone reports another error, which may arrive first."""
    lost = {0: RuntimeError("Connection closed by peer")}

    async def failures_left(*events: str) -> int:
        pool = worker_pool.WorkerPool(cluster("ray", max_failures=3), "storage", "name", "label")
        pool.closed = True  # workers that request work end at once
        do: dict[str, Callable[[], Any]] = {"warn": pool.warn, "lost": partial(pool.lost, lost)}
        do["new"] = partial(pool.next, 0)
        for event in events:
            await do[event]()
        return pool.failures_left

    for events, kept in ((("lost",), 2), (("warn", "lost", "lost"), 3), (("warn", "lost", "new", "lost"), 2)):
        assert asyncio.run(failures_left(*events)) == kept


def test_an_error_in_a_worker_that_is_nobodys_mistake_keeps_its_type() -> None:
    bug = AssertionError("ours")
    assert worker_pool.cause("small", 2, {0: bug}) is bug


def test_a_cluster_that_does_not_respond_is_one_line_at_once(tokens: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with pytest.raises(UserError) as raised:
                session.start_session(cluster("ray", address=given))
            assert str(raised.value).startswith(f"cluster.address: no Ray cluster responds at '{given}' (")
            assert "ray start --head" in str(raised.value) and "\n" not in str(raised.value)
