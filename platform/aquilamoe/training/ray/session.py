"""Ray itself: connecting this process to it, and what it has room for."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.process import temporary
from aquilamoe.training import sessions
from aquilamoe.training.ray.environment import WORKER_ENVIRONMENT

if TYPE_CHECKING:
    from ray.runtime_env import RuntimeEnv

# Read by Ray when it is imported and when a session starts: no telemetry, no token file in the home folder, and workers
# that get as much of the processor as this process would (Ray's own way is `nice 15`).
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
# Of a session on this machine only: Ray's own switch for systems without clusters, with which all of its processes
# listens on loopback. Without it they would on the machine's address, and anyone who reaches it could run code.
# Its server (GCS) is never started again, so waits for it are short.
OWN_SESSION_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
CONNECT_TIMEOUT_S = 10.0
PATIENCE_S, REMIND_S = 30.0, 60.0


def start_session(cluster: ClusterConfig, cpus: int = 0) -> None:
    """Connect this driver to Ray once: to `cluster.address`, or to a session of its own on this machine.

    cpus: cores that a session of its own offers at least, where other workers than this cluster's follow.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        _start_session(cluster, cpus)
    finally:  # Ray's own handler of SIGTERM is an exit of this process, with another status
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _start_session(cluster: ClusterConfig, cpus: int) -> None:
    own = OWN_SESSION_ENVIRONMENT if cluster.address is None else {}
    for key, value in {**RAY_ENVIRONMENT, **own, **WORKER_ENVIRONMENT}.items():  # a session of our own inherits them
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)  # in a background thread it warns that it cannot have SIGTERM
    import ray

    if cluster.address is not None:
        _connect(cluster.address, cluster.runtime_env)
        return
    if ray.is_initialized():
        return
    needed, folder = max(cpus, cluster.workers * cluster.cpus_per_worker), temporary.for_sockets() / "ray"
    with sessions.removed_at_exit(folder):
        _in_a_thread_that_stays(
            partial(
                ray.init,
                address="local",
                num_cpus=max(needed, os.cpu_count() or 1),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        )


def check_session() -> None:
    """UserError if a session of our own has lost what holds it together, which Ray itself awaits for a minute."""
    from ray._private import worker

    if (node := worker._global_node) is None:
        return
    ended = sorted({kind for kind, _ in node.dead_processes()} & {"gcs_server", "raylet"})
    if ended:
        raise sessions.gone(ended[0])


def _in_a_thread_that_stays(start: Callable[[], object]) -> None:
    """Make the kernel end Ray's processes them with the thread that started them, not only with its process."""
    if threading.current_thread() is threading.main_thread():
        start()
        return
    started: Future[object] = Future()

    def stay() -> None:
        try:
            started.set_result(start())
        except BaseException as error:
            started.set_exception(error)
        else:
            threading.Event().wait()

    threading.Thread(target=stay, daemon=True).start()
    started.result()


def _connect(address: str, runtime_env: Mapping[str, Any]) -> None:
    import ray

    environment = _runtime_environment(runtime_env)
    try:
        _knock(address)
        if ray.is_initialized():
            return
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cluster.address: no Ray cluster responds at '{address}' ({reason}); start one with "
            "`ray start --head`, or use cluster=local"
        ) from None


def _runtime_environment(configured: Mapping[str, Any]) -> "RuntimeEnv":
    """What Ray gives the processes that it starts for this driver. UserError for what Ray does not take."""
    from ray.runtime_env import RuntimeEnv

    variables = {**WORKER_ENVIRONMENT, **(configured.get("env_vars") or {})}
    for path in configured.get("py_modules") or []:
        if "://" not in str(path) and not Path(path).is_dir():
            raise UserError(
                f"cluster.runtime_env.py_modules: there is no directory {Path(path).absolute()}; correct it"
            )
    try:
        return RuntimeEnv(**{**configured, "env_vars": variables})
    except (TypeError, ValueError) as error:
        raise UserError(f"cluster.runtime_env: {' '.join(str(error).split())}; see Ray's page on runtime_env") from None


def _knock(address: str) -> None:
    """OSError at once if no process listens at `[ray://]host:port`: Ray itself tries for minutes, and noisily."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a worker."""
    gpus = {"GPU": float(cluster.gpus_per_worker)} if cluster.gpus_per_worker else {}
    return {"CPU": float(cluster.cpus_per_worker), **gpus}


def shortage(cluster: ClusterConfig) -> str | None:
    """What is requested and what the cluster has, in one line; None if all its nodes together have room for it."""
    import ray

    needed = resources_per_worker(cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0.0) // amount for name, amount in needed.items())) for node in nodes)
    if room >= (cluster.min_workers or cluster.workers):
        return None
    has = _listed({name: sum(node.get(name, 0.0) for node in nodes) for name in needed})
    return (
        f"{_workers(cluster)} with {_listed(needed)} each requested, "
        f"the cluster has room for {room} ({len(nodes)} nodes, together {has})"
    )


def _workers(cluster: ClusterConfig) -> str:
    least = cluster.min_workers or cluster.workers
    if least != cluster.workers:
        return f"{least} to {cluster.workers} workers"
    return f"{least} workers" if least > 1 else "1 worker"


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())


class Patience:
    """Waits for workers to start: reports what for, and how long yet."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster, self.since = cluster, time.monotonic()
        self.remind_at = PATIENCE_S

    def look(self, standing: bool) -> None:
        """To be called every now and then. UserError if they have not stood for `start_timeout_s`, or never can."""
        if standing:
            self.since, self.remind_at = time.monotonic(), PATIENCE_S
            return
        waited, limit = time.monotonic() - self.since, self.cluster.start_timeout_s
        lack = shortage(self.cluster)
        if waited > limit or (lack and self.cluster.address is None):  # to this machine nothing is added
            raise UserError(
                f"cluster.workers: {lack or self._busy()}; waited {waited:.0f} s of cluster.start_timeout_s "
                f"({limit:g}); make room, or lower cluster.workers or cluster.min_workers"
            )
        if waited > self.remind_at or (lack and waited < self.remind_at == PATIENCE_S):
            self.remind_at = waited + REMIND_S
            print(f"waiting for workers: {lack or self._busy()}; for {limit - waited:.0f} s yet", file=sys.stderr)

    def _busy(self) -> str:
        import ray

        free = {name: ray.available_resources().get(name, 0.0) for name in resources_per_worker(self.cluster)}
        each = _listed(resources_per_worker(self.cluster))
        return f"{_workers(self.cluster)} with {each} each not started yet, {_listed(free)} free"
