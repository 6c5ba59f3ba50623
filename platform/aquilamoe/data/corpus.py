"""Documents: a user's parquet, jsonl or txt files become one parquet file per split and source.

Everything streams: memory holds one row group (`ROW_GROUP_BYTES` of text per split), whatever the size of the corpus,
and the same input gives the same bytes. Nothing is deduplicated; documents without text are left out and counted, and
one that is not what it should be is refused. A corpus that is cleaned (`data.cleaning`) has a folder of such files in
the place of each.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import local
from aquilamoe.config.plugins import PACKAGE_ROOT
from aquilamoe.config.schema import CorpusStage, SourceConfig
from aquilamoe.format import size

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SPLITS = ("train", "validation")
PACKAGE_PREFIX = "package://"

# Text in a row group of the output: also what a reader of it holds at a time.
ROW_GROUP_BYTES = 4 << 20
# Rows taken from an input file at a time: its own row groups may be gigabytes.
INPUT_ROWS = 256
# UTF-8 bytes of a document that is not cleaned: encoding one takes some thirty times its size in memory.
MAX_DOCUMENT_BYTES = 1 << 25


@dataclass(frozen=True)
class Document:
    """One document: `split` as the file has it, None where the file has none; `place` is for messages."""

    text: str
    split: str | None
    place: str


def split_file(corpus: Path, split: str, source: str) -> Path:
    """The file, or folder of files, of a prepared corpus that holds the documents of a split of a source."""
    return corpus / f"{split}-{source}.parquet"


def source_names(corpus: Path) -> list[str]:
    """The sources of a prepared corpus; UserError if `corpus` is not one."""
    prefix = f"{SPLITS[0]}-"
    names = sorted(path.stem.removeprefix(prefix) for path in corpus.glob(f"{prefix}*.parquet"))
    if not names:
        raise UserError(f"{corpus}: no {prefix}*.parquet files; give the output folder of a corpus stage")
    return names


def prepare_corpus(stage: CorpusStage, out: Path) -> dict[str, float]:
    """Write `{train,validation}-{source}.parquet` (columns text, lang; lang is the source's name) into `out`.

    Returns, per split and source, the number of documents and of UTF-8 bytes, and per source the documents left out.
    UserError: no such file, another checksum, no text, an unreadable file, an empty split.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    for source, config in sorted(stage.sources.items()):
        metrics |= _prepare_source(source, config, stage.validation_fraction, out)
    return metrics


def split_parts(path: Path) -> list[Path]:
    """The files that `split_file` stands for, in their order."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def read_documents(path: Path) -> Iterator[list[str]]:
    """The texts of a prepared split in order, in lists of at most about `ROW_GROUP_BYTES`."""
    for part in split_parts(path):
        yield from read_groups(part)


def read_groups(path: Path, start: int = 0, stop: int | None = None) -> Iterator[list[str]]:
    """The texts of a prepared file's row groups from `start` up to `stop`, a list for each."""
    with open_parquet(path) as file:
        for group in range(start, file.num_row_groups if stop is None else stop):
            yield file.read_row_group(group, columns=["text"]).column(0).to_pylist()


def count_bytes(path: Path) -> int:
    """About the number of bytes of text in a prepared split, from footers: exact but for 4 bytes a document."""
    return sum(size for part in split_parts(path) for _, size in group_sizes(part))


def group_sizes(path: Path) -> list[tuple[int, int]]:
    """Documents, and about the bytes of text, of each row group of a prepared file."""
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        return [(group.num_rows, group.column(0).total_uncompressed_size) for group in groups]


def _prepare_source(source: str, config: SourceConfig, validation_fraction: float, out: Path) -> dict[str, float]:
    check_source_name(source)
    files = source_files(source, config)
    writers = {split: SplitWriter(split_file(out, split, source), source) for split in SPLITS}
    left_out = 0
    try:
        for path in files:
            for document in _documents(path):
                if not document.text:
                    left_out += 1
                    continue
                split = _split_of(document, validation_fraction)
                writers[split].add(document.text.encode())
    finally:
        for writer in writers.values():
            writer.close()
    for split, writer in writers.items():
        if not writer.documents:
            total = sum(other.documents for other in writers.values())
            raise UserError(
                f"sources.{source}: the {split} split is empty ({total} documents with text in {len(files)} files, "
                f"validation_fraction {validation_fraction}); add documents, change validation_fraction, or give the "
                f"files a column 'split' with both train and validation"
            )
    counts = {f"{split}/{source}/documents": float(writer.documents) for split, writer in writers.items()}
    sizes = {f"{split}/{source}/bytes": float(writer.bytes) for split, writer in writers.items()}
    return counts | sizes | {f"left_out/{source}/documents": float(left_out)}


def check_source_name(source: str) -> None:
    """Refuse a name that cannot be part of a file's."""
    if not re.fullmatch(r"[\w.-]+", source):
        raise UserError(f"sources.{source}: a source's name becomes a file name; use letters, digits, '_', '.' and '-'")


def text_hash(text: bytes) -> int:
    """The first 64 bits of the SHA-256 of a text: what it is held out by, and compared with others."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def split_by_hash(digest: int, validation_fraction: float) -> str:
    """The split of a text by its hash alone: equal texts never lie in both, and stay when others come."""
    return "validation" if digest < validation_fraction * 2.0**64 else "train"


def _split_of(document: Document, validation_fraction: float) -> str:
    """The split that the file names, or else one by the text's hash."""
    if document.split is None:
        return split_by_hash(text_hash(document.text.encode()), validation_fraction)
    if document.split not in SPLITS:
        raise UserError(f"{document.place}: split {document.split!r} is not known; use 'train' or 'validation'")
    return document.split


class SplitWriter:
    """Writes the documents of one split, a row group at a time."""

    def __init__(self, path: Path, lang: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.documents = 0
        self.bytes = 0
        self._lang = lang
        self._texts: list[bytes] = []
        self._texts_bytes = 0
        self._schema = pa.schema([("text", pa.string()), ("lang", pa.string())])
        # No dictionary for text: documents differ, and `count_bytes` reads the plain size.
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=["lang"])

    def add(self, text: bytes) -> None:
        """Append a document, valid UTF-8."""
        if self._texts and self._texts_bytes + len(text) > ROW_GROUP_BYTES:
            self._flush()
        self._texts.append(text)
        self._texts_bytes += len(text)
        self.documents += 1
        self.bytes += len(text)

    def close(self) -> None:
        if self._texts:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = {"text": pa.array(self._texts, pa.binary()), "lang": [self._lang] * len(self._texts)}
        columns["text"] = columns["text"].cast(pa.string())
        self._file.write_table(pa.table(columns, schema=self._schema))
        self._texts, self._texts_bytes = [], 0


def source_files(source: str, config: SourceConfig) -> list[Path]:
    """The files that a source's path names, sorted, their kind known and their checksum right."""
    assert config.path is not None, "a data set of a hub has no files here"
    where = f"sources.{source}.path"
    if config.path.startswith(PACKAGE_PREFIX):
        pattern = path_inside(PACKAGE_ROOT / "data", config.path.removeprefix(PACKAGE_PREFIX), where)
    else:
        pattern = local(config.path)
    if pattern.is_dir():
        raise UserError(f"{where}: '{config.path}' is a folder; name its files, e.g. '{config.path}/*.parquet'")
    # A file whose name happens to hold [ or * is that file.
    root = Path(pattern.anchor or ".")
    relative = str(pattern.relative_to(pattern.anchor))
    files = [pattern] if pattern.is_file() else sorted(path for path in root.glob(relative) if path.is_file())
    if not files:
        raise UserError(f"{where}: no file matches '{config.path}' (looked for {pattern.absolute()}); correct the path")
    for path in files:
        if path.suffix not in _READERS:
            raise UserError(f"{where}: {path} is none of {', '.join(_READERS)}; convert it or narrow the path")
    if config.sha256 is not None:
        _check_sum(source, config.sha256, files)
    return files


def path_inside(folder: Path, name: str, where: str) -> Path:
    """A path, or glob, below a folder of a package; refused if it leads out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: '{name}' is outside the package; name a file in it, or give a path without ://")
    return folder / name


def _check_sum(source: str, expected: str, files: list[Path]) -> None:
    where = f"sources.{source}.sha256"
    if len(files) > 1:
        raise UserError(f"{where}: one checksum for {len(files)} files; name a single file, or set it to null")
    with files[0].open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected.lower():
        raise UserError(
            f"{where}: {files[0]} has SHA-256 {actual}, not {expected}; restore the file, or set the checksum to the "
            "new value if the change is meant"
        )


def _documents(path: Path) -> Iterator[Document]:
    for document in _READERS[path.suffix](path):
        try:
            if len(document.text.encode()) > MAX_DOCUMENT_BYTES:
                raise _too_long(document.place)
        except UnicodeEncodeError as error:
            raise UserError(
                f"{document.place}: text is not valid Unicode ({error.reason}); repair or drop it"
            ) from None
        yield document


def open_parquet(path: Path) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it belongs to the output of a corpus stage") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)}); copy or write it again") from None


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow as pa

    with open_parquet(path) as file:
        schema = file.schema_arrow
        check_columns(path, schema.names, ("text", "split"))
        if "text" not in schema.names:
            raise UserError(f"{path}: no column 'text', only {', '.join(schema.names)}; rename the text's column")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column 'text' holds {kind}, not strings; convert it")
        columns = [name for name in ("text", "split") if name in schema.names]
        row = 0
        try:
            for batch in file.iter_batches(batch_size=INPUT_ROWS, columns=columns):
                for values in _rows(batch, path, row):
                    row += 1
                    yield _document(values, f"{path}, row {row}")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: corrupt after row {row} ({first_line(error)}); copy it again") from None


def check_columns(path: Path | str, names: Sequence[str], required: Iterable[str]) -> None:
    """Refuse a table with several columns of a name that is read."""
    for name in required:
        if (count := names.count(name)) > 1:
            raise UserError(f"{path}: {count} columns '{name}'; remove or rename all but one")


def _rows(batch: "pa.RecordBatch", path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch; `before` rows of the file come before them."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not check what a file calls a string
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, row {before + row + 1}: not UTF-8 at byte {error.start} of a text; repair or drop it, or "
                    "let the corpus leave out what cannot be used: data.cleaning={deduplicate: true}"
                ) from None
        raise


def _read_jsonl(path: Path) -> Iterator[Document]:
    limit = 2 * MAX_DOCUMENT_BYTES  # JSON escapes a Chinese character in twice its bytes
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, limit), b""), start=1):
            place = f"{path}, line {number}"
            if len(line) == limit:
                raise _too_long(place)
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON ({first_line(error)}); repair or drop the line") from None
            if not isinstance(values, dict):
                raise UserError(
                    f"{place}: {type(values).__name__} instead of an object with a field 'text'; convert it"
                )
            yield _document(values, place)


def _read_txt(path: Path) -> Iterator[Document]:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise _too_long(str(path))
    try:
        yield Document(path.read_bytes().decode(), None, str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None


def _too_long(place: str) -> UserError:
    return UserError(
        f"{place}: a document longer than {size(MAX_DOCUMENT_BYTES)}; cut it into several, or let the corpus leave out "
        "what is too long: data.cleaning={max_document_bytes: 10_000_000}"
    )


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}


def _document(values: dict[str, Any], place: str) -> Document:
    """A row or object as a document; a null text is an empty one."""
    if "text" not in values:
        raise UserError(f"{place}: no field 'text', only {', '.join(values) or 'none'}; rename the text's field")
    text = "" if values["text"] is None else values["text"]
    if not isinstance(text, str):
        raise UserError(f"{place}: 'text' holds {type(text).__name__}, not a string; convert it")
    if "split" in values and not isinstance(values["split"], str):
        raise UserError(f"{place}: split {values['split']!r} is not known; use 'train' or 'validation'")
    return Document(text, values.get("split"), place)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
