"""How fast a corpus becomes token files, beside the tokenizers library alone on the same documents.

python benchmarks/tokenizing.py FILE [FILE ...] [--megabytes N] [--processes N] [--rounds N] [--out FILE]

The files (parquet or jsonl with a column `text`) are cleaned into a corpus once, then it is tokenised in turn by

  the library alone   as many processes, each with one thread and its share of the documents in memory; timed is
                      `encode_batch_fast` from the moment when all are ready to the moment when the last is done
  the stage           `data.encoding.tokenize_corpus`: starting the processes, reading parquet, encoding, writing and
                      joining token files, all of it

Wall time depends on who else is at work; CPU time, of all processes, much less. The stage's has all that the processes
do, their start and their imports included. The tokenizer is a byte-level BPE of 4096, learned from the embedded texts.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from aquilamoe.config.schema import CorpusStage
from aquilamoe.data.cleaning import clean_corpus
from aquilamoe.data.corpus import PACKAGE_PREFIX, SPLITS, prepare_corpus, read_documents, source_names, split_file
from aquilamoe.data.encoding import tokenize_corpus
from aquilamoe.data.tokenizer import load_tokenizer, train_tokenizer

GOAL = 0.8
BATCH_BYTES = 1 << 22
EMBEDDED = {"en": "embedded/en_austen.parquet", "zh": "embedded/zh_sanguo.parquet"}


def corpus_stage(paths: dict[str, str], clean: bool) -> CorpusStage:
    cleaning = {"cleaning": {"shard_bytes": 1 << 22}} if clean else {}
    sources = {name: {"path": path} for name, path in paths.items()}
    return CorpusStage.model_validate(
        {"kind": "corpus", "inputs": {}, "sources": sources, "validation_fraction": 0.01, **cleaning}
    )


def first_part(file: Path, megabytes: float, folder: Path) -> Path:
    """The first documents of a file, as JSON lines: what most corpora come as."""
    target, left = folder / f"{file.stem}.jsonl", megabytes * 1e6
    with target.open("w") as out:
        for batch in pq.ParquetFile(file).iter_batches(256, columns=["text"]):
            for text in pa.Table.from_batches([batch]).column(0).to_pylist():
                if left > 0:
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    left -= len(text.encode())
    return target


def batches(corpus: Path, share: int, shares: int) -> list[list[str]]:
    """This process's documents, in lists of about 4 MB."""
    found: list[list[str]] = [[]]
    number = size = 0
    for source in source_names(corpus):
        for split in SPLITS:
            for texts in read_documents(split_file(corpus, split, source)):
                for text in texts:
                    number += 1
                    if number % shares == share:
                        if size > BATCH_BYTES:
                            found.append([])
                            size = 0
                        found[-1].append(text)
                        size += len(text.encode())
    return found


def encode_alone(corpus: Path, tokenizer: Path, share: int, shares: int, pipe: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder, own = load_tokenizer(tokenizer), batches(corpus, share, shares)
    pipe.send("ready")
    pipe.recv()
    before = time.process_time()
    for texts in own:
        encoder.encode_batch_fast(texts, add_special_tokens=False)
    pipe.send(time.process_time() - before)


def library_seconds(corpus: Path, tokenizer: Path, processes: int) -> tuple[float, float]:
    """Seconds on the wall, and of CPUs."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    running = [
        context.Process(target=encode_alone, args=(corpus, tokenizer, share, processes, theirs), daemon=True)
        for share, (_, theirs) in enumerate(pipes)
    ]
    for process in running:
        process.start()
    for ours, _ in pipes:
        ours.recv()
    started = time.perf_counter()
    for ours, _ in pipes:
        ours.send("go")
    cpu_s = sum(ours.recv() for ours, _ in pipes)
    seconds = time.perf_counter() - started
    for process in running:
        process.join()
    return seconds, cpu_s


def stage_seconds(corpus: Path, tokenizer: Path, processes: int, folder: Path) -> tuple[float, float]:
    """Seconds on the wall, and of CPUs: this process's and those of the processes that it starts."""
    started, before = time.perf_counter(), cpu_seconds()
    tokenize_corpus(corpus, tokenizer, folder, processes=processes)
    return time.perf_counter() - started, cpu_seconds() - before


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


Seconds = list[tuple[float, float]]


def page(args: argparse.Namespace, megabytes: float, clean_s: float, alone: Seconds, stage: Seconds) -> str:
    rows = []
    for name, seconds in (("the library alone", alone), ("the stage", stage)):
        (wall, cpu), (wall_0, cpu_0) = medians(seconds), medians(alone)
        rows.append(
            f"| {name} | {wall:.1f} | {megabytes / wall:.2f} | {wall_0 / wall:.2f} | {cpu:.1f} | "
            f"{megabytes / cpu:.2f} | {cpu_0 / cpu:.2f} |"
        )
    rounds = ", ".join(f"{a[1] / b[1]:.2f}" for a, b in zip(alone, stage, strict=True))
    command = f"python benchmarks/tokenizing.py FILES --megabytes {args.megabytes:g} --processes {args.processes}"
    return "\n".join(
        [
            "# Tokenising: beside the tokenizers library alone",
            "",
            f"`{command} --rounds {args.rounds}` wrote this page: {megabytes:.1f} MB of text, {len(args.files)} files, "
            f"{args.processes} processes on {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} (others were "
            "at work, too, as far as it exceeds the processes), medians.",
            "",
            "```text",
            *"\n\n".join((__doc__ or "").split("\n\n")[2:]).strip().splitlines(),
            "```",
            "",
            "| what | seconds | MB/s | of the library's | CPU seconds | MB per CPU second | of the library's |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Of the library's speed by CPU time, round by round: {rounds}. The goal is {GOAL}.",
            "",
            f"Cleaning the same text from JSON lines into the corpus (SHA-256 of each document, duplicates, zstd) took "
            f"{clean_s:.1f} s, {megabytes / clean_s:.1f} MB/s, once.",
            "",
        ]
    )


def medians(seconds: Seconds) -> tuple[float, float]:
    return statistics.median(wall for wall, _ in seconds), statistics.median(cpu for _, cpu in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of each file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_corpus(
            corpus_stage({lang: PACKAGE_PREFIX + path for lang, path in EMBEDDED.items()}, clean=False), folder / "own"
        )
        train_tokenizer(folder / "own", 4096, folder / "tokenizer")
        paths = {file.stem.replace(" ", "_"): str(first_part(file, args.megabytes, folder)) for file in args.files}
        started = time.perf_counter()
        metrics = clean_corpus(
            corpus_stage(paths, clean=True), folder / "corpus", folder / "scratch", processes=args.processes
        )
        clean_s = time.perf_counter() - started
        megabytes = sum(float(value) for key, value in metrics.items() if key.endswith("/bytes")) / 1e6
        alone: Seconds = []
        stage: Seconds = []
        for number in range(args.rounds):
            alone.append(library_seconds(folder / "corpus", folder / "tokenizer", args.processes))
            out = folder / f"tokens-{number}"
            stage.append(stage_seconds(folder / "corpus", folder / "tokenizer", args.processes, out))
            print(f"round {number + 1}: library {alone[-1]}, stage {stage[-1]} (wall, CPU seconds)", flush=True)
    text = page(args, megabytes, clean_s, alone, stage)
    print(text)
    if args.out:
        args.out.write_text(text)
    sys.exit(medians(alone)[1] / medians(stage)[1] < GOAL)


if __name__ == "__main__":
    main()
