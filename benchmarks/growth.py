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
import resource
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
    "mixture, width x2": (
        "growth/fpi",
        {"noise": 0},
        {key: times for key, times in TWICE.items() if key != "intermediate_size"}
        | {"moe_intermediate_size": Fraction(2)},
    ),
    "mixture, experts x2": (
        "upcycling/copy",
        {},
        {"num_experts": Fraction(2), "num_experts_per_tok": Fraction(2)},
    ),
}
MIXTURES = tuple(name for name in OURS if name.startswith("mixture, "))
WHOLE = ", whole command"
COMMANDS = tuple(f"{name}{WHOLE}" for name in ("replicate", "replicate with noise", "width x2", *MIXTURES))
COLD = "replicate, source not cached"
LIMITS = ("dd oflag=direct", "cp + sync")
PEERS = (
    "mergekit-moe",
    "mergekit-moe with noise",
    "transformers in memory",
    "HyperCloning",
    "HyperCloning with noise",
    f"mergekit-moe{WHOLE}",
    f"mergekit-moe with noise{WHOLE}",
    f"HyperCloning{WHOLE}",
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
    Goal("mixture, experts x2", "dd oflag=direct", "seconds", 0.95),
    Goal("mixture, width x2", "width x2", "seconds", 0.95),
    Goal(f"replicate{WHOLE}", f"mergekit-moe{WHOLE}", "seconds", 5.0),
    Goal(f"replicate with noise{WHOLE}", f"mergekit-moe with noise{WHOLE}", "seconds", 5.0),
    Goal(f"width x2{WHOLE}", f"HyperCloning{WHOLE}", "seconds", 5.0),
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
    config = ModelConfig.model_validate({**old, **_new_sizes(sizes, old)})
    if group.startswith("upcycling/"):
        scale_out = importlib.import_module("aquilamoe.growth.scale_out").scale_out
        upcycling = UpcyclingConfig.model_validate({**values, **options})
        return lambda source, target: scale_out(source, target, config, upcycling, seed=0)
    scale_up = importlib.import_module("aquilamoe.growth.scale_up").scale_up
    growth = GrowthConfig.model_validate({**values, **options})
    return lambda source, target: scale_up(source, target, config, growth, seed=0)


def _new_sizes(sizes: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, int | None]:
    new = {key: old[key] * times if isinstance(times, Fraction) else times for key, times in sizes.items()}
    return {key: size if size is None else int(size) for key, size in new.items()}


def command_words(name: str, source: Path, target: Path) -> list[str]:
    """What a user types for a growth of this project, or its like for a peer, certificate and imports included."""
    name = name.removesuffix(WHOLE)
    if name not in OURS:
        return [sys.executable, str(HERE / "growth_peers.py"), name, str(source), str(target)]
    from aquilamoe.checkpoint.hf_config import read_config

    group, options, sizes = OURS[name]
    kind, method = group.split("/")
    words = [f"source={source}", f"target={target}", f"{kind}={method}"]
    words += [f"{kind}.{key}={value}" for key, value in options.items()]
    new = _new_sizes(sizes, read_config(source).model_dump())
    words += [f"model.{key}={size}" for key, size in new.items() if size is not None]
    return [sys.executable, str(HERE.parent / "workflows/grow.py"), *words]


def make_source(directory: Path, num_bytes: float, experts: int = 0) -> None:
    """A Llama of about so many bytes with random weights, and the tokenizer of its bytes.

    experts: in each layer, a quarter as wide as the feed-forward; then it is a Mixtral.
    """
    import torch
    from tokenizers import pre_tokenizers

    from aquilamoe.checkpoint import hf_config
    from aquilamoe.checkpoint import tensor_names as names
    from aquilamoe.checkpoint.reader import CheckpointWriter
    from aquilamoe.config.network import ModelConfig

    neurons = experts * FFN // 4 if experts else FFN
    layer_bytes = 2 * (2 * HIDDEN**2 + 2 * HIDDEN**2 * KV_HEADS // HEADS + 3 * HIDDEN * neurons)
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
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        moe_intermediate_size=FFN // 4 if experts else 0,
    )
    shapes, random = names.tensor_shapes(config), torch.Generator().manual_seed(0)
    with CheckpointWriter(directory, shapes, torch.bfloat16) as out:
        for name, shape in shapes.items():
            out.write(name, [torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=random)])
    hf_config.write_config(directory, config, "bfloat16", eos_token_id=0)
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
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
    is_whole = name.endswith(WHOLE)
    words = command_words(name, source, target) if is_whole else []
    contestant = (lambda *_: _run_command(words)) if is_whole else prepare(name, source)
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
    # Not ru_maxrss, which a process inherits from the one that started it; here, that of a command is small.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    memory = int(peak[1])
    if is_whole:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        memory, cpu = used.ru_maxrss, used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": seconds, "memory": memory * 1024, "cpu": cpu, "bytes": bytes_of(target)}))


def _run_command(words: Sequence[str]) -> None:
    """A process of its own, whose imports count."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


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
        source = folder / ("mixture" if name.removesuffix(WHOLE) in MIXTURES else "source")
        words = [python, str(HERE / "growth.py"), "--contestant", name, str(source), str(target)]
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
- `mixture`: the source is a Mixtral of as many bytes, with 8 experts; `width x2`: `growth=fpi growth.noise=0`;
  `experts x2`: `upcycling=copy`, twice as many experts, and twice as many of them for a token.
- `whole command`: what a user waits for, from the start of Python to its end, with the reading of the source for its
  identity, the certificate and the model card; of peers, with their imports.
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
    known = [*LIMITS, *OURS, COLD, *COMMANDS, *(PEERS if arguments.peers else ())]
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
        if any(name.removesuffix(WHOLE) in MIXTURES for name in names):
            make_source(folder / "mixture", arguments.gigabytes * 1e9, 8)
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
