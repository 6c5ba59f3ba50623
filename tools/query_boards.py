"""Run every query of Grafana's dashboards on a real Prometheus while a training runs; report those without data.

python tools/query_boards.py [FOLDER]

An experiment is trained for some minutes, under a Ray session with a temporary folder of its own, which
Prometheus reads with the configuration of dashboards/. Afterwards every query of every board, and of every variable, is
queried for the time of the training. Needs `prometheus` on the PATH (Debian: apt-get install prometheus). The status is
1 if a query has no result that needs no GPU. FOLDER keeps what was written; without it, a temporary one is used.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ROOT / "dashboards"
RAYS_FOLDER = "/tmp/ray/"  # where the configuration looks for Ray's list of machines
INTERVAL = "1m"  # for $__rate_interval, which Grafana makes at least four times the 10 s between two scrapes
STEP_S = 5
START_S = 60
# On machines without GPUs nothing exports these.
OF_GPUS = re.compile(r"ray_node_gpu|ray_node_gram|Name=\"GPU\"")
# Each stage long enough for a few scrapes, and saved a few times; what needs no scrape is left out.
WORDS = (
    "experiment=smoke",
    "tracking.enabled=false",
    "cluster.checkpoint_every_tokens=16384",
    "stages.prepare.total_tokens=245760",
    "stages.dense.total_tokens=163840",
    "stages.moe.total_tokens=122880",
    "report.control=null",
    "~stages.control",
    "~stages.evaluate",
    "~stages.export",
)


@dataclass(frozen=True)
class BoardQuery:
    """A query of a panel or of a variable."""

    board: str
    title: str
    query: str

    @property
    def needs_gpu(self) -> bool:
        return OF_GPUS.search(self.query) is not None


def plain(query: str) -> str:
    """A query of a board as Prometheus knows it: with what Grafana puts in the place of its variables."""
    return re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", INTERVAL))


def board_queries() -> list[BoardQuery]:
    """All queries of the boards, in their order; of a variable, the metric that it lists a label of."""
    response_json = []
    for path in sorted((DASHBOARDS / "grafana" / "boards").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for variable in board["templating"]["list"]:
            metric = re.sub(r"label_values\((.*), \w+\)", r"\1", variable["query"]["query"])
            response_json.append(BoardQuery(path.stem, f"${variable['name']}", plain(metric)))
        for panel in board["panels"]:
            response_json += [
                BoardQuery(path.stem, panel["title"], plain(each["expr"])) for each in panel.get("targets", [])
            ]
    return response_json


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def prometheus(folder: Path, temporary: Path) -> Iterator[str]:
    """The address of a Prometheus that reads the machines of the Ray session in `temporary`."""
    config = folder / "prometheus.yml"
    text = (DASHBOARDS / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    assert RAYS_FOLDER in text
    config.write_text(text.replace(RAYS_FOLDER, f"{temporary}/ray/"), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(["prometheus", *words], stdout=log, stderr=log)
        try:
            _wait_until_ready(f"http://{address}", process, log.name)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(address: str, process: "subprocess.Popen[bytes]", log: str) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/-/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"error: {address}: Prometheus does not respond; see {log}")


def train(folder: Path, temporary: Path) -> None:
    """Run the experiment to its end, in a process of its own."""
    environment = {**os.environ, "RAY_TMPDIR": str(temporary)}
    words = [sys.executable, str(ROOT / "workflows" / "efficientscale.py"), *WORDS, f"paths.root={folder / 'runs'}"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment)
    try:
        status = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if status != 0:
        raise SystemExit(f"error: the training ended with status {status}")


def series_count(address: str, query: str, start: float, end: float) -> int:
    """In how many series a query has points between two times."""
    parameters = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": STEP_S})
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{parameters}", timeout=60) as response:
        response_json: dict[str, Any] = json.load(response)
    # A division by zero is no result.
    series = response_json["data"]["result"]
    return sum(any(value not in ("NaN", "+Inf", "-Inf") for _, value in each["values"]) for each in series)


def run_queries(address: str, start: float, end: float) -> list[BoardQuery]:
    """Print every query with the number of its series; return those without a result that need no GPU."""
    missing, queries = [], board_queries()
    for each in queries:
        count = series_count(address, each.query, start, end)
        result = f"{count} series" if count else "needs a GPU" if each.needs_gpu else "NO DATA"
        print(f"{each.board:<9} {each.title:<40} {result}")
        if not count and not each.needs_gpu:
            missing.append(each)
    gpus = sum(each.needs_gpu for each in queries)
    print(f"\n{len(queries) - gpus - len(missing)} of {len(queries) - gpus} queries have data; {gpus} more need a GPU")
    return missing


def main() -> None:
    if shutil.which("prometheus") is None:
        raise SystemExit("error: no prometheus on the PATH (Debian: apt-get install prometheus)")
    kept = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(prefix="boards-") as temporary:  # short: sockets of Ray's lie in it
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with prometheus(folder, Path(temporary)) as address:
            start = time.time()
            train(folder, Path(temporary))
            missing = run_queries(address, start, time.time())
    for each in missing:
        print(f"no data: {each.board}, {each.title}: {each.query}", file=sys.stderr)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
