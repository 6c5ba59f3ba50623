"""Growing checkpoints against the disk and against other tools: durable seconds, peak memory, and their ratios.

python benchmarks/growth.py --peers VENV --out docs/benchmarks/growth.md

A random Llama of bfloat16 is made, and each contestant grows it, in its own process, in turn, for several rounds;
medians count. The clock starts after the imports, with the source in the page cache, and stops when every byte of the
result is on the disk (fsync). Peers are optional: a virtual environment with torch, transformers and mergekit.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEGABYTE = 10**6
HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY = 2048, 5504, 16, 4, 32000
REST_S = 2.0  # after what was deleted is deleted on the disk, too

Row = dict[str, float]
Contestant = Callable[[Path, Path], None]


WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": None}
TWICE = dict.fromkeys((*WIDTHS, "num_key_value_heads"), Fraction(2))
QUARTER = dict.fromkeys(WIDTHS, Fraction(5, 4))
DEEPER = {"num_hidden_layers": Fraction(4, 3)}
# By name: the YAML of conf/, what is changed in it, and the new sizes; a fraction is of the old.
OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "replicate": ("upcycling/copy", {}, EXPERTS),
    "replicate with noise": ("upcycling/noise", {}, EXPERTS),
    "width x2": ("growth/hypercloning", {"noise": 0}, TWICE),
    "width x2 with noise": ("growth/hypercloning", {}, TWICE),
    "width x2, depth x4/3": ("growth/hypercloning", {"noise": 0}, TWICE | DEEPER),
    "width x5/4, depth x4/3": ("growth/fpi", {"new_layers": "zero"}, QUARTER | DEEPER),
}
COLD = "replicate, source not cached"
LIMITS = ("dd oflag=direct", "cp + sync")
PEERS = (
    "mergekit-moe",
    "mergekit-moe with noise",
    "transformers in memory",
    "HyperCloning",
    "HyperCloning with noise",
)


@dataclass(frozen=True)
class Goal:
    """`first` has to be at least `factor` times better than `second` in `what`: seconds (per byte) or memory."""

    first: str
    second: str
    what: str
    factor: float


GOALS = [
    Goal("replicate", "dd oflag=direct", "seconds", 0.95),
    Goal("replicate", "cp + sync", "seconds", 2.5),
    Goal("replicate", "mergekit-moe", "seconds", 5.0),
    Goal("replicate", "mergekit-moe", "memory", 20.0),
    Goal("replicate", "transformers in memory", "seconds", 5.0),
    Goal("replicate", "transformers in memory", "memory", 20.0),
    Goal("replicate with noise", "mergekit-moe with noise", "seconds", 4.0),
    Goal("width x2", "HyperCloning", "seconds", 8.0),
    Goal("width x2 with noise", "HyperCloning with noise", "seconds", 8.0),
    Goal("width x2, depth x4/3", "HyperCloning", "seconds", 8.0),
]


def ours(name: str, source: Path) -> Contestant:
    """A growth of this project by its name in the table."""
    from omegaconf import OmegaConf

    from aquilamoe.checkpoint.hf_config import read_config
    from aquilamoe.config.network import ModelConfig
    from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig

    group, options, sizes = OURS[name]
    values: Any = OmegaConf.to_container(OmegaConf.load(HERE.parent / f"conf/{group}.yaml"))
    old = read_config(source).model_dump()
    new = {key: old[key] * times if isinstance(times, Fraction) else times for key, times in sizes.items()}
    config = ModelConfig.model_validate({**old, **{key: v if v is None else int(v) for key, v in new.items()}})
    if group.startswith("upcycling/"):
        scale_out = importlib.import_module("aquilamoe.growth.scale_out").scale_out
        upcycling = UpcyclingConfig.model_validate({**values, **options})
        return lambda source, target: scale_out(source, target, config, upcycling, seed=0)
    scale_up = importlib.import_module("aquilamoe.growth.scale_up").scale_up
    growth = GrowthConfig.model_validate({**values, **options})
    return lambda source, target: scale_up(source, target, config, growth, seed=0)


def make_source(directory: Path, num_bytes: float) -> None:
    """A Llama of about so many bytes with random weights, and the smallest tokenizer that transformers reads."""
    import torch

    from aquilamoe.checkpoint import hf_config
    from aquilamoe.checkpoint import tensor_names as names
    from aquilamoe.checkpoint.reader import CheckpointWriter
    from aquilamoe.config.network import ModelConfig

    layer_bytes = 2 * (2 * HIDDEN**2 + 2 * HIDDEN**2 * KV_HEADS // HEADS + 3 * HIDDEN * FFN)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=max(3, round((num_bytes - 4 * VOCABULARY * HIDDEN) / layer_bytes / 3) * 3),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=4096,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        qkv_bias=False,
        tie_word_embeddings=False,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
    )
    shapes, random = names.tensor_shapes(config), torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, shapes, torch.bfloat16) as out:
        for name, shape in shapes.items():
            out.write(name, [torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=random)])
    hf_config.write_config(directory, config, "bfloat16", eos_token_id=0)
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "a"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def prepare(name: str, source: Path) -> Contestant:
    """Import what a contestant needs; what is returned is what is timed."""
    if name in (*OURS, COLD):
        return ours("replicate" if name == COLD else name, source)
    peers = importlib.import_module("growth_peers")
    importlib.import_module(peers.IMPORTS.get(name, "transformers.models.mixtral"))
    found: Contestant = peers.PEERS[name]
    return found


def run_contestant(name: str, source: Path, target: Path) -> None:
    """In a process of its own: grow, make durable, print what it took."""
    contestant = prepare(name, source)
    for path in source.iterdir():
        with path.open("rb") as file:
            if name == COLD:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(2**20):
                pass
    cpu, start = time.process_time(), time.perf_counter()
    contestant(source, target)
    make_durable(target)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    # Not ru_maxrss, which a process inherits from the one that started it.
    memory = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory is not None
    print(json.dumps({"seconds": seconds, "memory": int(memory[1]) * 1024, "cpu": cpu, "bytes": bytes_of(target)}))


def make_durable(target: Path) -> None:
    for path in [*target.rglob("*"), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def run_limit(name: str, model: Path, target: Path) -> Row:
    """What the disk and the page cache do with the bytes of a grown `model`."""
    target.mkdir()
    total = bytes_of(model)
    blocks = total // 2**22
    command = ["dd", "if=/dev/zero", f"of={target / 'zeros'}", "bs=4M", f"count={blocks}", "oflag=direct", "conv=fsync"]
    if name == "cp + sync":
        command, blocks = ["cp", "-r", str(model), str(target / "copy")], 0
        subprocess.run(["cat", *map(str, model.glob("*.safetensors"))], stdout=subprocess.DEVNULL, check=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    make_durable(target)
    return {"seconds": time.perf_counter() - start, "memory": 0, "cpu": 0, "bytes": blocks * 2**22 or total}


def measure(name: str, python: str, folder: Path) -> Row:
    """One run of a contestant; only its numbers are left afterwards."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    time.sleep(REST_S)
    try:
        if name in LIMITS:
            return run_limit(name, folder / "grown", target)
        words = [python, str(HERE / "growth.py"), "--contestant", name, str(folder / "source"), str(target)]
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return {key: float(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    finally:
        shutil.rmtree(target, ignore_errors=True)


def median(rows: list[Row]) -> Row:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def ratio(goal: Goal, rows: Mapping[str, Row]) -> float | None:
    """How much better the first is; seconds count per byte, as results need not be equally large."""
    if goal.first not in rows or goal.second not in rows:
        return None
    first, second = rows[goal.first], rows[goal.second]
    if goal.what == "memory":
        return second["memory"] / first["memory"]
    return second["seconds"] / second["bytes"] * first["bytes"] / first["seconds"]


def table(rows: Mapping[str, Row]) -> list[str]:
    lines = ["| what | GB | seconds | GB/s | peak memory, MB | CPU seconds |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        speed = row["bytes"] / row["seconds"] / 1e9
        memory = [f"{row['memory'] / MEGABYTE:.0f}", f"{row['cpu']:.1f}"] if row["memory"] else ["", ""]
        cells = [name, f"{row['bytes'] / 1e9:.2f}", f"{row['seconds']:.2f}", f"{speed:.2f}", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def goals(rows: Mapping[str, Row]) -> list[str]:
    lines = ["| ours | against | in | better by | goal |", "|---|---|---|---|---|"]
    for goal in GOALS:
        value = ratio(goal, rows)
        if value is not None:
            verdict = f"{goal.factor:g}" + ("" if value >= goal.factor else ", missed")
            lines.append(f"| {goal.first} | {goal.second} | {goal.what} | {value:.2f}x | {verdict} |")
    return lines


PAGE = """# Growing checkpoints: against the disk, and against other tools

`{command}` wrote this page: {rounds}, medians, {machine}.

A Llama of {source:.2f} GB (bfloat16, random weights) is grown. Each contestant runs in its own process, in turn. The
clock starts after the imports, with the source in the page cache, and stops when all bytes are on the disk (fsync).
Memory is the largest resident set of the process, imports included.

- `replicate`: 8 equal experts for each feed-forward, `upcycling=copy`; `with noise`: `upcycling=noise`, experts that
  differ.
- `width x2`: `growth=hypercloning growth.noise=0`, every width doubled; `with noise`: with noise that cancels.
  `width x5/4`: `growth=fpi growth.new_layers=zero`, exact norms, noise.
- `dd` writes as many zeros with `oflag=direct conv=fsync`. `cp` copies the finished 8 experts out of the page cache.
- `mergekit-moe` is the command as it comes. `transformers in memory` is the usual script and `HyperCloning` a stand-in
  that goes about it as the published code does, which is on no package index: both in `benchmarks/growth_peers.py`.

{table}

Ratios of seconds are per byte of the result. Missed goals are marked.

{goals}
"""


def file_system(folder: Path) -> str:
    words = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder.absolute())]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.split()
    return lines[-1] if lines else "unknown file system"


def describe_machine(folder: Path) -> str:
    where = f"{os.cpu_count()} cores ({platform.machine()}), {file_system(folder)}"
    return f"{where}, load average {os.getloadavg()[0]:.1f} (others were at work, too, as far as it exceeds 2)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.75, help="size of the dense source (8 experts: 5 times)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="virtual environment with torch, transformers and mergekit")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants: the first column of the table")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    parser.add_argument("--contestant", nargs=3, metavar=("NAME", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    return parser.parse_args()


def contestants(arguments: argparse.Namespace) -> list[str]:
    """The names of those that are requested; SystemExit with one line for what cannot be measured."""
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds: is {arguments.rounds}; use 1 or more")
    if not 0 < arguments.gigabytes < float("inf"):
        raise SystemExit(f"--gigabytes: is {arguments.gigabytes:g}; use a size above 0, e.g. 0.75")
    known = [*LIMITS, *OURS, COLD, *(PEERS if arguments.peers else ())]
    for name in arguments.only or ():
        if name in PEERS and name not in known:
            raise SystemExit(f"--only: {name!r} needs --peers; name a virtual environment with torch and mergekit")
        if name not in known:
            raise SystemExit(f"--only: there is no {name!r}; use names out of {', '.join(map(repr, known))}")
    return [name for name in known if not arguments.only or name in arguments.only]


def compete(arguments: argparse.Namespace, names: Sequence[str], folder: Path) -> Iterator[dict[str, list[Row]]]:
    """All measurements so far, after each round; contestants take turns, so that a moody disk is so to all of them."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names:
            python = str(arguments.peers.absolute() / "bin/python") if name in PEERS else sys.executable
            rows[name].append(measure(name, python, folder))
            print(f"round {number + 1}: {name}: {rows[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        yield rows


def report(arguments: argparse.Namespace, rows: Mapping[str, list[Row]], folder: Path) -> list[str]:
    """Write what was requested; return the tables."""
    found = {name: median(of_name) for name, of_name in rows.items()}
    rounds = len(next(iter(rows.values())))
    page = PAGE.format(
        command=" ".join(["python benchmarks/growth.py", *_words(arguments)]),
        rounds=f"{rounds} round{'s' if rounds > 1 else ''}",
        machine=describe_machine(folder),
        source=bytes_of(folder / "source") / 1e9,
        table="\n".join(table(found)),
        goals="\n".join(goals(found)),
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page, encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "goals": list(map(asdict, GOALS))}, indent=2) + "\n")
    return ["", *table(found), "", *goals(found)]


def main() -> None:
    arguments = parse_arguments()
    if arguments.contestant:
        name, source, target = arguments.contestant
        run_contestant(name, Path(source), Path(target))
        return
    names = contestants(arguments)
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: whatever else is in the one that was named stays there.
        own = tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.folder.absolute())
    except OSError as error:
        raise SystemExit(f"--folder: {arguments.folder}: {error.strerror}; name a folder that can be written") from None
    with own as folder_name:
        folder = Path(folder_name)
        make_source(folder / "source", arguments.gigabytes * 1e9)
        prepare("replicate", folder / "source")(folder / "source", folder / "grown")
        for rows in compete(arguments, names, folder):
            print("\n".join(report(arguments, rows, folder)), flush=True)


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command line that matters for the numbers."""
    words = [f"--gigabytes {arguments.gigabytes:g}", f"--rounds {arguments.rounds}"]
    words += ["--peers VENV"] if arguments.peers else []
    return [*words, *(["--folder MEMORY"] if file_system(arguments.folder) == "tmpfs" else [])]


if __name__ == "__main__":
    main()
