import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import processes
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data import duplicates
from aquilamoe.data.cleaning import clean_corpus
from aquilamoe.data.corpus import SPLITS, prepare_corpus, read_documents, split_file
from aquilamoe.data.encoding import tokenize_corpus
from aquilamoe.data.tokenizer import train_tokenizer
from waiting import until

TEXTS = [f"Document {number}: 天下大势 {number * number}." for number in range(60)]


def stage_of(path: Path | str | None, cleaning: dict[str, Any] | None = None, **source: Any) -> CorpusStage:
    cleaned = {"shard_bytes": 400, "max_document_bytes": 1000} | (cleaning or {})
    return CorpusStage.model_validate(
        {
            "kind": "corpus",
            "inputs": {},
            "sources": {"en": {"path": path and str(path), **source}},
            "validation_fraction": 0.2,
            "cleaning": cleaned,
        }
    )


def kept(out: Path, source: str = "en") -> dict[str, list[str]]:
    return {
        split: [text for texts in read_documents(split_file(out, split, source)) for text in texts] for split in SPLITS
    }


def clean(stage: CorpusStage, folder: Path, **options: Any) -> dict[str, float | str]:
    return clean_corpus(stage, folder / "out", folder / "scratch", **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "scratch" not in path.parts
    }


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def test_every_format_gives_the_documents_and_splits_that_reading_them_in_order_gives(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", TEXTS[:20])
    write_jsonl(tmp_path / "jsonl" / "b.jsonl", TEXTS[20:])
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "parquet" / "a.parquet", row_group_size=7)
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{number:02}.txt").write_text(text)
    plain = CorpusStage.model_validate(
        {
            "kind": "corpus",
            "inputs": {},
            "sources": {"en": {"path": str(tmp_path / "jsonl" / "*.jsonl")}},
            "validation_fraction": 0.2,
        }
    )
    prepare_corpus(plain, tmp_path / "plain")
    for kind in ("jsonl", "parquet", "txt"):
        metrics = clean(stage_of(tmp_path / kind / f"*.{kind}"), tmp_path / kind)
        assert kept(tmp_path / kind / "out") == kept(tmp_path / "plain")
        assert len(list(split_file(tmp_path / kind / "out", "train", "en").iterdir())) > 2  # shards
        assert metrics["train/en/documents"] == len(kept(tmp_path / "plain")["train"])
        assert metrics["left_out/en/documents"] == metrics["duplicates/en/documents"] == 0
        assert metrics["train/en/bytes"] == sum(len(text.encode()) for text in kept(tmp_path / "plain")["train"])


BAD_LINES = [
    (b'{"text": "\xff\xfe"}', "not valid UTF-8"),
    (b'{"text": "half \\ud800"}', "not valid UTF-8"),
    (b'{"text": ', "not JSON"),
    (b"[1]", "no text in its field"),
    (b'{"words": "a"}', "no text in its field"),
    (b'{"text": 3}', "no text in its field"),
    (b'{"text": null}', "empty"),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text": "' + b"long " * 300 + b'"}', "longer than max_document_bytes"),
    (b'{"text": "' + b"long " * 600_000 + b'"}', "longer than max_document_bytes"),  # longer than is ever held
    (b'{"text": "a", "split": "test"}', "a split that is neither train nor validation"),
]


def test_bad_lines_are_counted_and_named_and_cost_no_good_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines = good[:5]
    for number, (bad, _) in enumerate(BAD_LINES):
        lines += [bad, *good[5 * number + 5 : 5 * number + 10]]
    path.write_bytes(b"\n".join(lines))
    metrics = clean(stage_of(path, {"shard_bytes": 300_000}), tmp_path)
    assert sorted(text for texts in kept(tmp_path / "out").values() for text in texts) == sorted(TEXTS)
    assert metrics["left_out/en/documents"] == len(BAD_LINES)
    assert metrics["left_out/en/too_long"] == 2
    named = json.loads((tmp_path / "out" / "left_out.json").read_text())["en"]
    expected = [(f"{path}:{6 * number + 6}", problem) for number, (_, problem) in enumerate(BAD_LINES)]
    assert [(each["document"], each["problem"]) for each in named] == expected
    assert metrics["left_out/en/first"] == f"{path}:6: not valid UTF-8"


def test_bad_rows_and_bad_text_files_are_named_too(tmp_path: Path) -> None:
    column = pa.array([*(text.encode() for text in TEXTS), b"\xff", b"", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=8)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_bytes(b"x" * 2000)
    metrics = clean(stage_of(tmp_path / "[abc].*"), tmp_path)
    named = json.loads((tmp_path / "out" / "left_out.json").read_text())["en"]
    assert [each["document"] for each in named] == [
        *(f"{tmp_path}/a.parquet, row {row}" for row in (61, 62, 63)),
        *(f"{tmp_path}/{name}.txt" for name in "bc"),
    ]
    assert metrics["left_out/en/documents"] == 5


@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 30), min_size=20, max_size=80), st.integers(300, 2000), st.sampled_from([1, 7, 1 << 20]))
def test_of_equal_texts_the_first_is_kept_wherever_the_others_lie(
    numbers: list[int], shard_bytes: int, at_once: int
) -> None:
    texts = [f"text {number} {'x' * number}" for number in [*range(31, 50), *numbers]]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
        folder = Path(name)
        metrics = clean(stage_of(write_jsonl(folder / "a.jsonl", texts), {"shard_bytes": shard_bytes}), folder)
        once = list(dict.fromkeys(texts))
        both = kept(folder / "out")
        for split in SPLITS:
            assert both[split] == [text for text in once if text in set(both[split])]
        assert sorted(both["train"] + both["validation"]) == sorted(once)
        assert metrics["duplicates/en/documents"] == len(texts) - len(once)
        assert metrics["train/en/documents"] == len(both["train"])


def test_without_deduplication_equal_texts_all_stay(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 2)
    clean(stage_of(path, {"deduplicate": False}), tmp_path)
    assert sorted(text for texts in kept(tmp_path / "out").values() for text in texts) == sorted(TEXTS * 2)


def test_columns_are_named_and_filters_count_what_they_take_out(tmp_path: Path) -> None:
    languages = ["en", "zh", "de"] * 20
    table = pa.table({"content": TEXTS, "lang": languages, "part": ["validation", "train"] * 30, "text": ["no"] * 60})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    filters = {"min_bytes": 30, "columns": {"lang": ["en", "zh"]}}
    metrics = clean(stage_of(tmp_path / "a.parquet", text="content", split="part", filters=filters), tmp_path)
    expected_texts = [
        (text, part)
        for text, lang, part in zip(TEXTS, languages, ["validation", "train"] * 30, strict=True)
        if lang != "de" and len(text.encode()) >= 30
    ]
    assert kept(tmp_path / "out") == {
        split: [text for text, part in expected_texts if part == split] for split in SPLITS
    }
    assert metrics["filtered/en/documents"] == len(TEXTS) - len(expected_texts) > 20


def test_a_split_without_documents_is_refused_with_what_became_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a"}\n' * 3)
    with pytest.raises(UserError, match=r"sources\.en: the train split is empty \(0 documents kept, 3 left out, the "):
        clean(stage_of(tmp_path / "a.jsonl"), tmp_path)


def test_input_that_changed_between_two_runs_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    clean(stage_of(path), tmp_path)
    write_jsonl(path, TEXTS[:30])
    clean(stage_of(path), tmp_path)
    assert sorted(text for texts in kept(tmp_path / "out").values() for text in texts) == sorted(TEXTS[:30])


SCRIPT = """
import sys
from pathlib import Path
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data.cleaning import clean_corpus
from aquilamoe.data.encoding import tokenize_corpus
if __name__ == "__main__":
    stage, root, processes = CorpusStage.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    clean_corpus(stage, root / "corpus", root / "scratch" / "corpus", processes)
    tokenizer, scratch = Path(sys.argv[4]), root / "scratch" / "tokens"
    tokenize_corpus(root / "corpus", tokenizer, root / "tokens", scratch=scratch, processes=processes)
"""


@pytest.mark.process
def test_killed_anywhere_and_run_again_the_bytes_are_those_of_one_process(
    tmp_path: Path, ambush: Callable[..., dict[str, str]]
) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(TEXTS, k=200)) for _ in range(120)]
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[:50])
    stage = stage_of(path, {"shard_bytes": 200_000, "max_document_bytes": 100_000})
    clean_corpus(stage, tmp_path / "corpus", tmp_path / "scratch" / "corpus", 1)
    train_tokenizer(tmp_path / "corpus", 270, tmp_path / "tokenizer")
    tokenize_corpus(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens", processes=1)
    expected = [files_of(tmp_path / name) for name in ("corpus", "tokens")]

    (tmp_path / "script.py").write_text(SCRIPT)
    other = tmp_path / "other"
    words = [stage.model_dump_json(), str(other), "2", str(tmp_path / "tokenizer")]

    def start(**changes: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(tmp_path / "script.py"), *words], env=os.environ | changes)

    # Killed when some shards of the corpus are there, and again when some of the tokens are.
    finished: dict[Path, int] = {}
    for number, (folder, report) in enumerate((("corpus/en", "report-*.json"), ("tokens", "*.json"))):
        reports, trap = other / "scratch" / folder, tmp_path / f"trap-{number}"
        process = start(**ambush(rf"scratch/{folder}/", str(trap), after=[str(reports / report)]))
        until(trap.exists, process)
        started = processes.descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not processes.left(started)
        finished |= {path: path.stat().st_mtime_ns for path in reports.glob(report)}
    assert len(finished) >= 2
    assert start().wait() == 0
    assert [files_of(other / name) for name in ("corpus", "tokens")] == expected
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_hashes_in_turns_find_what_hashes_at_once_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    files = [tmp_path / f"{number}.npy" for number in range(4)]
    for file in files:
        np.save(file, draw.integers(0, 200, 100).astype(np.uint64))
    at_once = np.array(duplicates.first_occurrences(files, tmp_path / "a.npy"))
    monkeypatch.setattr(duplicates, "SORTED_AT_ONCE", 30)
    np.testing.assert_array_equal(duplicates.first_occurrences(files, tmp_path / "b.npy"), at_once)
    everything = np.concatenate([np.load(file) for file in files])
    assert at_once.sum() == len(np.unique(everything))
