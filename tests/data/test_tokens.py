import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data import tokens as tokens_module
from aquilamoe.data.corpus import SPLITS, prepare_corpus, read_documents, split_file
from aquilamoe.data.encoding import tokenize_corpus
from aquilamoe.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from aquilamoe.data.tokens import TokenFile, read_record
from token_files import write_token_file

CONF = Path(__file__).parents[2] / "conf" / "data"
WIDE, NARROW = 65500, 65499


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus, through all three stages: folders corpus, tokenizer, tokens."""
    root = tmp_path_factory.mktemp("embedded")
    data = yaml.safe_load((CONF / "embedded.yaml").read_text())
    stage = CorpusStage(kind="corpus", inputs={}, **{key: data[key] for key in ("sources", "validation_fraction")})
    prepare_corpus(stage, root / "corpus")
    train_tokenizer(root / "corpus", 4096, root / "tokenizer")
    tokenize_corpus(root / "corpus", root / "tokenizer", root / "tokens")
    return root


def write_corpus(folder: Path, **documents: list[str]) -> Path:
    """A prepared corpus: the same documents in both splits of each source."""
    folder.mkdir()
    for source, texts in documents.items():
        for split in SPLITS:
            table = pa.table({"text": texts, "lang": [source] * len(texts)})
            pq.write_table(table, split_file(folder, split, source), row_group_size=2)
    return folder


def write_documents(prefix: Path, vocab_size: int, documents: list[list[int]]) -> tuple[int, int]:
    return write_token_file(prefix, vocab_size, (np.array(document) for document in documents))


documents_of = st.lists(st.lists(st.integers(0, NARROW - 1), min_size=1, max_size=9), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(documents_of, st.sampled_from([NARROW, WIDE, 151_851]), st.integers(1, 5))
def test_written_documents_are_read_back(documents: list[list[int]], vocab_size: int, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "INDEX_CHUNK", chunk)
        prefix = Path(folder) / "train-en.v1.2"  # dots in a name are no suffix
        assert write_documents(prefix, vocab_size, documents) == (sum(map(len, documents)), len(documents))
        file = TokenFile(prefix)
        assert [file[number].tolist() for number in range(len(file))] == documents
        assert file.tokens_n.tolist() == [token for document in documents for token in document]
        assert file.tokens_n.dtype == (np.uint16 if vocab_size < WIDE else np.int32)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["train-en.v1.2.bin", "train-en.v1.2.idx"]


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(300, 8, "H"), (70_000, 4, "i")])
def test_bytes_are_those_of_the_megatron_layout(vocab_size: int, code: int, letter: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "x", vocab_size, [[7, 8, 0], [299, 0]])
    size = struct.calcsize(letter)
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", 2, 3)
    arrays = struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 3 * size) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == header + arrays
    assert (tmp_path / "x.bin").read_bytes() == struct.pack(f"<5{letter}", 7, 8, 0, 299, 0)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_cut_or_grown_anywhere_is_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "x", 300, [[1, 2, 0], [3, 0]])
    path = tmp_path / f"x{suffix}"
    whole = path.read_bytes()
    for damaged in [*(whole[:size] for size in range(len(whole))), whole + b"\x00"]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^[^\n]*x\.(bin|idx): [^\n]*corrupt[^\n]*$"):
            TokenFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, b"XXIDIDX", "begins with"),
        (9, struct.pack("<Q", 2), "version 2, type 8"),
        (17, b"\x05", "version 1, type 5; known are version 1, types 4"),
        (18, struct.pack("<Q", 2**62), "its header declares"),
        (26, struct.pack("<Q", 0), "its header declares"),
        (34 + 4 * 2 + 8 * 2 + 8 * 2, struct.pack("<q", 9), "do not end at its 2 sequences"),
        (34 + 4, struct.pack("<i", 1), "its index declares 8"),
    ],
)
def test_a_damaged_index_is_refused(offset: int, value: bytes, problem: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "x", 300, [[1, 2, 0], [3, 0]])
    path = tmp_path / "x.idx"
    damaged = bytearray(path.read_bytes())
    damaged[offset : offset + len(value)] = value
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=problem):
        TokenFile(tmp_path / "x")


def test_missing_files_are_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.bin: no such file"):
        TokenFile(tmp_path / "x")
    with pytest.raises(UserError, match=r"tokens\.json: no such file"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"vocab_size": 1, "eos_token_id": 0, "sources": {"en": {"train": {}}}}']
)
def test_a_damaged_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text(text)
    with pytest.raises(UserError, match=r"tokens\.json: not a record"):
        read_record(tmp_path)


def test_every_document_decodes_to_itself_and_ends_with_one_end_of_text(embedded: Path, tmp_path: Path) -> None:
    texts = ["plain", f"with {END_OF_TEXT} inside", "天下大势。\n", "🙂" * 9, "last one"]
    corpus = write_corpus(tmp_path / "corpus", en=texts, zh=texts[::-1])
    steps: list[tuple[int, int]] = []
    tokenize_corpus(corpus, embedded / "tokenizer", tmp_path / "out", progress=lambda *step: steps.append(step))
    tokenizer, record = load_tokenizer(embedded / "tokenizer"), read_record(tmp_path / "out")
    for source, expected in (("en", texts), ("zh", texts[::-1])):
        file = TokenFile(tmp_path / "out" / f"validation-{source}")
        decoded = [tokenizer.decode(file[number][:-1].tolist(), skip_special_tokens=False) for number in range(5)]
        assert decoded == expected
        assert all(file[number][-1] == record.eos_token_id for number in range(5))
        assert (file.tokens_n == record.eos_token_id).sum() == 5
        counts = record.sources[source]["validation"]
        assert counts.bytes == sum(len(text.encode()) for text in texts)
        assert (counts.tokens, counts.documents) == (file.tokens_n.size, 5)
    assert steps == [(done, 20) for done in (0, 5, 10, 15, 20)]


def test_the_embedded_corpus_has_the_tokens_of_its_mixture(embedded: Path) -> None:
    record = read_record(embedded / "tokens")
    assert record.vocab_size == 4096
    assert json.loads((embedded / "tokens" / "tokens.json").read_text())["sources"]["zh"]["train"]["documents"] == 114
    sizes = {source: splits["train"].tokens for source, splits in record.sources.items()}
    assert sizes == {"en": pytest.approx(1.0e6, rel=0.05), "zh": pytest.approx(0.54e6, rel=0.05)}
    mixture = yaml.safe_load((CONF / "embedded.yaml").read_text())["mixture"]
    assert mixture["en"] == pytest.approx(sizes["en"] / sum(sizes.values()), abs=0.02)


def test_counts_and_token_files_of_the_embedded_corpus_agree_with_its_text(embedded: Path) -> None:
    for source, splits in read_record(embedded / "tokens").sources.items():
        for split, counts in splits.items():
            texts = [text for part in read_documents(split_file(embedded / "corpus", split, source)) for text in part]
            file = TokenFile(embedded / "tokens" / f"{split}-{source}")
            assert (
                (counts.documents, counts.tokens)
                == (len(texts), file.tokens_n.size)
                == (len(file), sum(file.lengths_d))
            )
            assert counts.bytes == sum(len(text.encode()) for text in texts)


def test_the_copied_tokenizer_opens_and_encodes_as_the_files_do(embedded: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(embedded / "tokens" / "tokenizer")
    text = next(read_documents(split_file(embedded / "corpus", "validation", "zh")))[0]
    assert theirs.encode(text) == TokenFile(embedded / "tokens" / "validation-zh")[0][:-1].tolist()


def test_tokenizing_twice_gives_the_same_bytes(embedded: Path, tmp_path: Path) -> None:
    tokenize_corpus(embedded / "corpus", embedded / "tokenizer", tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 12
    assert all((tmp_path / path).read_bytes() == (embedded / "tokens" / path).read_bytes() for path in files)
