# ruff: noqa: RUF001 (Chinese punctuation is what it looks like)

import base64
import importlib.util
import unicodedata
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import TokenizerStage
from aquilamoe.data.tokenizer import END_OF_TEXT, SPLIT_PATTERN, load_tokenizer, train_tokenizer
from aquilamoe.data.vocabulary import QWEN_SPECIALS, adopt_tokenizer, from_ranks, read_ranks

PROSE = "The letter which lay upon the table, and 12 others; 却说曹操引兵，天下大势分久必合合久必分。 \n\n don't "
QWEN = "python://dashscope/resources/qwen.tiktoken"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was learned from a few words."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus").mkdir()
    for split in ("train", "validation"):
        texts = [PROSE * 3, PROSE[20:] * 2]
        pq.write_table(pa.table({"text": texts, "lang": ["en", "en"]}), folder / "corpus" / f"{split}-en.parquet")
    train_tokenizer(folder / "corpus", 330, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.mark.parametrize(
    "path", ["package://../../x", "package:///etc/x", "python://json/../../x", "python://json//etc/x"]
)
def test_a_path_of_a_package_that_leads_out_of_it_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tokenizer\.path: '.*x' is outside the package; name a file in it"):
        adopt_tokenizer(path, None, 300, tmp_path)


@pytest.fixture(scope="module")
def ranks(trained: Path) -> dict[bytes, int]:
    """Its vocabulary as ranks: the special token is 0, so that every rank is an id less one."""
    tokenizer = load_tokenizer(trained)
    found = {}
    for number in range(1, tokenizer.get_vocab_size()):
        letters = tokenizer.id_to_token(number)
        assert letters is not None
        found[bytes(BYTES[letter] for letter in letters)] = number - 1
    return found


def byte_of_letter() -> dict[str, int]:
    """GPT-2's letters, found by letting the library spell each byte."""
    from tokenizers import pre_tokenizers

    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: dict[str, int] = {}
    for character in map(chr, range(0x800)):
        spelt = "".join(part for part, _ in spell.pre_tokenize_str(character))
        found |= dict(zip(spelt, character.encode(), strict=True))
    for character in ("\u0800", "\uffff", *(chr(0x1000 * high) for high in (1, 2, 5, 9, 12, 14)), "\U00010000"):
        spelt = "".join(part for part, _ in spell.pre_tokenize_str(character))
        found |= dict(zip(spelt, character.encode(), strict=True))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = sorted(set(range(256)) - set(found.values()))  # bytes that no UTF-8 has, in the order of their letters
    return found | dict(zip(sorted(set(alphabet) - set(found)), unused, strict=True))


BYTES = byte_of_letter()


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What tiktoken does with a piece of text: merge the neighbours of the lowest rank, the first of equal ones."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        pairs = [ranks.get(left + right) for left, right in pairwise(parts)]
        known = [rank for rank in pairs if rank is not None]
        if not known:
            break
        at = pairs.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.text(st.sampled_from(sorted(set(PROSE))), max_size=40) | st.text(max_size=10))
def test_ranks_give_the_ids_that_merging_by_rank_gives(ranks: dict[bytes, int], text: str) -> None:
    import regex

    tokenizer = _from_ranks(ranks)
    normal = unicodedata.normalize("NFC", text)
    expected = [rank for piece in regex.findall(SPLIT_PATTERN, normal) for rank in merged(piece.encode(), ranks)]
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.decode(expected) == normal


_MADE: list[Tokenizer] = []


def _from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    if not _MADE:
        _MADE.append(from_ranks(ranks, QWEN_SPECIALS))
        _MADE[0].encode_special_tokens = True
    return _MADE[0]


def test_a_file_of_ranks_becomes_a_tokenizer_with_qwens_special_tokens_that_transformers_opens(
    ranks: dict[bytes, int], trained: Path, tmp_path: Path
) -> None:
    file = write_ranks(tmp_path / "a.tiktoken", ranks)
    assert read_ranks(file) == ranks
    size = len(ranks) + 208
    assert adopt_tokenizer(str(file), None, size, tmp_path / "out") == {"vocab_size": size}
    opened, own = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert opened.eos_token_id == own.token_to_id(END_OF_TEXT) == len(ranks)
    assert own.token_to_id("<|extra_204|>") == size - 1
    learned = load_tokenizer(trained).encode(PROSE).ids
    assert own.encode(PROSE).ids == [number - 1 for number in learned] == opened.encode(PROSE)
    assert opened.decode(own.encode(PROSE).ids) == PROSE


def test_a_folder_and_its_tokenizer_json_are_adopted_as_they_are(trained: Path, tmp_path: Path) -> None:
    for path in (trained, trained / "tokenizer.json"):
        adopt_tokenizer(str(path), None, 330, tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
        assert (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("path", "size", "sha256", "message"),
    [
        ("nowhere", 330, None, "no such file: "),
        ("python://no_such_package/x.tiktoken", 330, None, "no package no_such_package"),
        ("{trained}", 331, None, "331, but .* has 330 tokens; set it to that"),
        ("{trained}", 330, "0" * 64, "has SHA-256 [0-9a-f]{64}, not 0000"),
        ("{tmp}/a.tiktoken", 330, None, "a.tiktoken:2: not a token in base64 and its rank"),
        ("{tmp}/b.tiktoken", 330, None, "ranks are not 0 to 1, one each"),
        ("{tmp}/c.tiktoken", 330, None, "byte 1 is not a token"),
        ("{tmp}/d.txt", 330, None, "neither a tokenizer.json nor a .tiktoken file"),
    ],
)
def test_what_cannot_be_adopted_is_refused_in_one_line(
    path: str, size: int, sha256: str | None, message: str, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.tiktoken").write_text("AA== 0\n!!! 1\n")
    (tmp_path / "b.tiktoken").write_text("AA== 0\nAQ== 7\n")
    (tmp_path / "c.tiktoken").write_text("AA== 0\n")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        adopt_tokenizer(path.format(trained=trained, tmp=tmp_path), sha256, size, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_stage_with_a_path_reads_no_corpus_and_one_without_needs_it() -> None:
    stage = TokenizerStage(kind="tokenizer", inputs={"corpus": "corpus"}, vocab_size=330, path="x")
    assert stage.inputs == {}
    with pytest.raises(ValueError, match="'corpus' is missing"):
        TokenizerStage(kind="tokenizer", inputs={}, vocab_size=330)


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("dashscope") and importlib.util.find_spec("tiktoken")),
    reason="pip install --no-deps dashscope tiktoken (Qwen's vocabulary, and the library that defines it)",
)
def test_qwens_vocabulary_has_151851_tokens_and_gives_the_ids_of_tiktoken(tmp_path: Path) -> None:
    import tiktoken

    adopt_tokenizer(QWEN, None, 151_851, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.token_to_id(END_OF_TEXT) == 151_643
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None and spec.submodule_search_locations
    ranks = read_ranks(Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken")
    judge = tiktoken.Encoding("qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    folder = Path(__file__).parents[2] / "platform" / "aquilamoe" / "data" / "embedded"
    texts = [
        text
        for name in ("en_austen", "zh_sanguo")
        for text in pq.read_table(folder / f"{name}.parquet").column("text").to_pylist()[::10]
    ]
    assert len(texts) > 35
    for text in texts:
        assert tokenizer.encode(text).ids == judge.encode_ordinary(unicodedata.normalize("NFC", text))
