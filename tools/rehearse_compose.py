"""Every service of docker-compose.yml as a container without Docker, and one run of the pipeline through all of them.

Called by tools/rehearse_compose.sh, which says what it needs and installs it. Commands, environments, users, secrets,
volumes, health checks and the order of the services are those of the file; where a program cannot be had here, the
rehearsal says which one stands in for it.
"""

import argparse
import contextlib
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import compose_checks
import compose_file
from compose_file import ROOT, Service
from containers import Container, Network, call, prepare_folder

ORDER = ("ray-head", "s3", "postgres", "ray-worker", "bucket", "mlflow", "prometheus", "driver")
NOT_HERE = {"grafana": "no package of it here; its files are tested in tests/", "ray-worker-gpu": "no GPU here"}
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
# A machine that others use, too, is slower than the file and Ray allow for.
PATIENCE = 6
LIMIT_S = 1500
HELPERS = (b"dashboard/agent.py", b"runtime_env/agent/main.py")
PAUSE_S = 3.0  # between two health checks, each of which is a process that takes from what is starting
PATIENT = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "200",
    "RAY_raylet_start_wait_time_s": "40",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
POSTGRES = """
initdb --pgdata=/volume --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" $POSTGRES_INITDB_ARGS >/dev/null
echo 'host all all all scram-sha-256' >> /volume/pg_hba.conf
echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D /volume postgres >/dev/null
exec "$@" -D /volume -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


class Rehearsal:
    """The services that stand, and what they are known by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given = {name: secrets.token_hex(16) for name in compose_file.read_env(ROOT / ".env.example")}
        values = compose_file.load(self.given)
        self.services = compose_file.services(values)
        self.secrets = compose_file.secrets(values, self.given)
        self.image = _image_environment()
        self.network = Network(folder, self._shown(), [name for name in self.services if name not in NOT_HERE])
        self.containers: dict[str, Container] = {}

    def _shown(self) -> dict[str, Path]:
        """What the image has: what its Dockerfile copies, and the environment of packages; Python is this machine's."""
        packages = Path(sys.prefix).resolve()
        here = {str(path): path for path in (packages, Path(sys.base_prefix)) if not path.is_relative_to("/usr")}
        app = self.folder / "app"
        for name in re.findall(r"^COPY (\w+) \./\w+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
            shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
        return {**here, "/app": app, "/opt/venv": packages}

    def environment(self, service: Service) -> dict[str, str]:
        """As a container has it: of the image, then of the service."""
        return {"HOME": "/home/user", "LANG": "C.UTF-8", **PATIENT, **self.image, **service.environment}

    def start(self, name: str) -> None:
        """Make the container, and start what the file says in it, or what stands in for it."""
        service = self.services[name]
        user = service.user if ":" in service.user else _ids(service.user)
        volumes = {
            target: prepare_folder(self.folder / "volumes" / source, user) if source[0] not in "./" else ROOT / source
            for target, source in service.mounts.items()
        }
        command = [*service.entrypoint, *service.command]
        if name == "postgres":
            volumes = {"/volume": next(iter(volumes.values()))}
            command = ["sh", "-euc", POSTGRES, "postgres", *service.command]
        elif name == "s3":
            command = ["python", "-m", "moto.server", "-H", "0.0.0.0", "-p", "7070"]
        elif name == "prometheus":
            command = ["prometheus", *service.command]
        elif service.image.startswith("efficientscale:") and not service.entrypoint:
            command = ["python", "/app/deploy/entrypoint.py", *service.command]
        own = {secret: self.secrets[secret] for secret in service.secrets}
        self.containers[name] = Container(self.network, name, user, volumes, own)
        if name != "driver":
            self.containers[name].start(command, self.environment(service))

    def tend(self) -> None:
        """Start again what ended and has a policy for that, as Docker would. RuntimeError after eight times."""
        for name, container in self.containers.items():
            if self.services[name].restarts and container.has_ended:
                if container.restarts == 8:
                    raise RuntimeError(f"{name} ends again and again:\n{container.log()[-3000:]}")
                container.restart()
                print(f"          {name}: ended and was started again", flush=True)

    def await_health(self, name: str) -> None:
        """RuntimeError with the end of its log if it is not healthy in the time that the file gives it."""
        service, container = self.services[name], self.containers[name]
        check = list(service.health)
        if check[0] == "wget":  # which this machine may lack; moto has no page for health
            url = check[-1] if name != "s3" else "http://127.0.0.1:7070/moto-api/"
            check = ["python", "/app/deploy/answers.py", url]
        environment, end = self.environment(service), time.monotonic() + PATIENCE * service.patience_s
        while not container.is_healthy(check, environment, PATIENCE * service.check_s):
            if time.monotonic() > end:
                raise RuntimeError(f"{name} is not healthy:\n{container.log()[-3000:]}")
            self.tend()
            time.sleep(PAUSE_S)

    def await_end(self, name: str, timeout_s: float) -> None:
        main = self.containers[name].main
        assert main is not None
        if main.wait(timeout_s) != 0:
            raise RuntimeError(f"{name} ended with {main.returncode}:\n{self.containers[name].log()[-3000:]}")

    def drive(self, *words: str) -> str:
        """One run of the driver with these words in place of the service's own; what it printed."""
        driver = self.services["driver"]
        done = self.containers["driver"].run([*driver.entrypoint, *words], self.environment(driver), PATIENCE * 120)
        if done.returncode != 0:
            logs = "\n".join(f"== {name}\n{one.log()[-1500:]}" for name, one in self.containers.items())
            raise RuntimeError(f"the driver ended with {done.returncode}:\n{done.stdout}{done.stderr}\n{logs}")
        return done.stdout + done.stderr


def _image_environment() -> dict[str, str]:
    """What the last ENV of the Dockerfile sets, on a PATH with PostgreSQL's own programs."""
    line = re.findall(r"^ENV (PATH=.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    path = f"/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:{programs}"
    return dict(word.replace("$PATH", path).split("=", 1) for word in shlex.split(line))


def _ids(user: str) -> str:
    found = pwd.getpwnam(user)
    return f"{found.pw_uid}:{found.pw_gid}"


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """A line with the seconds that it took."""
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)


def stand(rehearsal: Rehearsal) -> None:
    """Start the services one by one, each when those before it are as the file wants them.

    Docker starts at once what needs nothing; but a raylet gives its helpers fixed seconds to start, which two cores do
    not grant to everything together.
    """
    ready: dict[str, str] = {}
    for name in ORDER:
        if name == "prometheus" and not _has_prometheus():
            print("          prometheus: not here, or no dashboards/prometheus: left out", flush=True)
            continue
        service = rehearsal.services[name]
        lacking = {other: how for other, how in service.needs.items() if ready.get(other) != how}
        if lacking:
            raise RuntimeError(f"{name}: the file wants {lacking} before it, there are {ready}")
        rehearsal.start(name)
        if name == "driver":
            continue
        if name == "bucket":
            with said(f"{name}: done, as {service.user}"):
                rehearsal.await_end(name, PATIENCE * 20)
            ready[name] = "service_completed_successfully"
        else:
            with said(f"{name}: healthy, as {service.user}"):
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
    with said("all services"):
        stand(rehearsal)
    for check in compose_checks.BEFORE:
        with said(_sentence(check)):
            check(rehearsal)
    with said("driver: the pipeline through cluster=compose"):
        output = rehearsal.drive(*WORDS)
    print(output[-1500:])
    for check in compose_checks.AFTER:
        with said(_sentence(check)):
            check(rehearsal)
    print("Everything that docker-compose.yml promises and that can be had here was seen.")


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
