"""The checks of tools/rehearse_compose.py on running services and on what a run left. A check raises if it fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rehearsal import Rehearsal

LINE = ["moe", "scale_out", "dense", "scale_up", "prepare"]  # the experiment's checkpoints, back to the first

STATUS = """
import sys, urllib.error, urllib.request
url, headers = sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:])
try:
    print(urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
RUNS = """
import json, sys, psycopg2
with psycopg2.connect(host="postgres", user="mlflow", dbname="mlflow", **json.loads(sys.argv[1])) as connection:
    cursor = connection.cursor()
    cursor.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    print(cursor.fetchone()[0])
"""
OBJECTS = """
import json, os, sys, boto3
client, secrets = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"]), json.loads(sys.argv[1])
keys = [entry["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        for entry in page.get("Contents", [])]
leaks = [key for key in keys if any(secret.encode() in client.get_object(Bucket="mlflow", Key=key)["Body"].read()
                                   for secret in secrets)]
print(json.dumps([keys, leaks]))
"""
ANCESTORS = """
import json, mlflow
client = mlflow.MlflowClient("http://mlflow:5000")
experiments = [experiment.experiment_id for experiment in client.search_experiments()]
models = client.search_logged_models(experiments, "name = 'moe'")
line = [models[0]]
while inputs := client.get_run(line[-1].source_run_id).inputs.model_inputs:
    line.append(client.get_logged_model(inputs[0].model_id))
print(json.dumps([model.name for model in line]))
"""


def mlflow_serves_its_own_names_and_refuses_foreign_ones(rehearsal: "Rehearsal") -> None:
    url = "http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1"
    for host, expected in (("mlflow:5000", "200"), ("localhost:5000", "200"), ("evil.example", "403")):
        _expect(f"Host: {host}", _output_of(rehearsal, "driver", STATUS, url, f"Host={host}"), expected)


def the_dashboard_refuses_who_has_no_token(rehearsal: "Rehearsal") -> None:
    url, token = "http://ray-head:8265/api/version", rehearsal.secrets["ray_token"]
    _expect("no token", _output_of(rehearsal, "driver", STATUS, url), "401")
    _expect("a wrong token", _output_of(rehearsal, "driver", STATUS, url, "Authorization=Bearer wrong"), "403")
    _expect("the token", _output_of(rehearsal, "driver", STATUS, url, f"Authorization=Bearer {token}"), "200")


def the_cluster_refuses_a_process_without_the_token(rehearsal: "Rehearsal") -> None:
    environment = rehearsal.environment(rehearsal.services["driver"])
    status = ["ray", "status", "--address=ray-head:6379"]
    right = rehearsal.containers["driver"].run(status, environment)
    _expect(f"with the token ({right.stderr[-500:]})", str(right.returncode), "0")
    for changes in ({"RAY_AUTH_TOKEN_PATH": "/dev/null", "RAY_AUTH_TOKEN": "wrong"}, {"RAY_AUTH_MODE": "disabled"}):
        refused = rehearsal.containers["driver"].run(status, {**environment, **changes})
        if refused.returncode == 0 or "oken" not in refused.stdout + refused.stderr:
            raise RuntimeError(f"{changes}: status {refused.returncode}: {(refused.stdout + refused.stderr)[-1500:]}")


def postgres_refuses_a_wrong_password(rehearsal: "Rehearsal") -> None:
    service = rehearsal.services["mlflow"]
    words = ["python", "-c", RUNS, json.dumps({"password": "wrong"})]
    refused = rehearsal.containers["mlflow"].run(words, rehearsal.environment(service))
    if refused.returncode == 0 or "password authentication failed" not in refused.stderr:
        raise RuntimeError(f"not refused: {refused.stdout}{refused.stderr[-500:]}")


def no_command_line_and_no_environment_of_a_service_has_a_secret(rehearsal: "Rehearsal") -> None:
    lines = list(_command_lines())
    if len(lines) < 20:
        raise RuntimeError(f"only {len(lines)} processes are seen")
    leaks = [line for line in lines if any(secret in line for secret in rehearsal.secrets.values())]
    leaks += [str(one.environment) for one in rehearsal.services.values() if _leaks(rehearsal, str(one.environment))]
    _expect("secrets in command lines", str(leaks), "[]")


def every_stage_is_complete_and_the_report_is_written(rehearsal: "Rehearsal") -> None:
    runs = rehearsal.folder / "volumes" / "runs"
    stages = sorted(path.name for path in (runs / "stages").iterdir())
    complete = sorted(path.parent.name for path in (runs / "stages").glob("*/record.json"))
    if stages != complete or len(complete) < 11:
        raise RuntimeError(f"of {stages} only {complete} are complete")
    if (runs / "reports" / "smoke" / "index.html").stat().st_size < 10_000:
        raise RuntimeError("the report is empty")


def the_runs_are_in_postgres(rehearsal: "Rehearsal") -> None:
    entry = ("python", "/app/deploy/entrypoint.py")
    found = _output_of(rehearsal, "mlflow", RUNS, "{}", entry=entry)
    if int(found) < 12:  # eleven stages, and the pipeline
        raise RuntimeError(f"{found} finished runs")


def the_artifacts_are_in_s3_and_have_no_secret(rehearsal: "Rehearsal") -> None:
    secrets = json.dumps(list(rehearsal.secrets.values()))
    entry = ("python", "/app/deploy/entrypoint.py")
    keys, leaks = json.loads(_output_of(rehearsal, "mlflow", OBJECTS, secrets, entry=entry))
    names = {key.rsplit("/", 1)[-1] for key in keys}
    if not {"index.html", "lineage.html", "record.json", "recipe.json"} <= names:
        raise RuntimeError(f"only {sorted(names)}")
    _expect("objects with a secret", str(leaks), "[]")


def mlflow_knows_the_ancestors_of_the_last_checkpoint(rehearsal: "Rehearsal") -> None:
    _expect("the line", _output_of(rehearsal, "driver", ANCESTORS), json.dumps(LINE))


def no_file_and_no_log_has_a_secret(rehearsal: "Rehearsal") -> None:
    folders = [rehearsal.folder / "volumes", rehearsal.folder / "logs"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    if len(files) < 100:
        raise RuntimeError(f"only {len(files)} files are seen")
    leaks = [str(path) for path in files if _leaks_bytes(rehearsal, path)]
    _expect("files with a secret", str(leaks), "[]")
    for name, container in rehearsal.containers.items():  # Ray's logs are in the containers' own /tmp
        grep = ["grep", "-rlF", *(f"--regexp={secret}" for secret in rehearsal.secrets.values()), "/tmp"]
        _expect(f"/tmp of {name}", container.run(grep, {"PATH": "/usr/bin:/bin"}).stdout, "")


def prometheus_reads_the_cluster(rehearsal: "Rehearsal") -> None:
    if "prometheus" not in rehearsal.containers:
        return
    get = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())"
    targets = json.loads(_output_of(rehearsal, "prometheus", get, "http://127.0.0.1:9090/api/v1/targets"))["data"]
    up = {target["labels"]["instance"] for target in targets["activeTargets"] if target["health"] == "up"}
    expected = {f"{rehearsal.network.address(name)}:8080" for name in ("ray-head", "ray-worker")}
    if not expected <= up:
        raise RuntimeError(f"of {sorted(expected)} only {sorted(up)} respond")


def _output_of(rehearsal: "Rehearsal", name: str, program: str, *words: str, entry: tuple[str, ...] = ()) -> str:
    """What a Python program prints inside the container of a service, with the service's environment."""
    environment = rehearsal.environment(rehearsal.services[name])
    done = rehearsal.containers[name].run([*entry, "python", "-c", program, *words], environment, 100)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def _expect(what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise RuntimeError(f"{what}: {actual}, expected {expected}")


def _leaks(rehearsal: "Rehearsal", text: str) -> bool:
    return any(secret in text for secret in rehearsal.secrets.values())


def _leaks_bytes(rehearsal: "Rehearsal", path: Path) -> bool:
    content = path.read_bytes()
    return any(secret.encode() in content for secret in rehearsal.secrets.values())


def _command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended while we looked
            continue


BEFORE = [
    mlflow_serves_its_own_names_and_refuses_foreign_ones,
    the_dashboard_refuses_who_has_no_token,
    the_cluster_refuses_a_process_without_the_token,
    postgres_refuses_a_wrong_password,
    no_command_line_and_no_environment_of_a_service_has_a_secret,
]
AFTER = [
    every_stage_is_complete_and_the_report_is_written,
    the_runs_are_in_postgres,
    mlflow_knows_the_ancestors_of_the_last_checkpoint,
    prometheus_reads_the_cluster,
    no_command_line_and_no_environment_of_a_service_has_a_secret,
    no_file_and_no_log_has_a_secret,
    the_artifacts_are_in_s3_and_have_no_secret,
]
