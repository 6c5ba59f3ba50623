import subprocess
import sys
import threading
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config.messages import UserError
from aquilamoe.data import loader
from aquilamoe.data.loader import Batches, validation_batches
from aquilamoe.data.tokens import (
    CODES,
    HEADER,
    MAGIC,
    TokenCounts,
    TokensRecord,
    token_dtype,
    write_record,
)
from token_files import write_token_file

LENGTH = 4
# Tokens encode their position: "en" counts from 0, "zh" from 10000, and validation from 30000 more.
STARTS = {"en": 0, "zh": 10_000}
WINDOWS = {"en": 900, "zh": 370}
SIZES = {"en": LENGTH * 900 + 3, "zh": LENGTH * 370 + 1}
VALIDATION_SIZE = 4 * 11 + 2


def write_streams(folder: Path, sizes: dict[str, int], validation_size: int = VALIDATION_SIZE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, TokenCounts]] = {}
    for source, size in sizes.items():
        for split, start, count in (("train", 0, size), ("validation", 30_000, validation_size)):
            stream = STARTS[source] + start + np.arange(count)
            write_token_file(folder / f"{split}-{source}", 60_000, np.array_split(stream, 3))
            sources.setdefault(source, {})[split] = TokenCounts(count, 3, count)
    write_record(folder, TokensRecord(60_000, 0, sources))
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_streams(tmp_path_factory.mktemp("tokens"), SIZES)


def batches(tokens: Path, batch: int = 8, seed: int = 5, rank: int = 0, world: int = 1, **mixture: Any) -> Batches:
    return Batches(tokens, mixture or {"en": 0.7, "zh": 0.3}, LENGTH, batch, seed, rank=rank, world_size=world)


def stream(tokens: Path, count: int, seed: int = 5, **mixture: Any) -> list[list[int]]:
    """The first sequences of the stream."""
    return batches(tokens, count, seed, **mixture).read(0).tolist()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    world=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 6),
    position=st.integers(0, 100_000) | st.integers(0, 2**45),
    seed=st.integers(0, 2**40),
)
def test_ranks_together_read_the_global_batch_in_its_order(
    world: int, rows: int, position: int, seed: int, tokens: Path
) -> None:
    parts = [batches(tokens, rows * world, seed, rank, world).read(position) for rank in range(world)]
    assert all(part.shape == (rows, LENGTH + 1) and part.dtype == np.int64 for part in parts)
    assert np.array_equal(np.concatenate(parts), batches(tokens, rows * world, seed).read(position))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(first=st.integers(1, 12), second=st.integers(1, 12), position=st.integers(0, 3000))
def test_the_stream_is_the_same_for_every_batch_size(first: int, second: int, position: int, tokens: Path) -> None:
    one, other = batches(tokens, first), batches(tokens, second)
    rows_of_one = np.concatenate([one.read(position + step * first) for step in range(second)])
    rows_of_other = np.concatenate([other.read(position + step * second) for step in range(first)])
    assert np.array_equal(rows_of_one, rows_of_other)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(before=st.integers(0, 40), worlds=st.permutations([1, 2, 4]))
def test_resuming_anywhere_on_any_number_of_ranks_continues_the_stream(
    before: int, worlds: list[int], tokens: Path
) -> None:
    whole = list(islice(batches(tokens).iterate(0), before + 3))
    position = before * 8  # all that a checkpoint keeps
    resumed = [list(islice(batches(tokens, 8, 5, rank, worlds[0]).iterate(position), 3)) for rank in range(worlds[0])]
    for step in range(3):
        assert np.array_equal(np.concatenate([rank[step] for rank in resumed]), whole[before + step])


def test_iterating_reads_what_read_reads_and_leaves_no_thread(tokens: Path) -> None:
    threads = set(threading.enumerate())
    source = batches(tokens)
    iterator = source.iterate(40)
    for step in range(5):
        assert np.array_equal(next(iterator), source.read(40 + 8 * step))
    iterator.close()  # type: ignore[attr-defined]
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("source", ["en", "zh"])
def test_an_epoch_predicts_every_token_of_the_full_windows_once(source: str, tokens: Path) -> None:
    windows = WINDOWS[source]
    only: dict[str, Any] = {source: 1.0}
    targets = np.array(stream(tokens, 3 * windows, **only))[:, 1:]
    expected = STARTS[source] + np.arange(1, windows * LENGTH + 1)
    for epoch in np.split(targets, 3):
        assert np.array_equal(np.sort(epoch.ravel()), expected)


def test_rows_are_adjacent_tokens_that_begin_where_the_window_before_ends(tokens: Path) -> None:
    rows = np.array(sorted(stream(tokens, WINDOWS["en"], en=1.0)))
    assert np.array_equal(np.diff(rows, axis=1), np.ones((WINDOWS["en"], LENGTH)))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])


def test_epochs_and_seeds_differ_in_order(tokens: Path) -> None:
    epoch = WINDOWS["en"]
    rows = stream(tokens, 2 * epoch, en=1.0)
    assert sorted(rows[:epoch]) == sorted(rows[epoch:])
    # The second epoch of a seed is not the first of the next seed either.
    orders = [rows[:epoch], rows[epoch:], stream(tokens, epoch, seed=6, en=1.0), sorted(rows[:epoch])]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_the_order_of_a_seed_is_for_ever(tokens: Path) -> None:
    """A golden value: when it changes, no run begun before can be resumed."""
    first_tokens = [row[0] for row in stream(tokens, 12)]
    assert first_tokens == [3572, 3120, 1136, 10628, 808, 2836, 10948, 2704, 3092, 10280, 2816, 3096]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(weight=st.floats(0.05, 0.95), scale=st.floats(0.01, 100.0), position=st.integers(0, 10_000))
def test_every_stretch_of_the_stream_has_the_shares_of_the_mixture(
    weight: float, scale: float, position: int, tokens: Path
) -> None:
    rows = batches(tokens, 400, en=weight * scale, zh=(1 - weight) * scale).read(position)
    assert (rows[:, 0] < STARTS["zh"]).mean() == pytest.approx(weight, abs=0.01)


def test_a_source_keeps_its_order_whatever_is_mixed_in(tokens: Path) -> None:
    alone = stream(tokens, 50, en=1.0)
    mixtures: list[dict[str, Any]] = [{"en": 0.5, "zh": 0.5}, {"zh": 0.9, "en": 0.1}]
    for mixture in mixtures:
        mixed = [row for row in stream(tokens, 1000, **mixture) if row[0] < STARTS["zh"]]
        assert mixed[:50] == alone


def test_the_order_in_which_a_mixture_is_written_means_nothing(tokens: Path) -> None:
    assert stream(tokens, 100, en=0.7, zh=0.3) == stream(tokens, 100, zh=0.3, en=0.7)


def test_training_never_reads_validation(tokens: Path) -> None:
    trained = {token for row in stream(tokens, 500) for token in row}
    held_out = {
        token for source in SIZES for rows in validation_batches(tokens, source, LENGTH, None, 4) for token in rows.flat
    }
    assert max(trained) < 30_000 <= min(held_out)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(size=st.integers(LENGTH + 1, 60), rows=st.integers(1, 7))
def test_validation_reads_every_full_window_once_in_order(
    size: int, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_streams(tmp_path_factory.mktemp("tokens"), {"en": 9}, size)
    parts = list(validation_batches(folder, "en", LENGTH, None, rows))
    windows = (size - 1) // LENGTH
    assert [len(part) for part in parts] == [rows] * (windows // rows) + [windows % rows] * (windows % rows > 0)
    targets = np.concatenate(parts)[:, 1:].ravel()
    assert np.array_equal(targets, 30_000 + 1 + np.arange(windows * LENGTH))
    assert parts[0].dtype == np.int64


@pytest.mark.parametrize(("max_tokens", "windows"), [(1, 1), (4, 1), (7, 1), (8, 2), (40, 10), (10_000, 11)])
def test_validation_stops_at_max_tokens(max_tokens: int, windows: int, tokens: Path) -> None:
    parts = list(validation_batches(tokens, "zh", LENGTH, max_tokens, 3))
    everything = np.concatenate(list(validation_batches(tokens, "zh", LENGTH, None, 3)))
    assert np.array_equal(np.concatenate(parts), everything[:windows])


def test_unknown_sources_are_refused_with_the_nearest_name(tokens: Path) -> None:
    with pytest.raises(UserError, match=r"mixture\.em: .* did you mean 'en'\?"):
        batches(tokens, em=1.0)
    with pytest.raises(UserError, match="no such source"):
        validation_batches(tokens, "fr", LENGTH, None, 4)


def test_a_batch_that_does_not_divide_among_the_workers_is_refused(tokens: Path) -> None:
    with pytest.raises(UserError, match="8 sequences does not divide among 3 workers; choose a multiple of 12 tokens"):
        batches(tokens, 8, world=3)


def test_a_split_shorter_than_a_sequence_is_refused_at_once_with_both_lengths(tokens: Path) -> None:
    with pytest.raises(UserError, match="sequence_length: 46 tokens, but the validation split of en has only 46"):
        validation_batches(tokens, "en", VALIDATION_SIZE, None, 4)
    with pytest.raises(UserError, match="train split of zh has only 1481; choose at most 1480"):
        Batches(tokens, {"zh": 1.0}, 1481, 8, seed=0)


def test_more_windows_than_can_be_shuffled_are_refused(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAX_WINDOWS", 900)
    with pytest.raises(UserError, match="cuts en into 900 windows, and only 899 can be shuffled; choose at least 5"):
        batches(tokens, en=1.0)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Eight gigabytes of tokens, as a file with a hole."""
    documents, size = 4, 2**30
    dtype = token_dtype(60_000)
    write_streams(tmp_path, {"en": 9})
    ends = np.arange(documents + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, 1, CODES[dtype], documents, documents + 1)
    lengths = np.full(documents, size, dtype="<i4")
    (tmp_path / "train-en.idx").write_bytes(
        header + lengths.tobytes() + (ends[:-1] * size * dtype.itemsize).tobytes() + ends.tobytes()
    )
    with (tmp_path / "train-en.bin").open("wb") as file:
        file.truncate(documents * size * dtype.itemsize)
        file.seek((documents * size - 1) * dtype.itemsize)
        file.write(np.array([7], dtype=dtype).tobytes())
    tracemalloc.start()
    source = Batches(tmp_path, {"en": 1.0}, 1, 64, seed=0)
    rows = [source.read(position) for position in range(0, 6400, 64)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6
    assert np.concatenate(rows).sum() == 0


def test_the_loader_imports_no_torch_and_is_silent(tokens: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from aquilamoe.data.loader import Batches;"
        f"Batches(Path({str(tokens)!r}), {{'en': 1.0}}, 4, 2, 0).read(0);"
        "from absl import logging; logging.warning('heard');"
        "sys.exit(bool({'torch', 'jax', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "WARNING:absl:heard\n")


@pytest.mark.parametrize("module", ["corpus", "tokenizer", "tokens", "loader"])
def test_importing_data_modules_loads_no_heavy_library(module: str) -> None:
    script = (
        f"import sys, aquilamoe.data.{module}; print({{'torch', 'pyarrow', 'tokenizers', 'grain'}} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
