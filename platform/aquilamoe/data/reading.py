"""Reading documents shard by shard, with what is wrong with each: nothing here fails because a document is bad.

A shard is what one process reads at a time: row groups of parquet files, ranges of bytes of JSON lines, text files, or
parts of a hub's data set. How a source is cut depends on its files and `shard_bytes` alone. Memory holds a batch of
rows, and of a line no more than `line_limit` bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aquilamoe.config.corpus import SourceConfig
from aquilamoe.config.messages import UserError
from aquilamoe.data import hub
from aquilamoe.data.corpus import INPUT_ROWS, ROW_GROUP_BYTES, check_columns, first_line, open_parquet, source_files

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "hub"
# Of a line whose text has the most bytes allowed: JSON escapes a Chinese character in twice its bytes.
ESCAPED, AROUND_TEXT = 2, 1 << 20
SKIPPED_BYTES = 1 << 20


class Place(NamedTuple):
    """Where a document lies: `number` counts `unit`s of a file, rows from 1 or bytes from 0."""

    file: str
    unit: str
    number: int


class RawDocument(NamedTuple):
    """A document as it was found: its text as bytes that may not be UTF-8, or the problem that there is none.

    values: values of other columns, as far as requested.
    """

    text: bytes | None
    values: dict[str, Any]
    place: Place
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileRange:
    """A range of a file (`kind` parquet: row groups, jsonl: bytes, txt: all), or of a data set's shards or rows."""

    kind: str
    file: str
    start: int
    stop: int
    bytes: int
    changed_ns: int  # when the file was last written


@dataclass(frozen=True)
class SourceShard:
    """Parts of a source, read in order by one process; shards are numbered in the order of the source."""

    source: str
    number: int
    parts: tuple[FileRange, ...]


def shards(source: str, config: SourceConfig, shard_bytes: int) -> list[SourceShard]:
    """Cut a source into shards of about `shard_bytes`; UserError if it cannot be opened."""
    if config.hub is not None:
        ranges = hub.ranges(config.hub, f"sources.{source}.hub", shard_bytes)
        return [
            SourceShard(
                source,
                number,
                (FileRange(kind=HUB, file=config.hub.name, start=start, stop=stop, bytes=0, changed_ns=0),),
            )
            for number, (start, stop) in enumerate(ranges)
        ]
    found: list[list[FileRange]] = []
    filled = shard_bytes
    for path in source_files(source, config):
        for part in _parts(path, shard_bytes):
            if not found or filled + part.bytes > shard_bytes:
                found.append([])
                filled = 0
            found[-1].append(part)
            filled += part.bytes
    return [SourceShard(source, number, tuple(parts)) for number, parts in enumerate(found)]


def read(shard: SourceShard, config: SourceConfig, max_document_bytes: int) -> Iterator[RawDocument]:
    """The rows of a shard in order; UserError for a file that cannot be read, or has no column for the text."""
    columns_read = [config.text, config.split, *config.filters.columns]
    for part in shard.parts:
        if part.kind == HUB:
            assert config.hub is not None
            tables = hub.tables(config.hub, f"sources.{shard.source}.hub", part.start, part.stop)
            yield from _table_rows(tables, columns_read, f"{part.file}[{config.hub.split}] from {part.start}", 0)
        elif part.kind == ".parquet":
            yield from _parquet_rows(part, columns_read)
        elif part.kind == ".jsonl":
            yield from _json_rows(part, columns_read, max_document_bytes * ESCAPED + AROUND_TEXT)
        else:
            yield _text_row(part, max_document_bytes)


def describe(place: Place) -> str:
    """A place for people: the line number of a byte, which takes reading the file up to there."""
    if place.unit != "byte":
        return f"{place.file}, {place.unit} {place.number}" if place.unit else place.file
    lines, left = 1, place.number
    with Path(place.file).open("rb") as file:
        while left and (chunk := file.read(min(left, SKIPPED_BYTES))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return f"{place.file}:{lines}"


def _parts(path: Path, shard_bytes: int) -> Iterator[FileRange]:
    status = path.stat()
    if path.suffix == ".jsonl":
        for start in range(0, status.st_size, shard_bytes):
            stop = min(start + shard_bytes, status.st_size)
            yield FileRange(
                kind=path.suffix,
                file=str(path),
                start=start,
                stop=stop,
                bytes=stop - start,
                changed_ns=status.st_mtime_ns,
            )
    elif path.suffix == ".parquet":
        with open_parquet(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        for group, size in enumerate(sizes):
            yield FileRange(
                kind=path.suffix, file=str(path), start=group, stop=group + 1, bytes=size, changed_ns=status.st_mtime_ns
            )
    else:
        yield FileRange(
            kind=path.suffix,
            file=str(path),
            start=0,
            stop=status.st_size,
            bytes=status.st_size,
            changed_ns=status.st_mtime_ns,
        )


def _parquet_rows(part: FileRange, columns_read: list[str]) -> Iterator[RawDocument]:
    import pyarrow as pa

    with open_parquet(Path(part.file)) as file:
        names = file.schema_arrow.names
        check_columns(part.file, names, columns_read)
        metadata = file.metadata
        before = sum(metadata.row_group(group).num_rows for group in range(part.start))
        group = metadata.row_group(part.start)
        # A batch holds documents of a few bytes or of megabytes: as many as are about a row group of ours.
        rows = max(1, min(INPUT_ROWS, ROW_GROUP_BYTES * group.num_rows // max(1, group.total_byte_size)))
        columns = [name for name in dict.fromkeys(columns_read) if name in names]
        batches = file.iter_batches(rows, row_groups=list(range(part.start, part.stop)), columns=columns)
        try:
            tables = (pa.Table.from_batches([batch]) for batch in batches)
            yield from _table_rows(tables, columns_read, part.file, before, names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{part.file}: corrupt ({first_line(error)}); copy it again") from None


def _table_rows(
    tables: "Iterator[pa.Table]", columns_read: list[str], file: str, before: int, names: list[str] | None = None
) -> Iterator[RawDocument]:
    """The rows of tables; `before` rows of the file come before them. names: all columns, for a message."""
    text, split, *others = columns_read
    row = before
    for table in tables:
        check_columns(file, table.column_names, columns_read)
        for name in (text, *others):
            if name not in table.column_names:
                known = ", ".join(names or table.column_names)
                raise UserError(f"{file}: no column '{name}', only {known}; name the right one in the source's text")
        texts = _as_bytes(table, text, file)
        present = [name for name in dict.fromkeys([split, *others]) if name in table.column_names]
        values = [_plain(table, name) for name in present]
        for index, found in enumerate(texts):
            row += 1
            more = {name: column[index] for name, column in zip(present, values, strict=True)}
            yield RawDocument(found, more, Place(file, "row", row), "empty" if found is None else None)


def _as_bytes(table: "pa.Table", name: str, file: str) -> list[bytes | None]:
    """A column of strings as bytes: pyarrow does not check whether they are UTF-8, and Python would fail on a batch."""
    import pyarrow as pa

    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{file}: column '{name}' holds {kind}, not strings; convert it")
    found: list[bytes | None] = table.column(name).cast(kind).cast(pa.large_binary()).to_pylist()
    return found


def _plain(table: "pa.Table", name: str) -> list[Any]:
    import pyarrow as pa

    column = table.column(name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode(errors="replace") for value in values]
    return list(column.to_pylist())


def _json_rows(part: FileRange, columns_read: list[str], line_limit: int) -> Iterator[RawDocument]:
    """The lines that begin in the part's bytes."""
    with Path(part.file).open("rb") as file:
        if part.start:
            file.seek(part.start - 1)
            _skip_line(file.readline(SKIPPED_BYTES), file)
        while (at := file.tell()) < part.stop and (line := file.readline(line_limit)):
            place = Place(part.file, "byte", at)
            if len(line) == line_limit and not line.endswith(b"\n"):
                _skip_line(line, file)
                yield RawDocument(None, {}, place, "too_long")
            elif line.strip():
                yield _json_row(line, columns_read, place)


def _skip_line(begun: bytes, file: Any) -> None:
    while begun and not begun.endswith(b"\n"):
        begun = file.readline(SKIPPED_BYTES)


def _json_row(line: bytes, columns_read: list[str], place: Place) -> RawDocument:
    try:
        values = json.loads(line.decode("utf-8" if place.number else "utf-8-sig"))
    except UnicodeDecodeError:
        return RawDocument(None, {}, place, "invalid_utf8")
    except (ValueError, RecursionError):
        return RawDocument(None, {}, place, "not_json")
    if not isinstance(values, dict):
        return RawDocument(None, {}, place, "no_text")
    text = values.get(columns_read[0], 0)
    more = {name: values[name] for name in columns_read[1:] if name in values}
    if not isinstance(text, str):
        return RawDocument(None, more, place, "empty" if text is None else "no_text")
    try:
        return RawDocument(text.encode(), more, place)
    except UnicodeEncodeError:  # half of a pair, as \ud800
        return RawDocument(None, more, place, "invalid_utf8")


def _text_row(part: FileRange, max_document_bytes: int) -> RawDocument:
    place = Place(part.file, "", 0)
    if part.bytes > max_document_bytes:
        return RawDocument(None, {}, place, "too_long")
    return RawDocument(Path(part.file).read_bytes(), {}, place)
