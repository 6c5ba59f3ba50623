"""What a user sees while a pipeline runs: on a terminal, in a pipe, from another terminal, after Ctrl-C."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from aquilamoe.cli import live, tables, view, watch
from aquilamoe.cli.console import SPARKS, spark
from aquilamoe.cli.grow_view import Bar
from aquilamoe.cli.progress import PipelineProgress, StageProgress
from aquilamoe.config import graph
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.cost import Rates
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import METRICS, Store
from aquilamoe.reports import costs
from stage_records import stage_record
from waiting import PATIENCE_S, until

Compose = Callable[..., dict[str, Any]]
NOW = 1_000_000.0
INTERRUPTED = """
import itertools, time
from pathlib import Path
from types import SimpleNamespace
from rich.console import Console
from aquilamoe.cli.live import LiveView
node = SimpleNamespace(tokens=0, flops=0)
plan = [SimpleNamespace(name=name, node=node, seconds=9.0) for name in ("text", "grown", "later")]
view = LiveView(Console(), "demo", plan)
record = {"stage": "text", "kind": "corpus", "metrics": {}, "seconds": 1.5}
view.stage_started("text", "", Path(), {}, {})
view.stage_finished("text", Path(), record, cached=False)
view.stage_started("grown", "", Path(), {}, {})
try:
    for done in itertools.count(1):
        view.stage_progress("grown", [{"done": min(done, 2999), "total": 3000, "unit": "tensors"}])
        time.sleep(0.01)
except KeyboardInterrupt:
    view.stage_failed("grown", "KeyboardInterrupt")
"""


def points(tokens: list[int], start: float, step_s: float = 2.0) -> list[dict[str, Any]]:
    return [
        {"tokens": done, "time": start + index * step_s, "train/loss": 8.0 - index, "train/tokens_per_s": 100.0}
        for index, done in enumerate(tokens)
    ]


def trained(*done: int, start: float = NOW) -> StageProgress:
    stage = StageProgress(name="prepare", tokens=1000, flops=1e9, expected_s=50.0)
    stage.start(NOW)
    stage.add(points(list(done), start))
    return stage


def screen_of(output: str) -> list[str]:
    """The lines that a terminal shows after what was written to it: the few controls that a live view uses."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_the_time_left_follows_the_pace_of_this_attempt() -> None:
    stage = trained(0, 100, 200)  # 50 tokens/s
    assert stage.seconds_left(NOW + 4.0) == pytest.approx(16.0)
    assert stage.seconds_left(NOW + 6.0) == pytest.approx(14.0)


def test_a_resumed_stage_does_not_count_the_pause_as_its_pace_and_shows_where_it_resumed() -> None:
    stage = trained(0, 300, start=NOW - 5000.0)
    assert stage.seconds_left(NOW) == 50.0  # nothing of this attempt yet: what the plan expects
    stage.add(points([300, 400], NOW))
    assert stage.seconds_left(NOW + 2.0) == pytest.approx(12.0)
    assert stage.resumed_at == 300
    assert "resumed at 300" in view.present(PipelineProgress("demo", [stage]), NOW, 100)[1].plain


def test_what_waits_is_estimated_by_the_speed_of_this_run_and_not_by_the_plan() -> None:
    done = StageProgress(name="a", tokens=10, flops=1e9, expected_s=1.0, state="run", seconds=10.0)
    waiting = [
        StageProgress(name="b", tokens=10, flops=2e9, expected_s=1.0),
        StageProgress(name="c", tokens=0, flops=0.0, expected_s=7.0),
        StageProgress(name="d", tokens=0, flops=0.0, expected_s=None),
    ]
    assert PipelineProgress("demo", [done, *waiting]).seconds_left(NOW) == pytest.approx(20.0 + 7.0)


@given(
    tokens=st.lists(st.integers(0, 10**12), max_size=8).map(sorted),
    total=st.integers(1, 10**12),
    loss=st.floats(0, 1e6),
    width=st.integers(40, 200),
    others=st.lists(st.text("abcdefgh_", min_size=1, max_size=14), max_size=12, unique=True),
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_no_line_of_the_view_is_broken_by_the_terminal(
    tokens: list[int], total: int, loss: float, width: int, others: list[str]
) -> None:
    stage = StageProgress(name="prepare", tokens=total, flops=1.0, expected_s=3.0)
    stage.start(NOW)
    stage.add({**point, "val/loss": loss} for point in points(tokens, NOW))
    pipeline = PipelineProgress(
        "demo", [stage, *(StageProgress(name=f"x{name}", tokens=1, flops=1.0, expected_s=1.0) for name in others)]
    )
    out = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    out.print(view.Present(pipeline, lambda: NOW))
    lines = screen_of(out.file.getvalue())  # type: ignore[attr-defined]
    assert len(lines) - 1 == 3 + bool(others)
    assert all(len(line) <= width for line in lines)


def test_the_bar_keeps_its_length_while_its_numbers_change() -> None:
    def bar(*done: int) -> int:
        line = view.present(PipelineProgress("demo", [trained(*done)]), NOW, 80)[0].plain
        return line.count("━") + line.count("─")

    assert len({bar(0), bar(0, 7), bar(0, 123), bar(0, 999), bar(0, 1000)}) == 1


@pytest.mark.parametrize("width", [30, 60, 100])
def test_a_step_of_a_growth_is_one_line_of_the_same_bar_whatever_is_done(width: int) -> None:
    out = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    step = Bar(out, "certificate", "tokens", total_bytes=10**9)
    lines = []
    for done in (0, 7, 123, 1000):
        step.update(done, 1000)
        with out.capture() as captured:
            out.print(step)
        lines += screen_of(captured.get())[:-1]
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)
    assert len({line.count("━") + line.count("─") for line in lines}) == 1
    assert ("123/1000 tokens" in lines[2]) is (width > 30)
    assert (" 12%" in lines[2]) is (width == 100)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=500), st.integers(2, 60))
@settings(derandomize=True, deadline=None)
def test_a_spark_line_fits_and_shows_the_lowest_and_the_highest(values: list[float], width: int) -> None:
    line = spark(values, width)
    assert 2 <= len(line) <= width
    assert set(line) <= set(SPARKS)
    assert len(set(values)) == 1 or SPARKS[0] in line


def test_a_spark_line_of_falling_values_falls() -> None:
    assert spark([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8) == SPARKS[::-1]
    assert spark([1.0], 8) == spark([], 8) == ""


def test_a_narrow_terminal_gets_whole_tables_with_fewer_columns(compose: Compose, tmp_path: Path) -> None:
    experiment = graph.parse(compose("cluster=gpu_256"))
    plan = planning.make(graph.build(experiment), Store(tmp_path), Speed.of(experiment.cluster))
    for width in (80, 100, 120, 160):
        out = Console(file=io.StringIO(), width=width)
        out.print(tables.plan_table(plan, width))
        out.print(tables.cost_table(costs.estimated(plan, experiment.cluster), width))
        text = out.file.getvalue()  # type: ignore[attr-defined]
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert ("active" in text) == (width >= 100)
        assert "status" in text and text.count("to run") >= len(plan)


def test_the_line_of_tokenised_text_has_its_documents_and_tokens() -> None:
    counts = {"train/en/documents": 260.0, "validation/en/documents": 14.0, "train/zh/documents": 126.0}
    metrics = {**counts, "train/en/tokens": 1_000_000.0, "train/zh/tokens": 500_000.0, "left_out/en/documents": 9.0}
    record = {"stage": "tokens", "kind": "tokenize", "seconds": 3.7, "metrics": metrics}
    assert view.headline(record) == "3.7 s  400 documents  1.5M tokens"


def events(out: Console) -> live.LiveView:
    """A pipeline of three stages: one runs and ends, one is cached, one fails halfway."""
    node = SimpleNamespace(tokens=1000, flops=1e9)
    plan: Any = [SimpleNamespace(name=name, node=node, seconds=9.0) for name in ("prepare", "dense", "moe", "later")]
    shown = live.LiveView(out, "demo", plan)
    metrics = {"tokens": 1000, "loss_start": 8.0, "loss_end": 6.5, "tokens_per_s": 2500.0}
    record = {"stage": "prepare", "kind": "pretrain", "metrics": metrics, "seconds": 12.34}
    shown.stage_started("prepare", "", Path(), {}, {})
    shown.stage_progress("prepare", points([0, 500], time.time()))
    shown.stage_finished("prepare", Path(), record, cached=False)
    shown.stage_finished("dense", Path(), record, cached=True)
    shown.stage_started("moe", "", Path(), {}, {})
    shown.stage_progress("moe", points([0, 250], time.time()))
    shown.stage_failed("moe", "stages.moe: no tokens; write some")
    return shown


DONE = [
    "  prepare  12.3 s  1k tokens  loss 8.00 -> 6.50  2.5k tokens/s",
    "  dense    cached",
    "  moe      failed at 250 of 1k tokens",
]


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_only_the_lines_of_finished_stages_stay(width: int) -> None:
    out = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    events(out)
    written = out.file.getvalue()  # type: ignore[attr-defined]
    assert [line for line in screen_of(written) if line] == DONE
    assert "━" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is back"


def test_where_there_is_no_terminal_stages_are_plain_lines() -> None:
    out = Console(file=io.StringIO(), width=120)
    events(out)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    started = ["  prepare  started, 1k tokens", "  moe      started, 1k tokens"]
    assert lines == [started[0], *DONE[:2], started[1], DONE[2]]


def test_a_long_stage_reports_now_and_then_how_far_it_is_also_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view, "PLAIN_EVERY_S", 0.0)
    out = Console(file=io.StringIO(), width=120)
    events(out)
    assert "  moe      250 of 1k tokens  loss 7.000  100 tokens/s" in out.file.getvalue()  # type: ignore[attr-defined]


def test_after_an_interruption_nothing_of_the_view_is_left() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal, for Ctrl-C
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip
    os.close(child)
    written = ""
    try:
        while chunk := _read(parent):
            if "tensors" in written + chunk and "tensors" not in written:
                os.write(parent, b"\x03")
            written += chunk
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    lines = [line for line in screen_of(written.replace("^C", "")) if line]
    assert lines[0] == "  text   1.5 s"
    assert re.fullmatch(r"  grown  interrupted at \d+ of 3k tensors", lines[1])
    assert len(lines) == 2


def _read(parent: int) -> str:
    try:
        return os.read(parent, 65536).decode(errors="replace")
    except OSError:  # the other side is closed
        return ""


@pytest.fixture
def running(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[Planned]]:
    """A store and a plan whose first stage is being run: its files as a driver leaves them, but for signs of life."""
    monkeypatch.setattr(watch, "SILENT_S", 1800.0)
    store = Store(tmp_path)
    plan = planning.make(graph.build(graph.parse(compose())), store, Speed(1e9))
    (prepare,) = [planned for planned in plan if planned.name == "prepare"]
    partial = store.partial("prepare", prepare.fingerprint)
    partial.mkdir(parents=True)
    attempts = Attempts(store.root, prepare.directory.name)
    attempts.begin(Rates(1, 0.0, 0.0))
    lines = points([0, 4096, 8192], time.time())
    (partial / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return store, plan


def test_another_terminal_sees_the_running_stage_its_loss_and_what_waits(
    running: tuple[Store, list[Planned]],
) -> None:
    store, plan = running
    assert watch.Watched.find(store) is None
    with store.lock(), watch.announced(store, "demo", plan):
        watched = watch.Watched.find(store)
        assert watched is not None
        pipeline = watched.read()
        out = Console(file=io.StringIO(), width=100)
        watch.show(out, watched)
    assert pipeline.running is not None
    assert (pipeline.running.name, pipeline.running.done, pipeline.running.losses) == ("prepare", 8192, [8.0, 7.0, 6.0])
    assert [stage.name for stage in pipeline.waiting] == [each.name for each in plan if each.name != "prepare"]
    assert re.search(r"▸ prepare .*8.19k of 860k tokens", out.file.getvalue())  # type: ignore[attr-defined]
    assert watch.Watched.find(store) is None
    assert not (store.root / watch.RUNNING).exists()


def test_a_stage_whose_driver_is_silent_does_not_run(running: tuple[Store, list[Planned]]) -> None:
    store, plan = running
    (path,) = (store.root / "attempts").iterdir()
    os.utime(path, (0, time.time() - 3600))
    with store.lock(), watch.announced(store, "demo", plan):
        watched = watch.Watched.find(store)
        assert watched is not None
        assert watched.read().running is None


def test_where_there_is_no_terminal_a_run_is_followed_in_lines_until_it_ends(
    running: tuple[Store, list[Planned]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = running
    monkeypatch.setattr(view, "PLAIN_EVERY_S", 0.0)
    (prepare,) = [planned for planned in plan if planned.name == "prepare"]
    file = io.StringIO()

    with store.lock(), watch.announced(store, "demo", plan):
        watched = watch.Watched.find(store)
        assert watched is not None
        follower = threading.Thread(target=watch.follow, args=(Console(file=file, width=100), watched))
        follower.start()
        until(lambda: "  prepare    8.19k of 860k tokens  loss 6.000" in file.getvalue())
        record = stage_record(fingerprint=prepare.fingerprint, seconds=3.0)
        store.publish(store.partial("prepare", prepare.fingerprint), record)
        until(lambda: "  prepare    3 s\n" in file.getvalue())
        assert follower.is_alive(), "others wait still"
    follower.join(PATIENCE_S)
    assert not follower.is_alive()
    assert file.getvalue().count("  prepare    3 s\n") == 1
    assert all(line == line.rstrip() for line in file.getvalue().splitlines())


def test_a_stage_that_is_finished_is_shown_once(running: tuple[Store, list[Planned]]) -> None:
    store, plan = running
    (prepare,) = [planned for planned in plan if planned.name == "prepare"]
    with store.lock(), watch.announced(store, "demo", plan):
        watched = watch.Watched.find(store)
        assert watched is not None
        record = stage_record(fingerprint=prepare.fingerprint, seconds=3.0)
        store.publish(store.partial("prepare", prepare.fingerprint), record)
        assert watched.read()["prepare"].state == "run"
        assert [line.plain for line in watched.newly_finished()] == ["  prepare    3 s"]
        watched.read()
        assert watched.newly_finished() == []


def test_a_growth_that_has_just_finished_shows_the_losses_of_its_certificate() -> None:
    record = {"stage": "scale_up", "kind": "scale_up", "seconds": 3.8, "inputs": {}}
    record["metrics"] = {"source_final_loss": 5.0, "source_loss": 5.44, "target_loss": 5.51}
    assert view.headline(record) == "3.8 s  loss 5.44 -> 5.51"
