"""A corpus of any size and quality: read in parallel, shard by shard, cleaned, filtered, and without texts that repeat.

Every shard leaves a file for each split, the hashes of its documents, and a report, which is written last: what has a
report is not read again. When all have one, the documents that came before in another shard are taken out, and the
files go to their places. The output depends on the configuration and the input alone, neither on the number of
processes nor on where an earlier run was killed.
"""

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aquilamoe.config.corpus import CleaningConfig, FiltersConfig, SourceConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data import reading
from aquilamoe.data.corpus import (
    SPLITS,
    SplitWriter,
    check_source_name,
    read_groups,
    split_by_hash,
    split_file,
    text_hash,
)
from aquilamoe.data.duplicates import first_occurrences
from aquilamoe.data.processes import available, share_out
from aquilamoe.data.reading import Place, RawDocument, SourceShard

# Documents that are named, of each thing that can be wrong with one, in the report of a source.
NAMED = 5
LEFT_OUT = "left_out.json"
PROBLEMS = {
    "invalid_utf8": "not valid UTF-8",
    "not_json": "not JSON",
    "no_text": "no text in its field",
    "empty": "empty",
    "too_long": "longer than max_document_bytes",
    "unknown_split": "a split that is neither train nor validation",
}
Progress = Callable[[int, int], None]
# Input for which one process does.
SMALL_BYTES = 1 << 25
FEW_SHARDS = 8


@dataclass(frozen=True)
class Settings:
    """What all shards of a source have in common. folder: where they leave their files."""

    config: SourceConfig
    cleaning: CleaningConfig
    validation_fraction: float
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a shard's documents. bad: how many, by problem; named: the first of each, with the problem."""

    bad: dict[str, int]
    named: list[tuple[Place, str]]
    filtered: int
    duplicates: int
    documents: dict[str, int]
    bytes: dict[str, int]


def clean_corpus(
    stage: CorpusStage, out: Path, scratch: Path, processes: int | None = None, progress: Progress = lambda *_: None
) -> dict[str, float | str]:
    """Write folders `{train,validation}-{source}.parquet` (columns text, lang) into `out`.

    scratch: where finished shards wait, and are found by a run that comes after a killed one. processes: None chooses
    by the size of the input. progress: shards done, of all. Returns, per split and source, documents and UTF-8 bytes,
    and per source what was left out and the first document of those; `left_out.json` names more. UserError: no such
    file or data set, an empty split.
    """
    assert stage.cleaning is not None
    out.mkdir(parents=True, exist_ok=True)
    work: dict[str, tuple[Settings, list[SourceShard]]] = {}
    for source, config in sorted(stage.sources.items()):
        check_source_name(source)
        settings = Settings(config, stage.cleaning, stage.validation_fraction, scratch / source)
        shards = reading.shards(source, config, stage.cleaning.shard_bytes)
        _forget_other_input(settings, shards, out)
        work[source] = (settings, shards)
    processes = processes or _fitting([shard for _, shards in work.values() for shard in shards])
    _read_all(work, processes, progress)
    metrics: dict[str, float | str] = {}
    left_out = {}
    for source, (settings, shards) in work.items():
        reports = _without_repeats(settings, shards, out, processes)
        left_out[source] = _named(reports)
        metrics |= _metrics(source, reports, left_out[source])
        _check_splits(source, stage.validation_fraction, metrics)
    (out / LEFT_OUT).write_text(json.dumps(left_out, indent=1, ensure_ascii=False) + "\n")
    return metrics


def _fitting(shards: list[SourceShard]) -> int:
    """As many processes as pay: other processes take about a second to start."""
    parts = [part for shard in shards for part in shard.parts]
    is_small = all(part.kind != reading.HUB for part in parts) and sum(part.bytes for part in parts) < SMALL_BYTES
    return 1 if is_small else available()


def _forget_other_input(settings: Settings, shards: list[SourceShard], out: Path) -> None:
    """Start again where the files are no longer those that an earlier run has read."""
    folder, source = settings.folder, settings.folder.name
    seen = folder / "input.json"
    now = json.dumps({"shards": [asdict(shard) for shard in shards]})
    if not seen.is_file() or seen.read_text() != now:
        for path in (folder, *(split_file(out, split, source) for split in SPLITS)):
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True)
        seen.write_text(now)


def _read_all(work: dict[str, tuple[Settings, list[SourceShard]]], processes: int, progress: Progress) -> None:
    waiting = [
        (settings, shard)
        for settings, shards in work.values()
        for shard in shards
        if not _report_file(settings.folder, shard.number).is_file()
    ]
    total = sum(len(shards) for _, shards in work.values())
    done = total - len(waiting)
    progress(done, total)
    for _ in share_out(_clean, waiting, processes):
        done += 1
        progress(done, total)


def _clean(task: tuple[Settings, SourceShard]) -> None:
    """Read one shard and leave its files, the report last."""
    settings, shard = task
    shard_writer = _ShardWriter(settings, shard)
    bad: Counter[str] = Counter()
    named: list[tuple[Place, str]] = []
    filtered = 0
    try:
        for row in reading.read(shard, settings.config, settings.cleaning.max_document_bytes):
            problem = row.problem or _problem(row, settings)
            if problem:
                bad[problem] += 1
                if bad[problem] <= NAMED:
                    named.append((row.place, problem))
            elif _passes_filters(row, settings.config.filters):
                shard_writer.add(row)
            else:
                filtered += 1
    finally:
        shard_writer.close()
    documents = {split: writer.documents for split, writer in shard_writer.writers.items()}
    sizes = {split: writer.bytes for split, writer in shard_writer.writers.items()}
    report = Report(
        bad=dict(bad),
        named=named,
        filtered=filtered,
        duplicates=shard_writer.duplicates,
        documents=documents,
        bytes=sizes,
    )
    _write_report(_report_file(settings.folder, shard.number), report)


class _ShardWriter:
    """Writes the documents of a shard by split, and the hash and the split of each in their order."""

    def __init__(self, settings: Settings, shard: SourceShard) -> None:
        self.settings, self.number = settings, shard.number
        self.writers = {
            split: SplitWriter(_part(settings.folder, split, shard.number), shard.source) for split in SPLITS
        }
        self.duplicates = 0
        self._seen: set[int] = set()
        self._hashes, self._splits = array("Q"), array("B")

    def add(self, row: RawDocument) -> None:
        assert row.text is not None
        digest = text_hash(row.text)
        if self.settings.cleaning.deduplicate:
            if digest in self._seen:
                self.duplicates += 1
                return
            self._seen.add(digest)
        split = row.values.get(self.settings.config.split) or split_by_hash(digest, self.settings.validation_fraction)
        self._hashes.append(digest)
        self._splits.append(SPLITS.index(split))
        self.writers[split].add(row.text)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        np.save(_hash_file(self.settings.folder, self.number), np.frombuffer(self._hashes, np.uint64))
        np.save(_split_flags(self.settings.folder, self.number), np.frombuffer(self._splits, np.uint8))


def _problem(row: RawDocument, settings: Settings) -> str | None:
    """What is wrong with a document that has a text."""
    assert row.text is not None
    if len(row.text) > settings.cleaning.max_document_bytes:
        return "too_long"
    try:
        if not row.text.decode().strip():
            return "empty"
    except UnicodeDecodeError:
        return "invalid_utf8"
    split = row.values.get(settings.config.split)
    return None if split is None or split in SPLITS else "unknown_split"


def _passes_filters(row: RawDocument, filters: FiltersConfig) -> bool:
    assert row.text is not None
    within = filters.min_bytes <= len(row.text) and (filters.max_bytes is None or len(row.text) <= filters.max_bytes)
    return within and all(row.values.get(name) in allowed for name, allowed in filters.columns.items())


def _without_repeats(settings: Settings, shards: list[SourceShard], out: Path, processes: int) -> list[Report]:
    """Put the files of all shards into their places, without documents that came before; return the reports."""
    folder = settings.folder
    hash_files = [_hash_file(folder, shard.number) for shard in shards]
    ends = np.cumsum([np.load(path, mmap_mode="r").size for path in hash_files]).tolist()
    total = ends[-1] if ends else 0
    is_first = np.ones(total, dtype=bool) if total == 0 or not settings.cleaning.deduplicate else None
    if is_first is None:
        is_first = first_occurrences(hash_files, folder / "first.npy")
    ranges = zip(shards, [0, *ends], ends, strict=False)
    tasks = [(shard, start, stop) for shard, start, stop in ranges]
    whole = [task for task in tasks if is_first[task[1] : task[2]].all()]
    others = [task for task in tasks if not is_first[task[1] : task[2]].all()]
    for split in SPLITS:
        for shard in shards[:1]:
            split_file(out, split, shard.source).mkdir(exist_ok=True)
    # Other processes take a second to start, in which this one writes a few shards.
    reports = dict(share_out(partial(_place, settings, out), others, processes if len(others) > FEW_SHARDS else 1))
    for shard, _, _ in whole:
        reports[shard.number] = _move(settings, out, shard)
    return [reports[shard.number] for shard in shards]


def _move(settings: Settings, out: Path, shard: SourceShard) -> Report:
    """Move a shard's files to where they belong, unless a run that was killed has done so."""
    report = _read_report(_report_file(settings.folder, shard.number))
    for split in SPLITS:
        part = _part(settings.folder, split, shard.number)
        if report.documents[split] and part.is_file():
            part.replace(_final(out, split, shard))
    return report


def _place(settings: Settings, out: Path, task: tuple[SourceShard, int, int]) -> tuple[int, Report]:
    """Write what is left of a shard of which documents came before. task: with their range among all of the source."""
    shard, start, stop = task
    folder = settings.folder
    report = _read_report(_report_file(folder, shard.number))
    kept = np.load(folder / "first.npy", mmap_mode="r")[start:stop]
    flags = np.load(_split_flags(folder, shard.number))
    documents, sizes = {}, {}
    for index, split in enumerate(SPLITS):
        kept_here = kept[flags == index]
        documents[split], sizes[split] = 0, 0
        if kept_here.any():
            part, final = _part(folder, split, shard.number), _final(out, split, shard)
            documents[split], sizes[split] = _write_kept(part, final, shard.source, kept_here)
    duplicates = report.duplicates + int(np.count_nonzero(~kept))
    return shard.number, Report(
        bad=report.bad,
        named=report.named,
        filtered=report.filtered,
        duplicates=duplicates,
        documents=documents,
        bytes=sizes,
    )


def _write_kept(part: Path, final: Path, source: str, kept: np.ndarray) -> tuple[int, int]:
    """Write the documents that are kept; `part` stays, for a run after a killed one."""
    temporary = part.with_suffix(".kept")
    writer = SplitWriter(temporary, source)
    start = 0
    for texts in read_groups(part):
        for text, is_kept in zip(texts, kept[start : start + len(texts)], strict=True):
            if is_kept:
                writer.add(text.encode())
        start += len(texts)
    writer.close()
    temporary.replace(final)
    return writer.documents, writer.bytes


def _named(reports: list[Report]) -> list[dict[str, str]]:
    """The first documents of each problem, with their places, in the order of the source."""
    seen: Counter[str] = Counter()
    found = []
    for place, problem in (entry for report in reports for entry in report.named):
        seen[problem] += 1
        if seen[problem] <= NAMED:
            found.append({"document": reading.describe(place), "problem": PROBLEMS[problem]})
    return found


def _metrics(source: str, reports: list[Report], named: list[dict[str, str]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for split in SPLITS:
        found[f"{split}/{source}/documents"] = float(sum(report.documents[split] for report in reports))
        found[f"{split}/{source}/bytes"] = float(sum(report.bytes[split] for report in reports))
    bad = sum((Counter(report.bad) for report in reports), Counter[str]())
    found[f"left_out/{source}/documents"] = float(bad.total())
    found |= {f"left_out/{source}/{problem}": float(count) for problem, count in sorted(bad.items())}
    found[f"filtered/{source}/documents"] = float(sum(report.filtered for report in reports))
    found[f"duplicates/{source}/documents"] = float(sum(report.duplicates for report in reports))
    if named:
        found[f"left_out/{source}/first"] = f"{named[0]['document']}: {named[0]['problem']}"
    return found


def _check_splits(source: str, validation_fraction: float, metrics: dict[str, float | str]) -> None:
    for split in SPLITS:
        if not metrics[f"{split}/{source}/documents"]:
            kept = sum(int(metrics[f"{each}/{source}/documents"]) for each in SPLITS)
            first = metrics.get(f"left_out/{source}/first")
            raise UserError(
                f"sources.{source}: the {split} split is empty ({kept} documents kept, "
                f"{metrics[f'left_out/{source}/documents']:.0f} left out{f', the first {first}' if first else ''}, "
                f"{metrics[f'filtered/{source}/documents']:.0f} filtered; validation_fraction {validation_fraction}); "
                "correct the source, or change validation_fraction"
            )


def _final(out: Path, split: str, shard: SourceShard) -> Path:
    return split_file(out, split, shard.source) / f"{shard.number:06d}.parquet"


def _part(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:06d}.parquet"


def _hash_file(folder: Path, number: int) -> Path:
    return folder / f"hashes-{number:06d}.npy"


def _split_flags(folder: Path, number: int) -> Path:
    return folder / f"splits-{number:06d}.npy"


def _report_file(folder: Path, number: int) -> Path:
    return folder / f"report-{number:06d}.json"


def _write_report(path: Path, report: Report) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(report)))
    temporary.replace(path)


def _read_report(path: Path) -> Report:
    values: dict[str, Any] = json.loads(path.read_text())
    named = [(Place(*place), problem) for place, problem in values.pop("named")]
    return Report(named=named, **values)
