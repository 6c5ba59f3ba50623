"""Token files in the layout of Megatron's indexed data sets: `.bin` holds the ids, `.idx` holds where documents begin.

`.idx`, little-endian: magic (9 bytes), version (uint64), dtype code (uint8), sequences (uint64), document boundaries
(uint64); then the sequences' lengths (int32), their byte offsets in `.bin` (int64), and the boundaries (int64). Here
every document is one sequence and ends with the end-of-text token.
"""

import json
import mmap
import shutil
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from aquilamoe.config.messages import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Vocabularies from this size on take 4 bytes a token (the layout's own limit, a little below 65536).
WIDE_VOCABULARY = 65500

# Entries of the index written at a time.
INDEX_CHUNK = 1 << 16


@dataclass(frozen=True)
class TokenCounts:
    """Sizes of a token file: tokens (ends of documents included), documents, and the documents' UTF-8 bytes."""

    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class TokensRecord:
    """`tokens.json`: what a folder of token files holds, by source and split."""

    vocab_size: int
    eos_token_id: int
    sources: dict[str, dict[str, TokenCounts]]


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that ids below `vocab_size` are stored in."""
    return DTYPES[8] if vocab_size < WIDE_VOCABULARY else DTYPES[4]


def token_prefix(tokens: Path, split: str, source: str) -> Path:
    """Path of the token file of a split and source, without `.bin` and `.idx`."""
    return tokens / f"{split}-{source}"


class TokenFile:
    """A memory-mapped token file: opening reads the header, and pages are read as they are used.

    `tokens_n`: all ids in one row (uint16 or int32, read-only). `lengths_d`: tokens of each document (int32).
    `offsets_d`: each document's first byte in `.bin` (int64). `in_random_order` turns off reading ahead, which
    for short reads all over a file that is not in memory costs 10 to 50 times the time of the query. UserError if a
    file is missing, cut short, or does not fit its partner.
    """

    def __init__(self, prefix: Path, in_random_order: bool = False) -> None:
        self._bin, self._idx = (_suffixed(prefix, suffix) for suffix in (".bin", ".idx"))
        for path in (self._bin, self._idx):
            if not path.is_file():
                raise UserError(f"{path}: no such file; give the output folder of a tokenize stage")
        index = _map(self._idx, np.dtype("u1"))
        dtype, sequences, boundaries = self._read_header(index)
        starts = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * boundaries])
        if index.size != starts[3]:
            raise self._corrupt(f"{self._idx}: {index.size} bytes, but its header declares {starts[3]}")
        self.lengths_d = index[starts[0] : starts[1]].view("<i4")
        self.offsets_d = index[starts[1] : starts[2]].view("<i8")
        boundaries_d = index[starts[2] : starts[3]].view("<i8")
        if boundaries == 0 or boundaries_d[-1] != sequences:
            raise self._corrupt(f"{self._idx}: its documents do not end at its {sequences} sequences")
        size = int(self.offsets_d[-1]) + int(self.lengths_d[-1]) * dtype.itemsize if sequences else 0
        if self._bin.stat().st_size != size:
            raise self._corrupt(f"{self._bin}: {self._bin.stat().st_size} bytes, but its index declares {size}")
        self.tokens_n = _map(self._bin, dtype, in_random_order)

    def __len__(self) -> int:
        """The number of documents."""
        return self.lengths_d.size

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of a document, its end included."""
        start = int(self.offsets_d[document]) // self.tokens_n.itemsize
        return self.tokens_n[start : start + int(self.lengths_d[document])]

    def _read_header(self, index: np.ndarray) -> tuple[np.dtype, int, int]:
        if index.size < HEADER.size:
            raise self._corrupt(f"{self._idx}: {index.size} bytes, shorter than a header of {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise self._corrupt(f"{self._idx}: begins with {magic!r}, not with {MAGIC!r}")
        if version != VERSION or code not in DTYPES:
            known = f"version {VERSION}, types {', '.join(f'{c} ({d.name})' for c, d in DTYPES.items())}"
            raise self._corrupt(f"{self._idx}: version {version}, type {code}; known are {known}")
        return DTYPES[code], sequences, boundaries

    @staticmethod
    def _corrupt(problem: str) -> UserError:
        return UserError(f"{problem}; the file is corrupt: make it again, or copy it again")


def write_ids(out: IO[bytes], lengths: IO[bytes], vocab_size: int, documents: Iterable[np.ndarray]) -> tuple[int, int]:
    """Write the ids of documents to `out` and how many each has to `lengths` (int32); return tokens and documents."""
    dtype = token_dtype(vocab_size)
    tokens = count = 0
    for document in documents:
        assert document.size and document.min() >= 0
        if document.max() >= vocab_size:
            raise UserError(
                f"tokenizer: writes a document with the id {document.max()}, but has {vocab_size} tokens (0 to "
                f"{vocab_size - 1}); take one whose ids have no gaps"
            )
        out.write(document.astype(dtype).tobytes())
        lengths.write(struct.pack("<i", document.size))
        tokens += document.size
        count += 1
    return tokens, count


def write_index(prefix: Path, lengths: IO[bytes], count: int, dtype: np.dtype) -> None:
    """Write `.idx` for a `.bin` that holds `count` documents, whose lengths (int32) are read twice."""
    with _suffixed(prefix, ".idx").open("wb") as out:
        out.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], count, count + 1))
        _write_index(out, lengths, count, dtype.itemsize)


def _write_index(out: IO[bytes], lengths: IO[bytes], count: int, itemsize: int) -> None:
    shutil.copyfileobj(lengths, out)
    lengths.seek(0)
    offset = 0
    while chunk := lengths.read(4 * INDEX_CHUNK):
        sizes = np.frombuffer(chunk, "<i4").astype("<i8") * itemsize
        ends = offset + np.cumsum(sizes)
        out.write((ends - sizes).tobytes())
        offset = int(ends[-1])
    for start in range(0, count + 1, INDEX_CHUNK):
        out.write(np.arange(start, min(start + INDEX_CHUNK, count + 1), dtype="<i8").tobytes())


def check_ids(path: Path, ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids, read from a file, that no token of the vocabulary has."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.max() if ids.max() >= vocab_size else ids.min()
        raise UserError(
            f"{path}: token {wrong}, the vocabulary has {vocab_size} (0 to {vocab_size - 1}); the file is not of this "
            "tokenizer: make it again, or copy it again"
        )


def write_record(out: Path, record: TokensRecord) -> None:
    """Write `tokens.json` beside the token files it describes."""
    (out / "tokens.json").write_text(json.dumps(asdict(record), indent=2) + "\n")


def read_record(tokens: Path) -> TokensRecord:
    """The `tokens.json` of a folder of token files."""
    path = tokens / "tokens.json"
    try:
        values = json.loads(path.read_text())
        sources = {
            name: {split: TokenCounts(**counts) for split, counts in splits.items()}
            for name, splits in values["sources"].items()
        }
        return TokensRecord(values["vocab_size"], values["eos_token_id"], sources)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the output folder of a tokenize stage") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a record of token files ({error!r}); make it again") from None


def bin_file(prefix: Path) -> Path:
    """The file of ids of a token file."""
    return _suffixed(prefix, ".bin")


def _suffixed(prefix: Path, suffix: str) -> Path:
    """`prefix` may hold dots, so `Path.with_suffix` would cut it."""
    return prefix.parent / f"{prefix.name}{suffix}"


def _map(path: Path, dtype: np.dtype, in_random_order: bool = False) -> np.ndarray:
    """The file as a read-only array that reads pages as they are used."""
    if not path.stat().st_size:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if in_random_order and hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype)
