"""The services of docker-compose.yml, standing without Docker: containers, networks, secrets."""

import pwd
import re
import secrets
import shlex
import shutil
import sys
import time
from pathlib import Path

import compose_file
from compose_file import ROOT, Service
from containers import Container, Network, prepare_folder

NOT_HERE = {"grafana": "no package of it here; its files are tested in tests/", "ray-worker-gpu": "no GPU here"}
# A machine that others use, too, is slower than the file and Ray allow for.
PATIENCE = 6
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
        self.variables = {name: secrets.token_hex(16) for name in compose_file.read_env(ROOT / ".env.example")}
        values = compose_file.load(self.variables)
        self.services = compose_file.services(values)
        self.secrets = compose_file.secrets(values, self.variables)
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
        """Make the container, and start what the file defines in it, or what stands in for it."""
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
            check = ["python", "/app/deploy/health_check.py", url]
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
        """One run of the driver with these arguments in place of the service's own; what it printed."""
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
