"""docker-compose.yml, the image, and the Kubernetes manifest: what they promise, and that they fit what they run."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import compose_file
import rehearse_compose
from aquilamoe.config import graph
from compose_file import ComposeError, Service

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / ".rehearsal" / "compose-spec.json"
SECRETS = {name: f"{name.lower()}-f3a9" for name in compose_file.read_env(ROOT / ".env.example")}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    return compose_file.load(SECRETS)


@pytest.fixture(scope="module")
def services(file: dict[str, Any]) -> dict[str, Service]:
    return compose_file.services(file)


@pytest.mark.skipif(not SCHEMA.exists(), reason="no schema here: tools/rehearse_compose.sh fetches it, and checks, too")
def test_the_file_is_valid_by_the_schema_of_the_compose_specification(file: dict[str, Any]) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert compose_file.violations(file, schema) == []
    file = {**file, "services": {**file["services"], "x": {"image": "a", "comand": ["b"]}}}
    assert compose_file.violations(file, schema) != []


def test_what_the_rehearsal_gives_the_driver_is_an_experiment_with_every_stage(
    compose: Callable[..., dict[str, Any]],
) -> None:
    words = [word.replace("experiment=", "+experiment=") for word in rehearse_compose.WORDS]
    nodes = graph.build(graph.parse(compose("cluster=compose", *words)))
    assert nodes.keys() == compose()["stages"].keys()


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", [None, ""])
def test_nothing_starts_without_each_of_the_secrets(name: str, value: str | None) -> None:
    others = {key: secret for key, secret in SECRETS.items() if key != name} | ({} if value is None else {name: value})
    with pytest.raises(ComposeError, match=rf"^{name} is not set: set it in \.env - see \.env\.example$"):
        compose_file.load(others)


def test_the_example_names_every_variable_of_the_file_and_sets_no_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    used = {match["bare"] or match["name"] for match in compose_file.VARIABLE.finditer(text) if not match["dollar"]}
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", example, re.MULTILINE))
    assert set(compose_file.read_env(ROOT / ".env.example").values()) == {""}
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    assert dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", example, re.MULTILINE)) == {
        **{name: value for name, value in defaults.items() if name != "DATA_FOLDER"},
        "DATA_FOLDER": "/srv/corpus",
    }


def test_git_ignores_what_has_the_secrets() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_ports_are_published_on_loopback_only_and_those_of_the_stores_on_none(services: dict[str, Service]) -> None:
    ports = {name: service.ports for name, service in services.items() if service.ports}
    assert ports.keys() == {"ray-head", "mlflow", "prometheus", "grafana"}
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for of_service in ports.values() for port in of_service)


def test_no_service_has_a_secret_but_as_a_file(file: dict[str, Any], services: dict[str, Service]) -> None:
    assert not any(secret in json.dumps(file["services"]) for secret in SECRETS.values())
    assert compose_file.secrets(file, SECRETS).keys() == {name for each in services.values() for name in each.secrets}
    for service in services.values():
        named = re.findall(r"/run/secrets/(\w+)", json.dumps(service.raw))
        assert set(named) == set(service.secrets), service.name


def test_every_service_is_bounded_and_can_do_only_what_its_user_may(services: dict[str, Service]) -> None:
    for service in services.values():
        assert service.user not in ("", "root") and not service.user.startswith("0"), service.name
        assert service.raw["cap_drop"] == ["ALL"] and service.raw["security_opt"] == ["no-new-privileges:true"]
        assert service.raw["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, service.name
        assert not {"privileged", "network_mode", "pid", "cap_add"} & service.raw.keys(), service.name


def test_every_image_is_built_here_or_has_a_tag_with_its_version(services: dict[str, Service]) -> None:
    for service in services.values():
        assert "build" in service.raw or re.search(r":v?\d+\.\d+(\.\d+)?", service.image), service.name
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) + re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.M)
    assert [base for base in bases if ":" in base] == ["versity/versitygw:v1.8.0", "python:3.11.15-slim-bookworm"]


def test_services_that_stay_have_a_health_check_and_others_wait_for_it(services: dict[str, Service]) -> None:
    once = {"driver", "bucket"}
    for name, service in services.items():
        assert (not service.health) == (not service.restarts) == (name in once), name
        for other, condition in service.needs.items():
            assert condition == ("service_completed_successfully" if other in once else "service_healthy")
            assert set(services[other].networks) & set(service.networks), f"{name} cannot reach {other}"


def test_networks_and_volumes_are_declared_and_the_stores_are_cut_off(
    file: dict[str, Any], services: dict[str, Service]
) -> None:
    assert {network for service in services.values() for network in service.networks} == file["networks"].keys()
    named = {source for each in services.values() for source in each.mounts.values() if source[0] not in "./"}
    assert named == file["volumes"].keys()
    assert file["networks"]["storage"] == {"internal": True}
    assert {name for name, each in services.items() if each.networks == ("storage",)} == {"s3", "postgres", "bucket"}


def test_what_is_mounted_from_here_is_here_and_grafana_gets_the_variables_of_its_files(
    services: dict[str, Service],
) -> None:
    paths = [source for each in services.values() for source in each.mounts.values() if source[0] in "./"]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    variables = {
        name
        for path in (ROOT / "dashboards" / "grafana" / "provisioning").rglob("*.yml")
        for name in re.findall(r"^[^#]*: \$(\w+)", path.read_text(), re.MULTILINE)
    }
    assert variables and variables <= services["grafana"].environment.keys()
    assert services["grafana"].environment["BOARDS"] in services["grafana"].mounts


def test_prometheus_reads_the_port_of_rays_nodes(services: dict[str, Service]) -> None:
    config = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())
    (found,) = [each["dns_sd_configs"][0] for each in config["scrape_configs"] if "dns_sd_configs" in each]
    assert set(found["names"]) == {"ray-head", "ray-worker", "ray-worker-gpu"}
    for name in found["names"]:
        assert f"--metrics-export-port={found['port']}" in services[name].command
        assert set(services[name].networks) & set(services["prometheus"].networks)


def test_the_workers_of_both_profiles_differ_in_their_devices_only(services: dict[str, Service]) -> None:
    cpu, gpu = services["ray-worker"], services["ray-worker-gpu"]
    assert (cpu.profiles, gpu.profiles) == (("cpu",), ("gpu",))
    differ = {key for key in cpu.raw.keys() | gpu.raw.keys() if cpu.raw.get(key) != gpu.raw.get(key)}
    assert differ == {"image", "build", "profiles", "command", "shm_size", "deploy"}
    assert [a for a, b in zip(cpu.command, gpu.command, strict=True) if a != b] == ["--num-gpus=0"]
    (device,) = gpu.raw["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "1", "capabilities": ["gpu"]}


def test_rays_processes_require_the_token_that_they_get(services: dict[str, Service]) -> None:
    for service in (each for each in services.values() if "ray" in each.command or each.name == "driver"):
        assert service.environment["RAY_AUTH_MODE"] == "token"
        assert service.environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert set(services["ray-worker"].command) & {"--address=ray-head:6379"}
    assert services["driver"].environment["CLUSTER_ADDRESS"] == "ray-head:6379"


def test_the_image_has_what_its_services_call_and_is_given_nothing_else(services: dict[str, Service]) -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \./\w*$", DOCKERFILE, re.MULTILINE)
    named = {word for line in copied for word in line.split()}
    let_in = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert named == let_in and all((ROOT / name).exists() for name in named)
    for service in services.values():
        for path in re.findall(r"/app/([\w./-]+)", json.dumps(service.raw)):
            assert (ROOT / path).is_file() and path.split("/")[0] in named, path
    targets = {each.raw["build"]["target"] for each in services.values() if "build" in each.raw}
    assert targets <= set(re.findall(r"^FROM .* AS (\S+)$", DOCKERFILE, re.MULTILINE))
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    assert [stage.split()[2] for stage in stages[1:] if "\nUSER 1000:1000" in stage] == ["platform", "s3"]


@pytest.mark.parametrize("name", ["compose", "kuberay"])
def test_a_cluster_of_containers_is_the_local_one_but_for_where_and_how_large(
    compose: Callable[..., dict[str, Any]], name: str
) -> None:
    found, local = compose(f"cluster={name}")["cluster"], compose()["cluster"]
    assert found.keys() == local.keys()
    differ = {key for key in found if found[key] != local[key]}
    sizes = {"cpus_per_worker", "gpus_per_worker", "device_flops_per_s", "kernel_efficiency", "device_watts"}
    assert differ == {"address", *(sizes if name == "kuberay" else {"flops_per_s"})}


def test_the_driver_takes_the_cluster_from_its_environment(
    services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    given = {"CLUSTER_ADDRESS": "head:1", "CLUSTER_WORKERS": "3", "CLUSTER_CPUS_PER_WORKER": "4"}
    given["CLUSTER_GPUS_PER_WORKER"] = "1"
    assert given.keys() < services["driver"].environment.keys()
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    config = OmegaConf.load(ROOT / "conf" / "cluster" / "compose.yaml")
    assert (config.address, config.workers, config.cpus_per_worker, config.gpus_per_worker) == ("head:1", 3, 4, 1)


# Variables, as the Compose specification fills them in


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("a ${X} $X b", "1", "a 1 1 b"),
        ("${X:-d}", None, "d"),
        ("${X:-d}", "", "d"),
        ("${X-d}", "", ""),
        ("${X:+i}", "1", "i"),
        ("${X:+i}", "", ""),
        ("${X:?m}", "1", "1"),
        ("${X?m}", "", ""),
        ("$$X $$(cat $${X})", "1", "$X $(cat ${X})"),
        ("$X", None, ""),
    ],
)
def test_a_variable_is_filled_in(text: str, value: str | None, expected: str) -> None:
    assert compose_file.substitute(text, {} if value is None else {"X": value}) == expected


# What the containers call


def entrypoint(tmp_path: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """deploy/entrypoint.py, with a folder of secrets that may be written here."""
    program = (ROOT / "deploy" / "entrypoint.py").read_text().replace("/run/secrets", str(tmp_path))
    (tmp_path / "entrypoint.py").write_text(program)
    command = [sys.executable, str(tmp_path / "entrypoint.py"), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_command_finds_secrets_in_its_environment_and_other_files_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("swordfish\n")
    given = {"PGPASSWORD_FILE": str(tmp_path / "password"), "OTHER_FILE": "/etc/hostname", "PLAIN": "1"}
    done = entrypoint(tmp_path, sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))", **given)
    found = json.loads(done.stdout)
    assert (found["PGPASSWORD"], found["OTHER_FILE"], found["PLAIN"]) == ("swordfish", "/etc/hostname", "1")
    assert "PGPASSWORD_FILE" not in found


def test_the_status_of_the_command_is_that_of_the_container(tmp_path: Path) -> None:
    assert entrypoint(tmp_path, "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize(("content", "problem"), [(None, "cannot be read"), ("\n", "is empty"), (b"\xff", "cannot be")])
def test_a_secret_that_is_missing_is_one_line(tmp_path: Path, content: str | bytes | None, problem: str) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = entrypoint(tmp_path, "true", PGPASSWORD_FILE=str(path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: PGPASSWORD_FILE: {path} {problem}") and done.stderr.count("\n") == 1


@pytest.fixture
def server() -> Iterator[str]:
    """A server that has / and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=functools.partial(listening.serve_forever, 0.05), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_health_check_succeeds_only_for_what_responds(server: str) -> None:
    statuses = {}
    for url in (f"{server}/", f"{server}/missing", "http://127.0.0.1:9/", f"{server}/ {server}/missing"):
        words = [sys.executable, str(ROOT / "deploy" / "health_check.py"), *url.split()]
        statuses[url] = subprocess.run(words, capture_output=True).returncode
    assert list(statuses.values()) == [0, 1, 1, 1]


# Kubernetes


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay-rayjob.yaml").read_text())
    return found


def test_the_job_has_the_structure_of_a_rayjob_with_token_authentication(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
    for group in cluster["workerGroupSpecs"]:
        assert {"groupName", "replicas", "minReplicas", "maxReplicas"} <= group.keys()


def test_the_job_requests_the_cluster_that_its_manifest_makes(
    job: dict[str, Any], compose: Callable[..., dict[str, Any]]
) -> None:
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/app/workflows/efficientscale.py"]
    cluster = compose(*(f"+{word}" if word.startswith("experiment=") else word for word in words[2:]))["cluster"]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert cluster["workers"] == group["replicas"] and cluster["address"] == "auto"
    assert (cluster["cpus_per_worker"], cluster["gpus_per_worker"]) == (
        int(limits["cpu"]),
        int(limits["nvidia.com/gpu"]),
    )
    assert {"name": "runs", "mountPath": words[3].removeprefix("paths.root=")} in container["volumeMounts"]
