"""Data sets that the library `datasets` opens: names on the Hugging Face hub, and local folders. The only file that
imports it.

A data set is cut by its own files where it is streamed, and by rows where it was fetched whole.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aquilamoe.config.corpus import HubConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import local

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 256


def ranges(config: HubConfig, where: str, shard_bytes: int) -> list[tuple[int, int]]:
    """How a data set is cut: ranges of its shards (streaming) or of its rows; UserError if it cannot be opened."""
    data = _open(config, where)
    if config.streaming:
        return [(shard, shard + 1) for shard in range(data.num_shards)]
    rows = max(1, shard_bytes * data.num_rows // max(1, data.data.nbytes))
    return [(start, min(start + rows, data.num_rows)) for start in range(0, data.num_rows, rows)]


def tables(config: HubConfig, where: str, start: int, stop: int) -> "Iterator[pa.Table]":
    """A range of a data set as tables of a few rows; UserError if it cannot be read."""
    data = _open(config, where)
    try:
        shard = data.shard(data.num_shards, start) if config.streaming else data.select(range(start, stop))
        yield from shard.with_format("arrow").iter(batch_size=BATCH_ROWS)
    except Exception as error:  # the network's, the file format's, the library's own
        raise UserError(
            f"{where}: '{config.name}' cannot be read completely ({_first_line(error)}); run again"
        ) from None


def _open(config: HubConfig, where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{where}: needs the library datasets; pip install -c constraints.txt -e '.[data]', or name files in path"
        ) from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            str(local(config.name)),
            config.subset,
            split=config.split,
            revision=config.revision,
            data_files=config.data_files,
            streaming=config.streaming,
        )
    except Exception as error:  # the library's, the hub's and the network's: a hundred kinds
        from huggingface_hub.constants import is_offline_mode

        remedy = "unset HF_HUB_OFFLINE to reach the hub" if is_offline_mode() else "check its name, subset and split"
        raise UserError(f"{where}: '{config.name}' cannot be opened ({_first_line(error)}); {remedy}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
