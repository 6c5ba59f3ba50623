"""Make the pictures of docs/seeing.md and docs/findings.md, in a browser without a screen.

python tools/pictures.py [ROOT [NAME [TARGET]]]

ROOT is a run's `paths.root` (runs), NAME an experiment of it (embedded) or an ablation, TARGET a folder
(docs/pictures). Of an experiment: its pages, its curves and its run in MLflow. Of an ablation: MLflow's page
that compares its variants, as if they were ticked. MLflow is started on ROOT's own database, on a free port of this
machine alone, and ended again. Needs chromium and chromium-driver. The status is 1 if a page does not draw in time.
"""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aquilamoe.tracking.queries import comparison_url
from browser import Browser, missing

# What MLflow opens beside the page in a browser that is new to it.
PANEL = "document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')"
WAIT_S = 300  # for a server, and for what a page of MLflow draws
SETTLE_S = 3.0  # after which a page that no longer changes is complete
# Conditions and acts in MLflow's pages.
LINES = "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length > 1"
PARALLEL = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0"
FIGURE = "[...document.images].some(each => each.src.includes('get-artifact') && each.naturalWidth)"
MORE = "[...document.querySelectorAll('button')].find(each => each.textContent.trim() === 'Show more')"
SHOW_MORE = f"{MORE} && {MORE}.click()"
# Name of the picture, page, width, whether in dark colours, height.
PAGES = (
    ("pipeline", "index.html", 1280, False, 1250),
    ("lineage", "lineage.html", 1280, False, 1000),
    ("router", "router.html", 1280, True, 1000),
)


def main() -> None:
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    words, defaults = sys.argv[1:], ("runs", "embedded", "docs/pictures")
    root, name, folder = [*words, *defaults[len(words) :]]
    pages, study = Path(root) / "reports" / name, Path(root) / "ablations" / name / "summary.json"
    if not (pages / "index.html").exists() and not study.exists():
        raise SystemExit(f"error: {pages / 'index.html'}, {study}: neither exists; run {name} with paths.root={root}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        if study.exists():
            of_ablation(browser, Path(root), name, Path(folder))
        else:
            of_experiment(browser, Path(root), name, Path(folder))


def of_experiment(browser: Browser, root: Path, name: str, target: Path) -> None:
    for page, file, width, dark, height in PAGES:
        browser.open(root / "reports" / name / file, width, dark, height)
        _save(browser, target / f"{page}.png")
    number, (run, *_) = _runs(root / "mlflow.db", name, "pipeline")
    with mlflow(root) as server:
        browser.open(comparison_url(server, number), 1280, height=860)
        _wait(browser, "the curves", LINES)
        _save(browser, target / "mlflow-curves.png")
        browser.open(f"{server}/#/experiments/{number}/runs/{run}?workflowType=machine_learning", 1280, height=1000)
        _wait(browser, "the figure", FIGURE, then=SHOW_MORE)
        _save(browser, target / "mlflow-run.png")


def of_ablation(browser: Browser, root: Path, name: str, target: Path) -> None:
    number, runs = _runs(root / "mlflow.db", name, "variant")
    with mlflow(root) as server:
        query = f"runs={json.dumps(runs, separators=(',', ':'))}&experiments={json.dumps([number])}"
        browser.open(f"{server}/#/compare-runs?{query}&workflowType=machine_learning", 1280, height=860)
        _wait(browser, "the comparison", PARALLEL)
        _save(browser, target / "mlflow-compare.png")


def _runs(database: Path, experiment: str, kind: str) -> tuple[str, list[str]]:
    """MLflow's number of an experiment, and its runs of a kind, the newest first."""
    with sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True) as connection:
        (number,) = connection.execute("select experiment_id from experiments where name = ?", (experiment,)).fetchone()
        found = connection.execute(
            "select run_uuid from runs join tags using (run_uuid) where experiment_id = ? and key = 'kind' and value = "
            "? and lifecycle_stage = 'active' order by start_time desc",
            (number, kind),
        ).fetchall()
    return str(number), [run for (run,) in found]


@contextmanager
def mlflow(root: Path) -> Iterator[str]:
    """The address of a server on a root's database, while it is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--backend-store-uri", f"sqlite:///{(root / 'mlflow.db').absolute()}", "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(address: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(WAIT_S):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"error: mlflow ended with status {process.returncode}") from None
            time.sleep(1)
    raise SystemExit(f"error: {address}: MLflow did not respond within {WAIT_S} s")


def _wait(browser: Browser, what: str, condition: str, then: str = "true") -> None:
    """Until a page has drawn what it was opened for; then do what shows more of it."""
    end = time.monotonic() + WAIT_S
    while not browser.evaluate(condition):
        if time.monotonic() > end:
            raise SystemExit(f"error: MLflow did not draw {what} within {WAIT_S} s")
        time.sleep(1)
    browser.evaluate(f"{PANEL} && {PANEL}.click()")
    browser.evaluate(then)
    time.sleep(SETTLE_S)


def _save(browser: Browser, target: Path) -> None:
    """What the window shows, with few colours: pictures are small in the repository."""
    from PIL import Image

    browser.screenshot(target, whole=False)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(target, optimize=True)
    print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
