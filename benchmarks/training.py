"""Training steps against transformers, litgpt and the machine's own matrix products: tokens/s, and their ratios.

python benchmarks/training.py --peers VENV --out docs/benchmarks/training.md     about 20 minutes; --quick: 3
python benchmarks/training.py --device cuda                                      one GPU: the share of its peak
python benchmarks/training.py --profile                                          where the time of a step goes

All train the same shapes on the same random tokens, with fused AdamW, clipping and this project's setting of the
C library's allocator, in one process for each library. Contestants take turns, a few steps each, for several rounds;
medians count. Peers are optional: transformers where this runs, litgpt in a virtual environment of its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training_page import Result, page

from aquilamoe.config.network import ModelConfig
from aquilamoe.training.peak import STATED_PEAKS

HERE = Path(__file__).resolve().parent
BATCH_TOKENS, CUDA_BATCH_TOKENS = 4096, 8192  # on 80 GB, 1.8B parameters leave room for so many
TURN_S = 0.7  # of a contestant, at least
REST = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "qkv_bias": False}


def dense(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "moe_intermediate_size": 0,
    }


def sparse(shape: dict[str, Any]) -> dict[str, Any]:
    """The shape upcycled to 8 experts, 2 of them for a token."""
    return shape | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": shape["intermediate_size"]}


DENSE = {
    "0.7M": dense(4096, 64, 176, 4, 4, 2),  # the two of conf/config.yaml
    "2M": dense(4096, 128, 352, 6, 8, 2),
    "8M": dense(4096, 256, 704, 8, 8, 4),
    "30M": dense(6144, 512, 1408, 8, 8, 4),
    "42M": dense(6144, 512, 1408, 12, 8, 4),
    "1.8B": dense(32768, 2048, 5632, 36, 16, 8),
    "0.6B": dense(32768, 1024, 2816, 24, 16, 8),
}
SHAPES = DENSE | {f"{name} x8": sparse(shape) for name, shape in DENSE.items()}
# (shape, tokens of a sequence)
CPU: list[tuple[str, int]] = [
    *(("0.7M", 128), ("0.7M x8", 128), ("2M", 128), ("2M x8", 128), ("2M", 256), ("8M", 256), ("8M x8", 256)),
    *(("8M", 1024), ("30M", 128), ("30M", 256), ("30M x8", 256), ("30M", 1024), ("42M", 256)),
]
QUICK = [("0.7M", 128), ("0.7M x8", 128), ("8M", 256)]
CUDA = [("1.8B", 2048), ("0.6B x8", 2048)]
OURS = [
    "ours autocast",
    "ours autocast compiled",
    "ours bf16 master",
    "ours bf16 master compiled",
    "ours fp32",
    "ours fp32 compiled",
]
TRANSFORMERS = {
    False: [
        *("transformers sdpa fp32", "transformers sdpa autocast", "transformers eager autocast"),
        *("transformers sdpa bf16", "transformers eager bf16"),
        *(
            "transformers eager autocast compiled",
            "transformers sdpa bf16 compiled",
            "transformers eager bf16 compiled",
        ),
        *("transformers eager fp32", "transformers sdpa fp32 compiled", "transformers eager fp32 compiled"),
    ],
    True: [
        *("transformers eager autocast loop", "transformers eager autocast grouped"),
        *("transformers eager bf16 loop", "transformers eager bf16 grouped"),
        *("transformers eager autocast grouped compiled", "transformers eager bf16 grouped compiled"),
        *("transformers sdpa fp32 loop", "transformers sdpa fp32 grouped", "transformers sdpa fp32 grouped compiled"),
    ],
}
LITGPT = ["litgpt autocast", "litgpt bf16", "litgpt bf16 compiled", "litgpt fp32", "litgpt fp32 compiled"]
ON_CUDA = [*OURS[:4], "transformers sdpa bf16", "transformers sdpa bf16 compiled"]
LARGE = 100_000_000  # parameters, from which on one contestant at a time is in memory


def configuration(shape: str) -> ModelConfig:
    return ModelConfig.model_validate(SHAPES[shape] | REST)


class Library:
    """A process that has a library's contestants, and makes steps on request."""

    def __init__(self, python: str, device: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        words = [python, str(HERE / "training_contestants.py"), device, str(threads)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def request(self, do: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
        response = self.process.stdout.readline()
        if not response:
            return {"error": f"the process ended with {self.process.wait()}"}
        result: dict[str, Any] = json.loads(response)
        return result

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(
    libraries: dict[str, Library], names: Sequence[str], shape: str, length: int, options: argparse.Namespace
) -> list[Result]:
    """All contestants on one shape and length: in turns, or, where not all fit into memory, one after the other."""
    clock = {"wall": "seconds", "cpu": "cpu"}[options.clock]
    names = [name for name in names if name.split()[0] in libraries]
    config = configuration(shape)
    found = [Result(shape, length, name, options.batch_tokens, config, clock=clock) for name in names]
    groups = [found] if config.num_params < LARGE else [[each] for each in found]
    for group in groups:
        for each in group:
            _make(libraries[each.name.split()[0]], each)
        for _ in range(options.rounds):
            for each in group:
                _take_turn(libraries[each.name.split()[0]], each)
        for library in libraries.values():
            library.request("clear")
    return found


def _make(library: Library, result: Result) -> None:
    rows = max(1, result.batch_tokens // result.length)
    result.batch_tokens = rows * result.length
    response = library.request("make", name=result.name, shape=SHAPES[result.shape], rows=rows, length=result.length)
    result.error = response.get("error", "")
    if not result.error:
        result.warm_up_s, result.rounds = response["warm_up_s"], [response]


def _take_turn(library: Library, result: Result) -> None:
    """The first turn takes the place of the warm-up's last step, which determined how many steps make a turn."""
    if result.error:
        return
    count = max(1, round(TURN_S / result.rounds[-1]["seconds"]))
    response = library.request("steps", name=result.name, count=count)
    result.error = response.get("error", "")
    if "seconds" in response:
        kept = result.rounds if "memory" in result.rounds[0] else []
        result.rounds = [*kept, response]


def profiles(library: Library, chosen: Sequence[tuple[str, int]], batch_tokens: int) -> Iterator[str]:
    """Where the time of `ours autocast` goes, a column for each shape and length."""
    found: dict[str, dict[str, float]] = {}
    for shape, length in chosen:
        _make(library, Result(shape, length, OURS[0], batch_tokens, configuration(shape)))
        found[f"{shape} at {length}"] = library.request("profile", name=OURS[0])
        library.request("clear")
    yield f"| | {' | '.join(found)} |"
    yield "|---|" + "---|" * len(found)
    for region in next(iter(found.values())):
        yield f"| {region} | {' | '.join(f'{each[region]:.0%}' for each in found.values())} |"


def find_peaks(library: Library, options: argparse.Namespace, about: dict[str, Any]) -> dict[str, float]:
    """FLOP/s of products, by type. On a known GPU, the stated figure for bf16: the share of it is the MFU."""
    values = {"sizes": {"cpu": [1024, 2048], "cuda": [4096, 8192]}[options.device], "clock": options.clock}
    kinds = ("bfloat16", "float32") if about["has_bf16"] else ("float32",)
    peaks = {each: library.request("peak", dtype=each, **values)["flops_per_s"] for each in kinds}
    about["peaks"] = ", ".join(f"{peak / 1e12:.2f} TFLOP/s in {kind}" for kind, peak in peaks.items())
    if "bfloat16" not in peaks:
        about["peaks"] += "; it has no instructions for products in bfloat16, so every contestant trains in float32"
    for part, stated in STATED_PEAKS.items():
        if part in about["machine"]:
            about["peaks"] += f"; its maker states {stated / 1e12:.0f} in bfloat16, of which shares are (MFU)"
            peaks["bfloat16"] = stated
    return peaks


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="three shapes, two rounds, no litgpt")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE:TOKENS", help=f"of {', '.join(SHAPES)}; e.g. 8M:256")
    parser.add_argument(
        "--who", nargs="+", help="only contestants whose names begin so, e.g. ours 'transformers eager'"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, help=f"of a step; {BATCH_TOKENS:,}, on a GPU {CUDA_BATCH_TOKENS:,}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes, instead of a race")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu, with --threads 1: for a machine with other work"
    )
    parser.add_argument("--peers", type=Path, help="a virtual environment with litgpt and the same torch")
    parser.add_argument("--out", type=Path, help="the page to write")
    options = parser.parse_args(words)
    options.batch_tokens = options.batch_tokens or (CUDA_BATCH_TOKENS if options.device == "cuda" else BATCH_TOKENS)
    options.rounds = 2 if options.quick else options.rounds
    return options


def main(words: Sequence[str]) -> None:
    options = arguments(words)
    on_cuda = options.device == "cuda"
    chosen = CUDA if on_cuda else QUICK if options.quick else CPU
    if options.shapes:
        chosen = [(shape, int(length)) for shape, length in (each.rsplit(":", 1) for each in options.shapes)]
    if options.profile:
        library = Library(sys.executable, options.device, options.threads)
        print("\n".join(profiles(library, chosen, options.batch_tokens)))
        library.close()
        return
    pythons = {"ours": sys.executable, "transformers": sys.executable}
    if options.peers and not options.quick:
        pythons["litgpt"] = str(options.peers / "bin/python")
    selected = tuple(options.who or pythons)
    pythons = {
        name: path for name, path in pythons.items() if name == "ours" or any(w.startswith(name) for w in selected)
    }
    libraries = {name: Library(path, options.device, options.threads) for name, path in pythons.items()}
    machine = libraries["ours"].request("about")
    about: dict[str, Any] = {
        "command": "python benchmarks/training.py " + " ".join(words),
        "rounds": options.rounds,
        "batch_tokens": options.batch_tokens,
        "clock": {"wall": "seconds of the clock", "cpu": "seconds of the CPU"}[options.clock],
        "has_bf16": machine["has_bf16"],
        "machine": f"{machine['device']} ({platform.machine()}), torch {machine['torch']}",
    }
    peaks = find_peaks(libraries["ours"], options, about)
    results: list[Result] = []
    for shape, length in chosen:
        names = ON_CUDA if on_cuda else [*OURS, *TRANSFORMERS[SHAPES[shape]["num_experts"] > 0], *LITGPT]
        names = [name for name in names if name.startswith(selected) and (about["has_bf16"] or "fp32" in name)]
        start = time.perf_counter()
        results += measure(libraries, names, shape, length, options)
        print(f"{shape} at {length}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        about["load"] = os.getloadavg()[0]
        if options.out:  # the results so far, should the rest be interrupted
            options.out.write_text(page(results, peaks, about))
    for library in libraries.values():
        library.close()
    print(page(results, peaks, about), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
