# ruff: noqa: RUF001 (Chinese punctuation is what it looks like)

import json
import shutil
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from aquilamoe.config.messages import UserError
from aquilamoe.data import tokenizer as tokenizer_module
from aquilamoe.data.corpus import split_file
from aquilamoe.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer

VOCAB_SIZE = 340
ENGLISH = "It was the best of times, it was the worst of times; it's 1859 and 2024 (we'll see).\n"
CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n"
HARD_TEXTS = [
    "Hello  world 2024! (12345)\n\n  indented\r\n",
    "天下大势，ＡＢＣ３４５。“分久必合”",
    "naïve café 🙂🙂\ttabs",
    "e\u0301 and \u200b zero\x00width",
    " ",
    "",
    "it's WE'LL they'd",
]


def write_corpus(folder: Path, train: list[str], validation: list[str]) -> Path:
    folder.mkdir()
    for split, texts in (("train", train), ("validation", validation)):
        pq.write_table(pa.table({"text": texts, "lang": ["en"] * len(texts)}), split_file(folder, split, "en"))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", [ENGLISH, CHINESE] * 20, ["held out"])


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    train_tokenizer(corpus, VOCAB_SIZE, corpus.parent / "tokenizer")
    return corpus.parent / "tokenizer"


def test_the_vocabulary_has_the_requested_size_and_learnt_both_languages(corpus: Path, tmp_path: Path) -> None:
    metrics = train_tokenizer(corpus, VOCAB_SIZE, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert metrics["vocab_size"] == tokenizer.get_vocab_size() == VOCAB_SIZE
    assert metrics["train_bytes"] == 20 * len((ENGLISH + CHINESE).encode())
    assert len(tokenizer.encode(ENGLISH).ids) < len(ENGLISH) / 2
    assert len(tokenizer.encode(CHINESE).ids) < len(CHINESE)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=st.text() | st.text(alphabet="天下大势分久必合，。 abc'1\n\r\t") | st.sampled_from(HARD_TEXTS))
def test_decoding_gives_back_any_text_in_nfc(text: str, trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("model_type", [None, "llama", "mixtral", "qwen2", "qwen2_moe"])
def test_transformers_encodes_identically_beside_the_config_of_any_architecture(
    model_type: str | None, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(trained)
    for text in [*HARD_TEXTS, ENGLISH, CHINESE]:
        assert theirs.encode(text) == ours.encode(text, add_special_tokens=False).ids
        assert theirs.decode(theirs.encode(text)) == unicodedata.normalize("NFC", text)
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == end_of_text_id(ours, trained)
    assert len(theirs) == VOCAB_SIZE


def test_training_twice_gives_the_same_bytes_with_and_without_threads(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train_tokenizer(corpus, VOCAB_SIZE, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(tokenizer_module.TOKENIZER_FILES)
    assert all((tmp_path / name).read_bytes() == (trained / name).read_bytes() for name in names)


def test_held_out_text_does_not_reach_the_vocabulary(trained: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "corpus", [ENGLISH, CHINESE] * 20, ["quixotic zebra " * 500])
    train_tokenizer(other, VOCAB_SIZE, tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_a_corpus_too_small_for_the_vocabulary_is_refused_with_both_sizes(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size: 50000 tokens requested, but \d+ bytes .* give only (\d+); .*\1"):
        train_tokenizer(corpus, 50_000, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_corpus_above_the_limit_is_thinned_evenly(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 1)
    with pytest.raises(UserError, match=f" {len(ENGLISH.encode())} bytes"):  # all but the first document are skipped
        train_tokenizer(corpus, VOCAB_SIZE, tmp_path)
    texts = [f"{number}" for number in range(9)]
    folder = write_corpus(tmp_path / "corpus", texts, ["x"])
    seen = {"documents": 0, "bytes": 0}
    chosen = [text for part in tokenizer_module._training_texts(folder, 4, seen) for text in part]
    assert chosen == ["0", "4", "8"]
    assert seen == {"documents": 3, "bytes": 3}


def test_the_end_of_text_inside_a_document_is_ordinary_text(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode(f"before {END_OF_TEXT} after").ids
    assert end_of_text_id(tokenizer, trained) not in ids
    assert tokenizer.decode(ids) == f"before {END_OF_TEXT} after"


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "special": True}])
def test_a_document_ends_with_the_eos_token_of_a_vocabulary_without_an_end_of_text(
    eos_token: object, tmp_path: Path, trained: Path
) -> None:
    text = (trained / "tokenizer.json").read_text().replace(END_OF_TEXT, "</s>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert end_of_text_id(load_tokenizer(tmp_path), tmp_path) == 0


def test_a_tokenizer_without_an_end_of_text_is_refused(trained: Path, tmp_path: Path) -> None:
    text = (trained / "tokenizer.json").read_text().replace(END_OF_TEXT, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="it has no token"):
        end_of_text_id(load_tokenizer(tmp_path), tmp_path)
