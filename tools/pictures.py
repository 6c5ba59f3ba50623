"""Make the pictures of docs/seeing.md from a run: its pages and MLflow, in a browser without a screen.

python tools/pictures.py [ROOT [EXPERIMENT [TARGET]]]

ROOT is a run's `paths.root` (runs), EXPERIMENT its name (embedded), TARGET a folder (docs/pictures). MLflow is started
on ROOT's own database, on a free port of this machine alone, and ended again.
"""

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

from aquilamoe.tracking.lineage import comparison_url
from browser import Browser, missing

# What MLflow opens beside the page in a browser that it does not know.
PANEL = "document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')"
WAIT_S = 300  # for a server, and for what a page of MLflow draws
SETTLE_S = 3.0  # after which a page that has stopped to change is done
# Name of the picture, page, width, whether in dark colours, height.
PAGES = (
    ("pipeline", "index.html", 1280, False, 1250),
    ("lineage", "lineage.html", 1280, False, 1000),
    ("router", "router.html", 1280, True, 1000),
)


def main() -> None:
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    root, experiment, target = [*sys.argv[1:], *("runs", "embedded", "docs/pictures")[len(sys.argv) - 1 :]]
    pages, folder = Path(root) / "reports" / experiment, Path(target)
    if not (pages / "index.html").exists():
        raise SystemExit(
            f"error: {pages / 'index.html'}: is missing; run experiment {experiment} with paths.root={root}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    number, run = _numbers(Path(root) / "mlflow.db", experiment)
    with Browser() as browser:
        for name, page, width, dark, height in PAGES:
            browser.open(pages / page, width, dark, height)
            _save(browser, folder / f"{name}.png")
        with mlflow(Path(root)) as server:
            browser.open(comparison_url(server, number), 1280, height=860)
            _wait(browser, "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length > 1")
            _save(browser, folder / "mlflow-curves.png")
            browser.open(f"{server}/#/experiments/{number}/runs/{run}?workflowType=machine_learning", 1280, height=1000)
            _wait(browser, "[...document.images].some(each => each.src.includes('get-artifact') && each.naturalWidth)")
            _save(browser, folder / "mlflow-run.png")


def _numbers(database: Path, experiment: str) -> tuple[str, str]:
    """MLflow's number of an experiment, and the latest run of its pipelines."""
    with sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True) as connection:
        (number,) = connection.execute("select experiment_id from experiments where name = ?", (experiment,)).fetchone()
        (run,) = connection.execute(
            "select run_uuid from runs join tags using (run_uuid) where experiment_id = ? and key = 'kind' and value = "
            "'pipeline' order by start_time desc",
            (number,),
        ).fetchone()
    return str(number), str(run)


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
        _answers(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(address: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(WAIT_S):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"error: mlflow ended with status {process.returncode}") from None
            time.sleep(1)
    raise SystemExit(f"error: {address}: MLflow did not answer within {WAIT_S} s")


def _wait(browser: Browser, condition: str) -> None:
    """Until a page has drawn what it was opened for; a page that never does is shown as it is."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not browser.evaluate(condition):
        time.sleep(1)
    browser.evaluate(f"{PANEL} && {PANEL}.click()")
    time.sleep(SETTLE_S)


def _save(browser: Browser, target: Path) -> None:
    """What the window shows, with few colours: pictures are small in the repository."""
    from PIL import Image

    browser.screenshot(target, whole=False)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(target, optimize=True)
    print(f"{target}  {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
