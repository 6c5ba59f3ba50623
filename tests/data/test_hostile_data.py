"""Documents, tokenizers and token files that are wrong, damaged or made to exhaust the machine: one line each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data import corpus
from aquilamoe.data.cleaning import clean_corpus
from aquilamoe.data.corpus import prepare_corpus
from aquilamoe.data.encoding import tokenize_corpus
from aquilamoe.data.loader import Batches, validation_batches
from aquilamoe.data.tokenizer import END_OF_TEXT, encode, load_tokenizer
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.data.vocabulary import adopt_tokenizer
from token_files import write_token_file

DEEP = 200_000


def stage_of(path: Path, cleaning: dict[str, Any] | None = None) -> CorpusStage:
    values = {"kind": "corpus", "inputs": {}, "validation_fraction": 0.2, "cleaning": cleaning}
    return CorpusStage.model_validate({**values, "sources": {"en": {"path": str(path)}}})


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def refused(path: Path, cleaning: dict[str, Any] | None = None) -> str:
    stage, out = stage_of(path, cleaning), path.parent / "out"
    if cleaning is None:
        return refusal(lambda: prepare_corpus(stage, out))
    return refusal(lambda: clean_corpus(stage, out, path.parent / "scratch"))


def table(path: Path, columns: list[tuple[str, pa.Array]]) -> Path:
    names = [name for name, _ in columns]
    pq.write_table(pa.Table.from_arrays([array for _, array in columns], names=names), path)
    return path


GOOD = pa.array(["good"] * 20)
# The bytes of an array of strings are not checked: files of other programs hold what they hold.
NOT_UTF8 = pa.array([b"good", b"\xff\xfe bad", b"good"], pa.binary()).view(pa.string())


@pytest.mark.parametrize("cleaning", [None, {}])
def test_two_columns_of_one_name_are_refused(cleaning: dict[str, Any] | None, tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [("text", GOOD), ("text", GOOD)])
    assert "a.parquet: 2 columns 'text'" in refused(path, cleaning)
    path = table(tmp_path / "a.parquet", [("text", GOOD), ("split", GOOD), ("split", GOOD)])
    assert "a.parquet: 2 columns 'split'" in refused(path, cleaning)


def test_parquet_text_that_is_not_utf8_is_refused_with_its_row(tmp_path: Path) -> None:
    assert "a.parquet, row 2: not UTF-8" in refused(table(tmp_path / "a.parquet", [("text", NOT_UTF8)]))


@pytest.mark.parametrize("cleaning", [None, {}])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (pa.array([{"a": "x"}] * 9), "struct"),
        (pa.array([["x"]] * 9), "list"),
        (pa.array([1.5] * 9), "double"),
        (pa.nulls(9), "null"),
    ],
)
def test_a_text_column_of_another_type_is_refused(
    text: pa.Array, kind: str, cleaning: dict[str, Any] | None, tmp_path: Path
) -> None:
    assert f"column 'text' holds {kind}" in refused(table(tmp_path / "a.parquet", [("text", text)]), cleaning)


@pytest.mark.parametrize("cleaning", [None, {}])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_an_empty_file_is_refused(name: str, cleaning: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    line = refused(tmp_path / name, cleaning)
    assert "not a readable parquet file" in line if name == "a.parquet" else "split is empty" in line


@pytest.mark.parametrize("cleaning", [None, {}])
def test_a_table_without_rows_is_refused(cleaning: dict[str, Any] | None, tmp_path: Path) -> None:
    assert "split is empty" in refused(table(tmp_path / "a.parquet", [("text", GOOD[:0])]), cleaning)


@pytest.mark.parametrize("cleaning", [None, {}])
def test_json_nested_without_end_is_one_line(cleaning: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * DEEP + "]" * DEEP + "}\n")
    line = refused(tmp_path / "a.jsonl", cleaning)
    assert "a.jsonl, line 1: not JSON" in line if cleaning is None else "not JSON" in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_document_without_end_is_refused_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 1000)
    path, text = tmp_path / name, "x" * 5000
    if name == "a.parquet":
        table(path, [("text", pa.array(["short", text]))])
    else:
        path.write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    line = refused(path)
    assert "longer than 1 kB" in line
    assert "data.cleaning" in line


def tokenizer_file(folder: Path, vocabulary: dict[str, int] | None = None, **changes: Any) -> Path:
    """A WordLevel tokenizer, as JSON; without an unknown token it has no way to write a word that it does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"a": 0, "b": 1, END_OF_TEXT: 2} if vocabulary is None else vocabulary
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    parts: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whole = {"version": "1.0", **parts, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps({**whole, **changes}))
    return folder


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def sequence(part: dict[str, Any], key: str) -> dict[str, Any]:
    return {"type": "Sequence", key: [part] * 40}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence(REPLACE, "normalizers")},
        {"normalizer": sequence({**REPLACE, "pattern": {"Regex": "a"}}, "normalizers")},
        {"normalizer": {"type": "Sequence", "normalizers": [sequence(REPLACE, "normalizers")]}},
        {"normalizer": {**REPLACE, "content": "a" * 1000}},
        {"pre_tokenizer": sequence(LETTERS, "pretokenizers")},
    ],
)
def test_a_tokenizer_that_multiplies_its_text_is_refused_before_it_does(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = tokenizer_file(tmp_path, **changes)
    assert "tokenizer.json: makes a text" in refusal(lambda: load_tokenizer(folder))


def test_padding_and_truncation_of_a_tokenizer_leave_documents_as_they_are(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 4_000_000_000}, "direction": "Right", "pad_to_multiple_of": None}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    folder = tokenizer_file(
        tmp_path, padding={**padding, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}, truncation=truncation
    )
    assert encode(load_tokenizer(folder), ["a b a"]) == [[0, 1, 0]]


def test_a_tokenizer_nested_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"normalizer": ' + "[" * DEEP)
    assert "tokenizer.json: not a readable tokenizer" in refusal(lambda: load_tokenizer(tmp_path))


def test_a_tokenizer_that_cannot_write_every_text_is_refused_where_it_is_adopted_and_where_it_is_used(
    tmp_path: Path,
) -> None:
    folder = tokenizer_file(tmp_path / "own")
    assert "unknown word" in refusal(lambda: adopt_tokenizer(str(folder), None, 3, tmp_path / "out"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a c {n}"}) + "\n" for n in range(40)))
    prepare_corpus(stage_of(tmp_path / "a.jsonl"), tmp_path / "corpus")
    line = refusal(lambda: tokenize_corpus(tmp_path / "corpus", folder, tmp_path / "tokens"))
    assert "tokenizer: cannot encode a text" in line


def test_ids_beyond_the_number_of_tokens_are_refused_with_both(tmp_path: Path) -> None:
    unknown = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 70_000, END_OF_TEXT: 2}}
    folder = tokenizer_file(tmp_path / "own", model=unknown)
    line = refusal(lambda: adopt_tokenizer(str(folder), None, 3, tmp_path / "out"))
    assert "id 70000" in line
    assert "3 tokens" in line


def test_token_files_with_ids_beyond_the_tokenizer_are_refused_where_they_are_read(tmp_path: Path) -> None:
    counts = TokenCounts(100, 1, 100)
    for split in ("train", "validation"):
        write_token_file(tmp_path / f"{split}-en", 500, [np.arange(100)])
    write_record(tmp_path, TokensRecord(50, 0, {"en": {"train": counts, "validation": counts}}))
    line = refusal(lambda: Batches(tmp_path, {"en": 1.0}, 4, 24, 0).read(0))
    assert "train-en.bin: token 96, the vocabulary has 50 (0 to 49)" in line
    line = refusal(lambda: list(validation_batches(tmp_path, "en", 4, None, 100)))
    assert "validation-en.bin: token 96" in line
