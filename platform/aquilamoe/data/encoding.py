"""The corpus as token files: encoded in parallel, shard by shard, and put together.

A shard - row groups of a prepared file - leaves its ids, the lengths of its documents, and a report, which is written
last: what has a report is not encoded again. Then the ids of all shards go into one `.bin`, one after the other; each
is removed when it is there, so that nothing is on the disk twice. The bytes are those of encoding the documents one by
one, whatever the number of processes and wherever an earlier run was killed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.data.corpus import SPLITS, group_sizes, read_groups, source_names, split_file, split_parts
from aquilamoe.data.processes import available, share_out
from aquilamoe.data.tokenizer import TOKENIZER_FILES, encode, end_of_text_id, load_tokenizer, vocabulary_size
from aquilamoe.data.tokens import (
    TokenCounts,
    TokensRecord,
    bin_file,
    token_dtype,
    token_prefix,
    write_ids,
    write_index,
    write_record,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Text of a shard; more where a corpus would have more shards than MAX_SHARDS.
SHARD_BYTES = 1 << 24
MAX_SHARDS = 10_000
# A corpus for which one process does: the library then encodes on all cores, and others take a second to start.
SMALL_BYTES = 1 << 25
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """Row groups `start` to `stop` of a prepared file. leaves: how the paths of what it leaves begin."""

    file: Path
    start: int
    stop: int
    documents: int
    bytes: int
    leaves: Path

    @property
    def ids(self) -> Path:
        return self.leaves.with_name(f"{self.leaves.name}.bin")

    @property
    def lengths(self) -> Path:
        return self.leaves.with_name(f"{self.leaves.name}.lengths")

    @property
    def report(self) -> Path:
        return self.leaves.with_name(f"{self.leaves.name}.json")


def tokenize_corpus(
    corpus: Path,
    tokenizer: Path,
    out: Path,
    *,
    progress: Progress = lambda _done, _total: None,
    scratch: Path | None = None,
    processes: int | None = None,
) -> dict[str, float]:
    """Encode a prepared corpus into `{train,validation}-{source}.bin/.idx`, with `tokens.json` and the tokenizer.

    `progress(done, total)` counts documents. scratch: where finished shards wait, and are found by a run that comes
    after a killed one; None keeps nothing. processes: None chooses by the size of the corpus. Returns tokens,
    documents, UTF-8 bytes and bytes per token of every split and source.
    """
    out.mkdir(parents=True, exist_ok=True)
    if scratch is None:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            return tokenize_corpus(corpus, tokenizer, out, progress=progress, scratch=Path(folder), processes=processes)
    encoder = load_tokenizer(tokenizer)
    vocab_size, end = vocabulary_size(encoder), end_of_text_id(encoder, tokenizer)
    cut = _shards(corpus, scratch)
    _encode_all([shard for shards in cut.values() for shard in shards], tokenizer, progress, processes)
    sources: dict[str, dict[str, TokenCounts]] = {}
    for (source, split), shards in cut.items():
        counts = _join(shards, token_prefix(out, split, source), token_dtype(vocab_size))
        sources.setdefault(source, {})[split] = counts
    write_record(out, TokensRecord(vocab_size, end, sources))
    _copy_tokenizer(tokenizer, out / "tokenizer")
    return _metrics(sources)


def _shards(corpus: Path, scratch: Path) -> dict[tuple[str, str], list[RowGroups]]:
    """How the corpus is cut, by source and split."""
    files = {
        (source, split): [(part, group_sizes(part)) for part in split_parts(split_file(corpus, split, source))]
        for source in source_names(corpus)
        for split in SPLITS
    }
    everything = sum(size for parts in files.values() for _, groups in parts for _, size in groups)
    shard_bytes = max(SHARD_BYTES, everything // MAX_SHARDS)
    return {
        (source, split): [
            shard
            for number, (part, groups) in enumerate(parts)
            for shard in _cut(part, groups, shard_bytes, scratch / f"{split}-{source}-{number:06d}")
        ]
        for (source, split), parts in files.items()
    }


def _cut(part: Path, groups: list[tuple[int, int]], shard_bytes: int, leaves: Path) -> Iterator[RowGroups]:
    """Neighbouring row groups, until they have `shard_bytes` of text together."""
    start = 0
    while start < len(groups):
        stop, size = start, 0
        while stop < len(groups) and (stop == start or size + groups[stop][1] <= shard_bytes):
            size += groups[stop][1]
            stop += 1
        documents = sum(number for number, _ in groups[start:stop])
        yield RowGroups(
            file=part,
            start=start,
            stop=stop,
            documents=documents,
            bytes=size,
            leaves=leaves.with_name(f"{leaves.name}-{start:06d}"),
        )
        start = stop


def _encode_all(shards: list[RowGroups], tokenizer: Path, progress: Progress, processes: int | None) -> None:
    waiting = [shard for shard in shards if not shard.report.is_file()]
    total, done = sum(shard.documents for shard in shards), sum(shard.documents for shard in shards)
    done -= sum(shard.documents for shard in waiting)
    if processes is None:
        processes = 1 if sum(shard.bytes for shard in waiting) < SMALL_BYTES else available()
    for folder in {shard.leaves.parent for shard in shards}:
        folder.mkdir(parents=True, exist_ok=True)
    progress(done, total)
    for documents in share_out(_encode, [(shard, tokenizer) for shard in waiting], processes):
        done += documents
        progress(done, total)


def _encode(task: tuple[RowGroups, Path]) -> int:
    """Encode one shard and leave its files, the report last; return the number of documents."""
    shard, directory = task
    tokenizer, vocab_size, end = _opened(directory)
    sizes: list[int] = []
    with shard.ids.open("wb") as ids, shard.lengths.open("wb") as lengths:
        tokens, documents = write_ids(ids, lengths, vocab_size, _encoded(shard, tokenizer, end, sizes))
    temporary = shard.leaves.with_name(f"{shard.leaves.name}.tmp")
    temporary.write_text(json.dumps(asdict(TokenCounts(tokens, documents, sum(sizes)))))
    temporary.replace(shard.report)
    return documents


@cache
def _opened(directory: Path) -> "tuple[Tokenizer, int, int]":
    """A tokenizer, once in a process: its vocabulary's size, and the id that ends a document."""
    tokenizer = load_tokenizer(directory)
    return tokenizer, vocabulary_size(tokenizer), end_of_text_id(tokenizer, directory)


def _encoded(shard: RowGroups, tokenizer: "Tokenizer", end: int, sizes: list[int]) -> Iterator[np.ndarray]:
    """The ids of a shard's documents, each with its end; `sizes` gets the UTF-8 bytes of every row group."""
    for texts in read_groups(shard.file, shard.start, shard.stop):
        sizes.append(sum(len(text.encode()) for text in texts))
        for ids in encode(tokenizer, texts):
            yield np.array([*ids, end], dtype=np.int64)


def _join(shards: list[RowGroups], prefix: Path, dtype: np.dtype) -> TokenCounts:
    """Put the ids of shards, each removed when it is there, into one file, and write its index."""
    counts = [TokenCounts(**json.loads(shard.report.read_text())) for shard in shards]
    path = bin_file(prefix)
    path.touch()
    at = 0
    with path.open("r+b") as out:
        for shard, count in zip(shards, counts, strict=True):
            if shard.ids.is_file():  # otherwise a run that was killed has put it there
                out.seek(at)
                with shard.ids.open("rb") as ids:
                    shutil.copyfileobj(ids, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
                shard.ids.unlink()
            at += count.tokens * dtype.itemsize
        out.truncate(at)
    documents = sum(count.documents for count in counts)
    with tempfile.TemporaryFile(dir=prefix.parent) as lengths:
        for shard in shards:
            with shard.lengths.open("rb") as own:
                shutil.copyfileobj(own, lengths)
        lengths.seek(0)
        write_index(prefix, lengths, documents, dtype)
    return TokenCounts(sum(count.tokens for count in counts), documents, sum(count.bytes for count in counts))


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _metrics(sources: dict[str, dict[str, TokenCounts]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, splits in sources.items():
        for split, counts in splits.items():
            metrics |= {f"{split}/{name}/{key}": float(value) for key, value in asdict(counts).items()}
            metrics[f"{split}/{name}/bytes_per_token"] = counts.bytes / counts.tokens
    return metrics
