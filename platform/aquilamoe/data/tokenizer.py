"""Byte-level BPE: one vocabulary for every language, no unknown token; decoding gives back the text (in NFC)."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.data.corpus import count_bytes, read_documents, source_names, split_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# How text is split before merging: the rules of Qwen2's tokenizer (words with the sign before them, digits one by one).
# `transformers` puts exactly these rules, and NFC, in force for every directory whose config.json has qwen2, whatever
# tokenizer.json has: with others a dense model with QKV bias would be read with other tokens than it was trained on.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A merge that was seen once is noise. A corpus that has no more pairs than that is too small for its vocabulary.
MIN_FREQUENCY = 2
# Text to learn merges from; a larger corpus is thinned evenly. All distinct words are held in memory, and in Chinese a
# clause is a word: measured, 37 bytes of memory per byte of a text in both languages, here 5 GB.
TRAINING_BYTES = 1 << 27
# How many times as long the rules of a tokenizer may make a text: those of published ones, at most 3 times.
MAX_EXPANSION = 64


def train_tokenizer(corpus: Path, vocab_size: int, out: Path) -> dict[str, float]:
    """Learn a vocabulary of exactly `vocab_size` (256 bytes, one special token, the rest merges) from the train splits.

    `out` gets the files that `transformers.AutoTokenizer` opens. The special token `<|endoftext|>` (id 0) ends every
    document and serves as bos and pad. Deterministic. UserError if the corpus has too few pairs for `vocab_size`.
    """
    from tokenizers import pre_tokenizers, trainers

    tokenizer = tokenizer_of()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    every = -(-_train_bytes(corpus) // TRAINING_BYTES)
    seen = {"documents": 0, "bytes": 0}
    tokenizer.train_from_iterator(_training_texts(corpus, every, seen), trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} tokens requested, but {seen['bytes']} bytes of training text give only "
            f"{reached}; set vocab_size to at most {reached}, or use a larger corpus"
        )
    save_tokenizer(tokenizer, out)
    return {"vocab_size": reached, "train_documents": seen["documents"], "train_bytes": seen["bytes"]}


def tokenizer_of(vocabulary: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> "Tokenizer":
    """A byte-level BPE with these tokens and merges; without them, one that is to learn its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, merges) if vocabulary else models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", out: Path) -> None:
    """Write the files that `transformers.AutoTokenizer` opens, under the generic class that follows tokenizer.json."""
    out.mkdir(parents=True, exist_ok=True)
    specials = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "pad", "unk")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # any length: positions are the model's concern
        **specials,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")


def load_tokenizer(directory: Path) -> "Tokenizer":
    """Open a tokenizer for encoding documents: the name of a special token inside a text is ordinary text."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the output folder of a tokenizer stage")
    tokenizer = open_tokenizer(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def open_tokenizer(path: Path) -> "Tokenizer":
    """Open a tokenizer.json that anybody may have written, for whole texts: it neither pads nor truncates them."""
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        _check_expansion(path, json.loads(text))
        tokenizer = Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a readable tokenizer ({_reason(error)}); copy it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: "Tokenizer", texts: Sequence[str], name: str = "tokenizer") -> list[list[int]]:
    """The ids of texts, without those that a tokenizer puts around them. UserError, which begins with `name`."""
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{name}: cannot encode a text ({_reason(error)}); take one that writes every text, such as a "
            "byte-level BPE"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_expansion(path: Path, values: Any) -> None:
    """Refuse a tokenizer whose rules, one after the other, make a text many times as long as it is."""
    parts = values if isinstance(values, dict) else {}
    factor = _expansion(parts.get("normalizer")) * _expansion(parts.get("pre_tokenizer"))
    if factor > MAX_EXPANSION:
        raise UserError(
            f"{path}: makes a text up to {factor:.3g} times as long before it is cut into tokens, at most "
            f"{MAX_EXPANSION} times is expected; take the tokenizer from where it was published"
        )


def _expansion(part: Any) -> float:
    """How many times as long a normalizer or pre-tokenizer makes a text at most, as far as its rules add up."""
    if not isinstance(part, dict):
        return 1.0
    kind = part.get("type")
    if kind == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers")
        return math.prod(map(_expansion, inner)) if isinstance(inner, list) else 1.0
    if kind == "ByteLevel":
        return 2.0  # of UTF-8: a byte becomes a letter, of one or two bytes
    if kind == "Replace":
        content, pattern = str(part.get("content", "")), part.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1.0, len(content) / max(1, len(replaced) if isinstance(replaced, str) else 1))
    return 1.0


def end_of_text_id(tokenizer: "Tokenizer", directory: Path) -> int:
    """The id of the token that ends a document: `<|endoftext|>`, or the eos_token of a tokenizer without one.

    Args:
        tokenizer: opened.
        directory: that it is from, with a tokenizer_config.json.

    Raises:
        UserError: it has neither.
    """
    stated = _eos_token(directory / "tokenizer_config.json")
    found = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, stated) if token is not None]
    token_id = next((each for each in found if each is not None), None)
    if token_id is None:
        raise UserError(
            f"tokenizer: it has no token {END_OF_TEXT}, which ends every document, and its tokenizer_config.json names "
            "no eos_token that it has; add one as a special token"
        )
    return token_id


def _eos_token(path: Path) -> str | None:
    """The eos_token of a tokenizer_config.json, as it is spelled; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    token = values.get("eos_token") if isinstance(values, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Ids that a tokenizer may give, 0 to the largest; some may be of no token."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def _train_bytes(corpus: Path) -> int:
    return sum(count_bytes(split_file(corpus, "train", source)) for source in source_names(corpus))


def _training_texts(corpus: Path, every: int, seen: dict[str, int]) -> Iterator[list[str]]:
    """Every `every`-th document of all train splits, in lists; adds to `seen` what went by."""
    for source in source_names(corpus):
        start = 0
        for texts in read_documents(split_file(corpus, "train", source)):
            chosen = list(islice(texts, -start % every, None, every))
            start += len(texts)
            seen["documents"] += len(chosen)
            seen["bytes"] += sum(len(text.encode()) for text in chosen)
            yield chosen
