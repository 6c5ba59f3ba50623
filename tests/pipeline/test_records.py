"""Files of a store that are damaged: every command ends in an completed or in one line, never in a traceback."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import commands, watch
from aquilamoe.config.messages import UserError
from aquilamoe.config.points import note, parse_points, read_points
from aquilamoe.pipeline import records
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.cost import Rates
from aquilamoe.pipeline.store import METRICS, RECORD, Store
from aquilamoe.training.metrics import PointsFile
from stage_records import stage_record

pytestmark = pytest.mark.process

CASES = int(os.environ.get("STORE_FUZZ_CASES", "60"))  # the longer campaign: STORE_FUZZ_CASES=2000
WORDS = ("plan", "status", "lineage checkpoint=moe", "why checkpoint=moe", "verify", "run")
DEEP = "[" * 5000 + "]" * 5000
TEXTS = ("", "{", "{}", "[]", "null", "7", DEEP, '{"a": ' * 500 + "1" + "}" * 500, "\0" * 100, "1" * 5000)
VALUES: tuple[Any, ...] = (None, True, "x", "../x", "\ud800", -1, 10**400, 1e308, [], {}, [[]], {"x": {}}, {"x": None})


@pytest.fixture
def root(finished_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_store, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def execute(root: Path, tiny: list[str], compose: Callable[..., dict[str, Any]]) -> Callable[[str], None]:
    def run(words: str) -> None:
        commands.execute(compose(*tiny, f"paths.root={root}", "tracking.enabled=false", *words.split()), "")

    return run


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value, at every level."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from paths_of(child, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if new is VALUES:  # a field that is missing
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return copy


def mutations(text: str, draw: random.Random) -> Iterator[str]:
    """The text with damage of every kind; of a record without the digest that would show it at once."""
    record = {key: value for key, value in json.loads(text).items() if key not in ("sha256", "format")}
    places = list(paths_of(record))
    while True:
        kind = draw.randrange(8)
        if kind == 0:
            yield text[: draw.randrange(len(text))]
        elif kind == 1:
            yield draw.choice(TEXTS)
        else:
            yield json.dumps(with_value(record, draw.choice(places), draw.choice((*VALUES, VALUES))))


@pytest.mark.process
def test_whatever_a_record_holds_every_command_succeeds_or_ends_in_a_line(
    root: Path, execute: Callable[[str], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.reports.report.write", lambda *_, **__: None)
    monkeypatch.setattr("aquilamoe.pipeline.runner._StageRun.finish", stops)
    draw, outputs = random.Random(0), sorted((root / "stages").iterdir())
    for case in range(CASES):
        path = draw.choice(outputs) / RECORD
        whole = path.read_text(encoding="utf-8")
        path.write_text(next(mutations(whole, draw)), encoding="utf-8", errors="surrogatepass")
        for words in (f"action={each}" for each in WORDS):
            caplog.clear()
            note.cache_clear()
            try:
                execute(words)
            except UserError as error:
                assert "\n" not in str(error)
                assert len(str(error)) < 1000
            except Exception as error:
                raise AssertionError(f"case {case}, {words}: {path.read_text()[:5000]}") from error
            assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) <= 3
        path.write_text(whole, encoding="utf-8")


def stops(planned: Any, *_: Any) -> None:
    raise UserError(f"{planned.name}: would run")


@pytest.mark.parametrize("text", ["{}", "[]", "{", "\0\0", DEEP])
def test_a_record_that_is_none_is_one_line_with_what_to_do(
    root: Path, execute: Callable[[str], None], text: str
) -> None:
    directory = next((root / "stages").glob("dense-*"))
    (directory / RECORD).write_text(text)
    for words in ("action=plan", "action=status", "action=run"):
        with pytest.raises(UserError) as caught:
            execute(words)
        assert str(caught.value).startswith(f"{directory / RECORD}: ")
        assert str(caught.value).endswith(f"; restore it, or remove {directory} and run again to rebuild it")


def test_a_damaged_record_of_another_recipe_is_passed_over_with_a_note(
    root: Path, execute: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(next((root / "stages").glob("export-*")), root / "stages" / "export-000000000000")
    path = root / "stages" / "export-000000000000" / RECORD
    path.write_text("{}")
    execute("action=plan stages.export.dtype=bfloat16")
    assert [each.getMessage().startswith(f"{path}: has no fingerprint") for each in caplog.records] == [True]


@pytest.mark.parametrize(
    "garbage", [b"\0" * 50, b"\xff\xfe", b"[]", b'{"step": "x"}', b'{"step": 1', DEEP.encode(), b"NaN"]
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_line_that_is_no_point_is_ignored_with_a_note(
    tmp_path: Path, garbage: bytes, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    points = [b'{"step": 1, "tokens": 2, "val/loss": 3.5}', b'{"step": 2, "tokens": 4, "load": [[0.5, 0.5]]}']
    lines = [garbage, *points] if place == "first" else [*points, garbage]
    path = tmp_path / METRICS
    path.write_bytes(b"\n".join(lines) + b"\n")
    expected = [json.loads(point) for point in points]
    assert read_points(path) == read_points(path) == expected
    assert parse_points(b"\n".join(lines), path) == expected
    assert PointsFile(path, 2, 2, enabled=False).points == expected
    assert [each.getMessage() for each in caplog.records] == [f"{path}: 1 of 3 lines are damaged; they are ignored"]


def test_an_experiment_goes_on_though_the_curve_of_its_interrupted_stage_has_a_line_of_garbage(
    root: Path, execute: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aquilamoe.reports.report.write", lambda *_, **__: None)
    directory = next((root / "stages").glob("control-*"))
    partial = directory.rename(directory.with_name(f"{directory.name}.partial"))
    weights = (partial / "model" / "model.safetensors").read_bytes()
    (partial / RECORD).write_text("{}")
    with (partial / METRICS).open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    (root / "attempts").mkdir()
    (root / "attempts" / f"{directory.name}.json").write_text('[{"started": "x"}]')
    for words in ("action=plan", "action=status"):
        execute(words)
        assert " ".join(capsys.readouterr().out.split()).count("interrupted at") == 1
    execute("action=run")
    assert (directory / "model" / "model.safetensors").read_bytes() == weights
    record = records.read(directory)
    assert (record["resumed"], record["cost"]["attempts"]) == (True, 1)


@pytest.mark.parametrize("text", [*TEXTS, '[{"started": 1.0}]', '[{"started": "x", "seconds": null, "rates": {}}]'])
def test_damaged_attempts_are_none(tmp_path: Path, text: str) -> None:
    attempts = Attempts(tmp_path, "prepare-0123456789ab")
    attempts.path.parent.mkdir()
    attempts.path.write_text(text)
    assert attempts.read() == []
    attempts.begin(Rates(1, 0.0, 0.0))
    assert len(attempts.read()) == 1


@pytest.mark.parametrize("text", [*TEXTS, '{"name": 3, "stages": []}', '{"name": "x", "stages": [{"name": "y"}]}'])
def test_a_damaged_announcement_is_no_running_pipeline(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    with store.lock():
        (tmp_path / watch.RUNNING).write_text(text)
        assert watch.Watched.find(store) is None


def test_a_record_notices_every_byte_of_it_that_changes(tmp_path: Path) -> None:
    text = records.seal(stage_record(metrics={"a": 1e30, "b": None}, files={}))
    (tmp_path / RECORD).write_text(text)
    record = records.read(tmp_path)
    assert records.seal(record) == text
    data, draw = text.encode(), random.Random(0)
    for place in range(len(data)):
        (tmp_path / RECORD).write_bytes(
            data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        )
        with pytest.raises(UserError):
            records.read(tmp_path)
