"""Outputs of a finished experiment whose bytes change afterwards: noticed before anyone reads them."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aquilamoe
from aquilamoe.cli import commands
from aquilamoe.config.messages import UserError
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.records import RECORD
from aquilamoe.pipeline.store import Store
from stage_records import stage_record

pytestmark = pytest.mark.process

Execute = Callable[..., None]
# Of every stage that is read, one that reads it.
READER = {
    "corpus": "tokenizer",
    "tokenizer": "tokens",
    "tokens": "prepare",
    "prepare": "scale_up",
    "scale_up": "dense",
    "dense": "scale_out",
    "scale_out": "moe",
    "moe": "export",
    "control": "evaluate",
}


@pytest.fixture
def root(finished_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_store, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def execute(root: Path, tiny: list[str], compose: Callable[..., dict[str, Any]]) -> Execute:
    def run(*words: str) -> None:
        commands.execute(compose(*tiny, f"paths.root={root}", "tracking.enabled=false", *words), "")

    return run


def output(root: Path, stage: str) -> Path:
    (found,) = (root / "stages").glob(f"{stage}-*")
    return found


def files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file of every stage that another reads."""
    for stage in READER:
        yield from ((stage, path) for path in sorted(output(root, stage).rglob("*")) if path.is_file())


def flip(path: Path, draw: random.Random) -> bytes:
    """Change one byte of a file; return what was in it."""
    before = path.read_bytes()
    place = draw.randrange(len(before))
    path.write_bytes(before[:place] + bytes([before[place] ^ 1 << draw.randrange(8)]) + before[place + 1 :])
    return before


def test_any_byte_of_any_output_that_changed_is_noticed_by_the_stage_that_reads_it(
    root: Path, execute: Execute, tmp_path: Path
) -> None:
    draw, kinds = random.Random(0), dict[str, list[tuple[str, Path]]]()
    for stage, path in files(root):
        kinds.setdefault("tokens" if path.suffix == ".bin" else path.name, []).append((stage, path))
    assert {"model.safetensors", "tokenizer.json", "tokens", "config.json", RECORD} <= kinds.keys()
    for places in kinds.values():
        for stage, path in draw.sample(places, min(2, len(places))):
            before, reader = flip(path, draw), output(root, READER[stage])
            away = reader.rename(tmp_path / "away")
            with pytest.raises(UserError) as caught:
                execute()
            line, directory = str(caught.value), output(root, stage)
            assert line.startswith(f"{path}: ") and "\n" not in line, line
            assert line.endswith(f"remove {directory} and run again to rebuild it")
            if path.name != RECORD:
                assert f"since stage {stage} finished, and stage {READER[stage]} does not read it; " in line
            assert not reader.exists()
            path.write_bytes(before)
            shutil.rmtree(reader.with_name(f"{reader.name}.partial"), ignore_errors=True)
            away.rename(reader)
    execute()


def test_what_is_removed_as_the_message_states_is_made_again_and_the_readers_verify(
    root: Path, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.reports.report.write", lambda *_, **__: None)
    flip(output(root, "tokens") / "tokenizer" / "tokenizer.json", random.Random(1))
    shutil.rmtree(output(root, "export"))
    execute()  # nothing that runs reads the tokens
    directory = output(root, "tokens")
    shutil.rmtree(directory)
    execute()
    execute("action=verify")


@pytest.mark.parametrize("words", [("action=generate", "prompt=x"), ("action=evaluate", "tasks=x")], ids=lambda w: w[0])
def test_a_changed_checkpoint_neither_writes_nor_is_evaluated(
    root: Path, execute: Execute, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.cli.evaluate.find_spec", lambda _: True)  # lm-eval is called after the check
    weights = output(root, "moe") / "model" / "model.safetensors"
    flip(weights, random.Random(2))
    for checkpoint in ("moe", output(root, "moe"), output(root, "moe") / "model"):
        with pytest.raises(UserError, match=f"{weights}: has changed .* {words[0]} does not read it"):
            execute(*words, f"checkpoint={checkpoint}")


def test_a_changed_checkpoint_of_a_stage_is_not_grown_by_hand(root: Path, tmp_path: Path) -> None:
    source = output(root, "dense") / "model"
    flip(source / "model.safetensors", random.Random(4))
    with pytest.raises(UserError, match=f"{source}/model.safetensors: has changed .* the growth does not read it"):
        aquilamoe.grow(source, tmp_path / "target", model={"num_hidden_layers": 4}, certificate={"enabled": False})
    assert not (tmp_path / "target").exists()


def test_verify_notices_every_byte_of_a_growth_by_hand_and_of_its_record(
    root: Path, execute: Execute, tmp_path: Path
) -> None:
    source, target = output(root, "dense") / "model", tmp_path / "target"
    aquilamoe.grow(source, target, model={"num_hidden_layers": 4}, certificate={"enabled": False})
    execute("action=verify", f"checkpoint={target}")
    draw = random.Random(5)
    for name in (RECORD, "model.safetensors"):
        before = flip(target / name, draw)
        with pytest.raises(UserError) as caught:
            execute("action=verify", f"checkpoint={target}")
        assert "\n" not in str(caught.value)
        (target / name).write_bytes(before)


def test_a_changed_tensor_of_a_growth_by_hand_is_not_grown_again(root: Path, tmp_path: Path) -> None:
    target, plain = tmp_path / "target", {"enabled": False}
    aquilamoe.grow(output(root, "dense") / "model", target, model={"num_hidden_layers": 4}, certificate=plain)
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    flip(target / "model.safetensors", random.Random(6))
    with pytest.raises(UserError, match=rf"^{target}: tensor '\S+' has SHA-256 .*, and the growth does not read it; "):
        aquilamoe.upcycle(target, tmp_path / "experts", model=experts, certificate=plain)
    assert not (tmp_path / "experts").exists()
    (target / RECORD).unlink()  # as the message states for one that was trained further
    aquilamoe.upcycle(target, tmp_path / "experts", model=experts, certificate=plain)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("preserving",), False),
        (("certificate",), "none"),
        (("recipe",), "none"),
        (("recipe",), {}),
        (("recipe", "config"), 3),
        (("recipe", "inputs"), []),
        (("recipe", "inputs", "source"), None),
        (("files",), {"config.json": "large"}),
        (("files",), {"../other": 1}),
        (("fingerprint",), 7),
    ],
    ids=lambda value: repr(value),
)
def test_an_edited_record_of_a_growth_is_neither_served_nor_certified(
    keys: tuple[str, ...], value: Any, growth_by_hand: tuple[Path, Path], tmp_path: Path
) -> None:
    source, made = growth_by_hand
    target = tmp_path / "target"
    shutil.copytree(made, target)
    record = inner = json.loads((target / RECORD).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (target / RECORD).write_text(json.dumps(record))
    for read in (
        lambda: aquilamoe.grow(source, target, model={"num_hidden_layers": 4}, certificate={"enabled": False}),
        lambda: aquilamoe.certify(source, target, tokens=64, sequence_length=32),
    ):
        with pytest.raises(UserError, match=f"^{target / RECORD}: .*; it is no record of this platform"):
            read()


@pytest.fixture(scope="module")
def growth_by_hand(finished_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and a target, not to be changed."""
    source, target = output(finished_store, "dense") / "model", tmp_path_factory.mktemp("growth") / "target"
    aquilamoe.grow(source, target, model={"num_hidden_layers": 4}, certificate={"enabled": False})
    return source, target


def test_a_report_is_not_drawn_from_a_changed_curve(root: Path, execute: Execute) -> None:
    path = output(root, "control") / "metrics.jsonl"
    flip(path, random.Random(3))
    execute()  # all pages are there
    shutil.rmtree(root / "reports")
    with pytest.raises(UserError, match=f"{path}: has changed .* the report does not read it"):
        execute()


def test_a_store_from_before_records_had_digests_of_themselves_and_of_inputs_is_read(
    root: Path, execute: Execute, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.reports.report.write", lambda *_, **__: None)
    for path in (root / "stages").glob(f"*/{RECORD}"):
        record = json.loads(path.read_text())
        for reference in record["inputs"].values():
            del reference["sha256"]
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("sha256", "format")}))
    shutil.rmtree(output(root, "export"))
    execute()
    execute("action=verify")
    assert capsys.readouterr().out.count(" ok\n") == 11


def test_of_large_outputs_blocks_at_fixed_places_are_compared_and_verify_reads_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WHOLE_BYTES", 0), ("BLOCKS", 4), ("BLOCK_BYTES", 10)):
        monkeypatch.setattr(integrity, name, value)
    store, content = Store(tmp_path), bytes(range(100))
    partial = store.partial("prepare", "0123456789ab")
    partial.mkdir(parents=True)
    (partial / "large").write_bytes(content)
    (partial / "small").write_bytes(b"x" * 40)
    record = store.publish(partial, stage_record())
    assert {name: "sample" in entry for name, entry in record["files"].items()} == {"large": True, "small": False}
    path = store.directory("prepare", "0123456789ab") / "large"

    def noticed(place: int) -> bool:
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        try:
            integrity.check(path.parent, record, "a test")
        except UserError as error:
            assert "(its SHA-256 " in str(error)
            return True
        return False

    blocks = [place for place in range(100) if any(start <= place < start + 10 for start in (0, 30, 60, 90))]
    assert [place for place in range(100) if noticed(place)] == blocks
    monkeypatch.setattr(integrity, "WHOLE_BYTES", 140)
    assert all(noticed(place) for place in range(0, 100, 7))
