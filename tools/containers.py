"""Containers without Docker: processes with a network, mounts and a user of their own (Linux, as root).

To be used inside `unshare --net --mount --pid --fork --kill-child --mount-proc`: what is started here can bind no port
of the machine, and ends with the process that started it. A container sees the machine's own programs; /tmp, /run, the
volumes and the names of other machines are its own.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import container_names

SUBNET, GATEWAY = "172.30.7", "172.30.7.1"
# Of this machine's folders a container sees only those with programs and their settings.
MACHINE = ("bin", "sbin", "lib", "lib32", "lib64", "usr", "etc", "var")


def call(*words: str, **options: object) -> str:
    """What a command prints; RuntimeError with its output if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: status {done.returncode}: {done.stderr.strip()}")
    return str(done.stdout)


@dataclass
class Network:
    """One bridge for all containers; every container is known to the others by its name.

    folder: for the containers' files. shown: what every container sees beside MACHINE, by its path in the container.
    """

    folder: Path
    shown: Mapping[str, Path]
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "bridge", "type", "bridge")
        call("ip", "address", "add", f"{GATEWAY}/24", "dev", "bridge")
        call("ip", "link", "set", "bridge", "up")
        # Requests to the outside are refused at once, instead of timing out.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        container_names.serve(GATEWAY, {name: self.address(name) for name in self.names})
        (self.folder / "resolv.conf").write_text(f"nameserver {GATEWAY}\n")
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")

    def address(self, name: str) -> str:
        return f"{SUBNET}.{self.names.index(name) + 10}"


class Container:
    """One of the names of a network.

    volumes: folder here by path in the container. secrets: contents by name, read-only files in /run/secrets.
    user: `uid:gid`.
    """

    def __init__(
        self, network: Network, name: str, user: str, volumes: Mapping[str, Path], secrets: Mapping[str, str]
    ) -> None:
        self.name, self.network, self.user = name, network, user
        self.root, self.log_path = network.folder / "roots" / name, network.folder / "logs" / f"{name}.log"
        self.root.mkdir(parents=True)
        self.log_path.parent.mkdir(exist_ok=True)
        self.main: subprocess.Popen[bytes] | None = None
        self.restarts = 0
        script = network.folder / f"{name}.sh"
        script.write_text("\n".join(["set -eu", *self._mounts(volumes, secrets)]) + "\n")
        words = ["unshare", "--net", "--mount", "--uts", "--ipc", "sh", str(script)]
        self.holder = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name}: its file system could not be made; its script is {script}")
        self._connect()

    def _mounts(self, volumes: Mapping[str, Path], secrets: Mapping[str, str]) -> list[str]:
        """Shell: a new root of this machine's folders, with its own temporary ones; then wait in it."""
        root, (uid, gid) = self.root, self.user.split(":")
        lines = [f"mount -t tmpfs -o mode=755 tmpfs {root}"]
        for path in sorted(Path("/").iterdir()):
            if path.is_symlink():
                lines.append(f"ln -s {path.readlink()} {root}{path}")
            elif path.name in MACHINE:
                lines.append(f"mkdir {root}{path} && mount --rbind {path} {root}{path}")
        lines += [f"mkdir -m 755 {root}/{name} && mount --rbind /{name} {root}/{name}" for name in ("proc", "dev")]
        lines += [f"mkdir -m 1777 {root}/tmp", f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm"]
        lines += [f"mkdir -p -m 755 {root}/run/secrets {root}/home/user", f"chown {self.user} {root}/home/user"]
        for target, source in {**self.network.shown, **volumes}.items():
            if target.split("/")[1] not in MACHINE:
                new = "mkdir -p" if source.is_dir() else f"mkdir -p {root}{Path(target).parent} && touch"
                lines.append(f"{new} {root}{target}")
            lines.append(f"mount --bind {source} {root}{target}")
        for name, secret in secrets.items():
            secret_file = self.network.folder / "secrets" / self.name / name
            secret_file.parent.mkdir(parents=True, exist_ok=True)
            secret_file.write_text(secret)
            secret_file.chmod(0o400)
            os.chown(secret_file, int(uid), int(gid))
            lines.append(f"touch {root}/run/secrets/{name} && mount --bind {secret_file} {root}/run/secrets/{name}")
        for file in ("resolv.conf", "hosts"):
            lines.append(f"mount --bind {self.network.folder}/{file} {root}/etc/{file}")
        lines += [f"hostname {self.name}", "echo ready"]
        return [*lines, f"exec chroot {root} sleep infinity >/dev/null"]

    def _connect(self) -> None:
        outer, pid = f"veth{self.network.names.index(self.name)}", str(self.holder.pid)
        call("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", pid)
        call("ip", "link", "set", outer, "master", "bridge", "up")
        inside = (
            f"ip link set lo up; ip address add {self.network.address(self.name)}/24 dev eth0; ip link set eth0 up; "
            f"ip route add default via {GATEWAY}"
        )
        call("nsenter", "--target", pid, "--net", "sh", "-ec", inside)

    def words(self, command: Sequence[str], user: str | None = None) -> list[str]:
        """What runs a command inside: as its user, with no capabilities and no way to get any."""
        uid, gid = (user or self.user).split(":")
        return [
            *("nsenter", "--target", str(self.holder.pid), "--net", "--mount", "--uts", "--ipc", "--root"),
            *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"),
            *("--bounding-set=-all", "env", "--chdir=/app", *command),
        ]

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Its main process, whose output goes to its log."""
        self._what = (self.words(command), dict(environment))
        self._start()

    def restart(self) -> None:
        """Start the main process again, as it was."""
        self.restarts += 1
        self._start()

    def _start(self) -> None:
        words, environment = self._what
        with self.log_path.open("ab") as log:
            self.main = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def has_ended(self) -> bool:
        return self.main is not None and self.main.poll() is not None

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float = 60.0
    ) -> "subprocess.CompletedProcess[str]":
        """Another process inside, to its end; status 124 after the timeout."""
        words = ["timeout", "--signal=KILL", str(timeout_s), *self.words(command)]
        return subprocess.run(words, env=dict(environment), capture_output=True, text=True)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def is_healthy(self, check: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> bool:
        return not self.has_ended and self.run(check, environment, timeout_s).returncode == 0


def prepare_folder(path: Path, user: str) -> Path:
    """A folder that belongs to the user."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.chown(path, *map(int, user.split(":")))
    return path
