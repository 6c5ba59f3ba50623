"""Every service of docker-compose.yml as a container without Docker, and one run of the pipeline through all of them.

Called by tools/rehearse_compose.sh, which lists what it needs and installs it. Commands, environments, users, secrets,
volumes, health checks and the order of the services are those of the file; where a program cannot be had here, the
rehearsal prints which one stands in for it.
"""

import argparse
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import compose_checks
from compose_file import ROOT
from containers import call
from rehearsal import NOT_HERE, PATIENCE, Rehearsal

ORDER = ("ray-head", "s3", "postgres", "ray-worker", "bucket", "mlflow", "prometheus", "driver")
# The smallest run that has every stage.
WORDS = (
    "experiment=smoke",
    "stages.prepare.total_tokens=49152",
    "stages.prepare.validate_every_tokens=16384",
    "stages.dense.total_tokens=16384",
    "stages.moe.total_tokens=16384",
    "stages.control.schedule.decay_tokens=16384",
    "stages.evaluate.generation.max_new_tokens=4",
)
LIMIT_S = 1500
HELPERS = (b"dashboard/agent.py", b"runtime_env/agent/main.py")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """A line with the seconds that it took."""
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)


def stand(rehearsal: Rehearsal) -> None:
    """Start the services one by one, each when those before it are as the file requires.

    Docker starts at once what needs nothing; but a raylet gives its helpers fixed seconds to start, which two cores do
    not grant to everything together.
    """
    ready: dict[str, str] = {}
    for name in ORDER:
        if name == "prometheus" and not _has_prometheus():
            print("          prometheus: not here, or no dashboards/prometheus: skipped", flush=True)
            continue
        service = rehearsal.services[name]
        lacking = {other: how for other, how in service.needs.items() if ready.get(other) != how}
        if lacking:
            raise RuntimeError(f"{name}: the file requires {lacking} before it, ready are {ready}")
        rehearsal.start(name)
        if name == "driver":
            continue
        if name == "bucket":
            with timed(f"{name}: done, as {service.user}"):
                rehearsal.await_end(name, PATIENCE * 20)
            ready[name] = "service_completed_successfully"
        else:
            with timed(f"{name}: healthy, as {service.user}"):
                rehearsal.await_health(name)
            ready[name] = "service_healthy"


def _has_prometheus() -> bool:
    return shutil.which("prometheus") is not None and (ROOT / "dashboards/prometheus/prometheus.yml").exists()


def main() -> None:
    if os.geteuid() != 0 or os.getpid() != 1:
        raise SystemExit("error: not in namespaces of its own; call tools/rehearse_compose.sh")
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty one, for everything that the services write")
    folder = parser.parse_args().folder.resolve()
    for name, reason in NOT_HERE.items():
        print(f"          {name}: not rehearsed, {reason}")
    print("          s3: moto's server stands in for versitygw; postgres, prometheus: Debian's versions")
    call("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))  # seen in these namespaces only
    rehearsal = Rehearsal(folder)
    threading.Thread(target=_help_helpers, daemon=True).start()
    with timed("all services"):
        stand(rehearsal)
    for check in compose_checks.BEFORE:
        with timed(_sentence(check)):
            check(rehearsal)
    with timed("driver: the pipeline through cluster=compose"):
        output = rehearsal.drive(*WORDS)
    print(output[-1500:])
    for check in compose_checks.AFTER:
        with timed(_sentence(check)):
            check(rehearsal)
    print("Everything in docker-compose.yml that can run here works.")


def _help_helpers() -> None:
    """Let the helpers of raylets go before all else that is started here.

    A raylet ends if they have not started in 15 seconds, which nothing sets; on a busy machine they need more.
    """
    while True:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended while we looked
                if any(helper in path.read_bytes() for helper in HELPERS):
                    os.setpriority(os.PRIO_PROCESS, int(path.parent.name), -15)
        time.sleep(0.3)


def _too_long(*_: object) -> None:
    raise RuntimeError(f"the rehearsal has not ended in {LIMIT_S} s")


def _sentence(check: Callable[[Rehearsal], None]) -> str:
    return check.__name__.replace("_", " ")


if __name__ == "__main__":
    main()
