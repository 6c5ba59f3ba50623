# ruff: noqa: RUF001 (Chinese punctuation is what it looks like)

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage, DataConfig
from aquilamoe.data import corpus
from aquilamoe.data.corpus import prepare_corpus, read_documents, source_names, split_file

CONF = Path(__file__).parents[2] / "conf" / "data"
TEXTS = [f"Document {n}: 天下大势，分久必合。" for n in range(40)]


def stage_of(validation_fraction: float = 0.2, sha256: str | None = None, **paths: Any) -> CorpusStage:
    sources = {source: {"path": str(path), "sha256": sha256} for source, path in paths.items()}
    return CorpusStage.model_validate(
        {"kind": "corpus", "inputs": {}, "sources": sources, "validation_fraction": validation_fraction}
    )


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read_split(out: Path, split: str, source: str = "en") -> list[str]:
    return [text for texts in read_documents(split_file(out, split, source)) for text in texts]


def refusal(stage: CorpusStage, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare_corpus(stage, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_as_parquet(folder: Path) -> str:
    write_parquet(folder / "a.parquet", text=TEXTS[:25], other=list(range(25)))
    write_parquet(folder / "b.parquet", text=TEXTS[25:])
    return str(folder / "*.parquet")


def write_as_jsonl(folder: Path) -> str:
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=number % 2 == 0) for number, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(folder / "a.jsonl")


def write_as_txt(folder: Path) -> str:
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    return str(folder / "**" / "*.txt")


@pytest.mark.parametrize("write", [write_as_parquet, write_as_jsonl, write_as_txt])
def test_every_format_gives_the_same_documents_in_order(write: Callable[[Path], str], tmp_path: Path) -> None:
    metrics = prepare_corpus(stage_of(en=write(tmp_path)), tmp_path / "out")
    train, validation = (read_split(tmp_path / "out", split) for split in corpus.SPLITS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert validation == [text for text in TEXTS if text not in set(train)]
    assert metrics["train/en/documents"] == len(train)
    assert metrics["train/en/bytes"] == sum(len(text.encode()) for text in train)
    assert metrics["validation/en/bytes"] == sum(len(text.encode()) for text in validation)


def test_output_has_text_and_the_source_as_language(tmp_path: Path) -> None:
    prepare_corpus(stage_of(zh=write_as_txt(tmp_path)), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train-zh.parquet")
    assert table.schema.names == ["text", "lang"]
    assert set(table["lang"].to_pylist()) == {"zh"}
    assert source_names(tmp_path / "out") == ["zh"]


def test_a_split_column_is_followed(tmp_path: Path) -> None:
    splits = ["validation" if number % 10 == 3 else "train" for number in range(40)]
    path = write_parquet(tmp_path / "a.parquet", text=TEXTS, split=splits)
    prepare_corpus(stage_of(en=path), tmp_path / "out")
    assert read_split(tmp_path / "out", "validation") == TEXTS[3::10]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=60), st.floats(0.01, 0.49))
def test_hashing_keeps_every_document_and_never_puts_a_text_in_both_splits(texts: list[str], fraction: float) -> None:
    # Two texts whose hashes are at the two ends: no split is empty.
    texts = [*texts, "1039", "4245"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_corpus(stage_of(fraction, en=write_parquet(folder / "a.parquet", text=texts)), folder / "out")
        train, validation = (read_split(folder / "out", split) for split in corpus.SPLITS)
    assert Counter(train) + Counter(validation) == Counter(texts)
    assert not set(train) & set(validation)


def test_about_the_configured_fraction_is_held_out_and_stays_held_out_when_documents_come(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)]
    prepare_corpus(stage_of(0.1, en=write_parquet(tmp_path / "a.parquet", text=texts[:2000])), tmp_path / "a")
    prepare_corpus(stage_of(0.1, en=write_parquet(tmp_path / "b.parquet", text=texts)), tmp_path / "b")
    before, after = (read_split(tmp_path / run, "validation") for run in "ab")
    assert 0.08 < len(before) / 2000 < 0.12
    assert set(before) <= set(after)
    assert not set(before) & set(read_split(tmp_path / "b", "train"))


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for run in "ab":
        prepare_corpus(stage_of(en=write_as_parquet(tmp_path)), tmp_path / run)
    for split in corpus.SPLITS:
        assert (
            split_file(tmp_path / "a", split, "en").read_bytes() == split_file(tmp_path / "b", split, "en").read_bytes()
        )


def test_row_groups_stay_within_their_bytes_and_together_hold_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "ROW_GROUP_BYTES", 200)
    monkeypatch.setattr(corpus, "INPUT_ROWS", 3)
    texts = [*TEXTS, "long " * 100, *TEXTS]
    path = write_parquet(tmp_path / "a.parquet", text=texts, split=["train"] * 80 + ["validation"])
    prepare_corpus(stage_of(en=path), tmp_path / "out")
    groups = list(read_documents(split_file(tmp_path / "out", "train", "en")))
    assert [text for group in groups for text in group] == texts[:80]
    assert len(groups) > 10
    assert all(len(group) == 1 or sum(len(text.encode()) for text in group) <= 200 for group in groups)
    written = sum(len(text.encode()) for text in texts[:80])
    assert written <= corpus.count_bytes(split_file(tmp_path / "out", "train", "en")) < 2 * written


def test_documents_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["", None, *TEXTS])
    metrics = prepare_corpus(stage_of(en=path), tmp_path / "out")
    assert metrics["left_out/en/documents"] == 2
    assert metrics["train/en/documents"] + metrics["validation/en/documents"] == 40


def test_a_path_that_matches_nothing_is_named_with_the_place_it_was_looked_for(tmp_path: Path) -> None:
    message = refusal(stage_of(en=f"{tmp_path}/none/*.parquet"), tmp_path / "out")
    assert message.startswith("sources.en.path: no file matches") and "none/*.parquet" in message
    (tmp_path / "folder").mkdir()
    assert "name its files" in refusal(stage_of(en=tmp_path / "folder"), tmp_path / "out")


@pytest.mark.parametrize("name", ["../../{}", "embedded/../../../*.txt", "/etc/*.txt", "/{}"])
def test_a_path_of_the_package_that_leads_out_of_it_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("text")
    message = refusal(stage_of(en=f"package://{name.format(tmp_path / 'there.txt')}"), tmp_path / "out")
    assert message.startswith("sources.en.path: '") and "is outside the package; name a file in it" in message


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    message = refusal(stage_of(en=tmp_path / "a.csv"), tmp_path / "out")
    assert "a.csv" in message and ".parquet, .jsonl, .txt" in message


def test_a_wrong_checksum_is_refused_with_both_values(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=TEXTS)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    prepare_corpus(stage_of(sha256=actual.upper(), en=path), tmp_path / "out")
    message = refusal(stage_of(sha256="0" * 64, en=path), tmp_path / "out")
    assert message.startswith("sources.en.sha256") and actual in message and "0" * 64 in message


def test_one_checksum_for_several_files_is_refused(tmp_path: Path) -> None:
    assert "for 2 files" in refusal(stage_of(sha256="0" * 64, en=write_as_parquet(tmp_path)), tmp_path / "out")


def test_a_missing_or_wrong_text_column_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", content=TEXTS, url=TEXTS)
    assert "no column 'text', only content, url" in refusal(stage_of(en=path), tmp_path / "out")
    path = write_parquet(tmp_path / "b.parquet", text=[1, 2])
    assert "holds int64, not strings" in refusal(stage_of(en=path), tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: list instead of an object"),
        ('{"content": "x", "url": 1}', "line 2: no field 'text', only content, url"),
        ('{"text": 7}', "line 2: 'text' holds int"),
        ('{"text": "x", "split": "test"}', "line 2: split 'test' is not known"),
        ('{"text": "x", "split": null}', "line 2: split None is not known"),
        ('{"text": "\\ud800"}', "line 2: text is not valid Unicode"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    assert problem in refusal(stage_of(en=tmp_path / "a.jsonl"), tmp_path / "out")


def test_an_unknown_split_in_parquet_is_refused_with_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x", "y"], split=["train", "dev"])
    assert "a.parquet, row 2: split 'dev'" in refusal(stage_of(en=path), tmp_path / "out")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x", "y"], split=["train", "train"])
    message = refusal(stage_of(en=path), tmp_path / "out")
    assert "the validation split is empty (2 documents with text in 1 files, validation_fraction 0.2)" in message


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("天下".encode("gbk"))
    assert "not UTF-8 at byte 0" in refusal(stage_of(en=tmp_path / "a.txt"), tmp_path / "out")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "not a readable parquet file" in refusal(stage_of(en=path), tmp_path / "out")
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    assert "corrupt after row" in refusal(stage_of(en=path), tmp_path / "out")


def test_a_source_whose_name_cannot_be_a_file_name_is_refused(tmp_path: Path) -> None:
    named: dict[str, Any] = {"a/b": write_as_txt(tmp_path)}
    assert "becomes a file name" in refusal(stage_of(**named), tmp_path / "out")


def test_a_folder_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train-\*\.parquet files"):
        source_names(tmp_path)


@pytest.mark.parametrize("name", ["embedded", "bilingual"])
def test_data_configurations_decode_and_their_mixtures_name_their_sources(name: str) -> None:
    data = DataConfig.model_validate(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    assert set(data.mixture) == set(data.sources) == {"en", "zh"}
    assert sum(data.mixture.values()) == pytest.approx(1.0)


def test_the_embedded_corpus_is_whole_and_its_splits_share_no_document(tmp_path: Path) -> None:
    data = yaml.safe_load((CONF / "embedded.yaml").read_text())
    stage = CorpusStage(kind="corpus", inputs={}, **{key: data[key] for key in ("sources", "validation_fraction")})
    metrics = prepare_corpus(stage, tmp_path)
    assert [metrics[f"validation/{source}/documents"] for source in ("en", "zh")] == [14, 6]
    assert [metrics[f"train/{source}/documents"] for source in ("en", "zh")] == [260, 114]
    for source in ("en", "zh"):
        train, validation = (set(read_split(tmp_path, split, source)) for split in corpus.SPLITS)
        assert len(train) + len(validation) == sum(metrics[f"{split}/{source}/documents"] for split in corpus.SPLITS)
        assert not train & validation
