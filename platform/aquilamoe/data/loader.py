"""Batches: windows of token files, shuffled and mixed by `grain`; the whole state is one integer.

A source's documents are one stream of N tokens, cut into (N - 1) // sequence_length windows of sequence_length + 1
tokens. Neighbours share one token, so that each token but the first is predicted once an epoch. Windows are numbers
until the moment they are read from the memory map: nothing here grows with the corpus.
"""

import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.config.messages import UserError, nearest
from aquilamoe.data.tokens import TokenFile, bin_file, check_ids, read_record, token_prefix

if TYPE_CHECKING:
    import grain

# Batches that a thread reads ahead of training.
PREFETCHED_BATCHES = 2
# grain shuffles 32-bit numbers, and wraps larger ones silently.
MAX_WINDOWS = 2**32


class Batches:
    """An endless stream of training sequences, and this rank's part of each global batch of it.

    tokens: output folder of a tokenize stage. mixture: weight of each source, per sequence (to 1 % of the smallest
    weight; the sources alternate in a fixed rhythm). sequence_length: tokens predicted per sequence. batch_sequences:
    sequences of a global batch. seed: each source is shuffled by it, again in every epoch of its own.

    The stream depends on neither rank nor world size: rank r of w has the r-th of w equal, adjacent slices of the
    batch, so that the ranks' rows, one after the other, are the batch. UserError for what a user can repair.
    """

    def __init__(
        self,
        tokens: Path,
        mixture: Mapping[str, float],
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        if batch_sequences % world_size:
            raise UserError(
                f"batch_tokens: a batch of {batch_sequences} sequences does not divide among {world_size} workers; "
                f"choose a multiple of {world_size * sequence_length} tokens, or other workers"
            )
        self._batch = batch_sequences
        self._rows = batch_sequences // world_size
        self._first_row = rank * self._rows
        names = sorted(mixture)  # the order in which a mixture is written has no meaning
        self._windows = [_windows(tokens, "train", name, sequence_length) for name in names]
        self._files = [bin_file(token_prefix(tokens, "train", name)) for name in names]
        self._vocab_size = read_record(tokens).vocab_size
        self._ends = np.cumsum([len(windows_wt) for windows_wt in self._windows])
        self._order = _order(names, [len(w) for w in self._windows], [mixture[name] for name in names], seed)
        self._shape = (self._rows, sequence_length + 1)

    def read(self, position: int) -> np.ndarray:
        """This rank's rows of the global batch that begins with sequence `position` (from 0) of the stream.

        Returns int64 (batch_sequences // world_size, sequence_length + 1); depends on `position` alone.
        """
        assert position >= 0
        first = position + self._first_row
        ids_r = np.array([self._order[index] for index in range(first, first + self._rows)])
        sources_r = np.searchsorted(self._ends, ids_r, side="right")
        rows_rt = np.empty(self._shape, dtype=np.int64)
        for source, windows_wt in enumerate(self._windows):
            mine_r = sources_r == source
            read_rt = windows_wt[ids_r[mine_r] - (self._ends[source] - len(windows_wt))]
            check_ids(self._files[source], read_rt, self._vocab_size)
            rows_rt[mine_r] = read_rt
        return rows_rt

    def iterate(self, position: int) -> Iterator[np.ndarray]:
        """The batches from `position` on, each `batch_sequences` further, without end; a thread reads ahead."""
        grain = _import_grain()
        steps = grain.MapDataset.range(sys.maxsize // self._batch)
        batches = steps.map(lambda step: self.read(position + step * self._batch))
        yield from batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES))


def validation_batches(
    tokens: Path, source: str, sequence_length: int, max_tokens: int | None, batch_sequences: int
) -> Iterator[np.ndarray]:
    """The validation windows of a source in order, int64 (rows, sequence_length + 1); the last batch may be smaller.

    `max_tokens` (predicted tokens) keeps the first max_tokens // sequence_length windows, one at least; None keeps
    all. What remains of the stream after the last full window is not used. UserError, at once, if there is no window.
    """
    windows_wt = _windows(tokens, "validation", source, sequence_length)
    count = len(windows_wt) if max_tokens is None else min(len(windows_wt), max(1, max_tokens // sequence_length))
    path, vocab_size = bin_file(token_prefix(tokens, "validation", source)), read_record(tokens).vocab_size
    starts = range(0, count, batch_sequences)
    parts = (windows_wt[start : min(start + batch_sequences, count)] for start in starts)
    return (_checked(part_rt, path, vocab_size) for part_rt in parts)


def _checked(rows_rt: np.ndarray, path: Path, vocab_size: int) -> np.ndarray:
    check_ids(path, rows_rt, vocab_size)
    return rows_rt.astype(np.int64)


def _windows(tokens: Path, split: str, source: str, sequence_length: int) -> np.ndarray:
    """All windows of a stream, (windows, sequence_length + 1): a view of the memory map, nothing is read."""
    known = read_record(tokens).sources
    if source not in known:
        raise UserError(f"mixture.{source}: {tokens} has no such source; {nearest(source, known)}")
    tokens_n = TokenFile(token_prefix(tokens, split, source), in_random_order=split == "train").tokens_n
    if tokens_n.size <= sequence_length:
        raise UserError(
            f"sequence_length: {sequence_length} tokens, but the {split} split of {source} has only {tokens_n.size}; "
            f"choose at most {max(tokens_n.size - 1, 0)}, or add documents"
        )
    windows_wt = np.lib.stride_tricks.sliding_window_view(tokens_n, sequence_length + 1)[::sequence_length]
    if len(windows_wt) >= MAX_WINDOWS:
        raise UserError(
            f"sequence_length: {sequence_length} cuts {source} into {len(windows_wt)} windows, and only "
            f"{MAX_WINDOWS - 1} can be shuffled; choose at least {-(-tokens_n.size // (MAX_WINDOWS - 1))} tokens"
        )
    return windows_wt


def _order(names: list[str], sizes: list[int], weights: list[float], seed: int) -> "grain.MapDataset[int]":
    """The endless stream of window numbers (counted through all sources): shuffled per epoch, repeated, mixed."""
    dataset = _import_grain().MapDataset
    ends = np.cumsum(sizes).tolist()
    # Each source has a seed of its own, by its name: neither another source nor its place in the mixture changes its
    # order.
    seeds = [np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)[0] for name in names]
    parts = [
        dataset.range(end - size, end).shuffle(seed=int(own_seed)).repeat()
        for end, size, own_seed in zip(ends, sizes, seeds, strict=True)
    ]
    return dataset.mix(parts, weights)


def _import_grain() -> ModuleType:
    """Import grain without its warning that JAX is missing, which nothing here uses."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import grain
    finally:
        logging.set_verbosity(verbosity)
    return grain
