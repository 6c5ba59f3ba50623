"""The page of `benchmarks/training.py`: the measurements, and each speed as a multiple of its goal."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aquilamoe.config.network import ModelConfig

PAGE = """# Training steps: against other libraries, and against the machine

`{command}` wrote this page: {rounds} rounds, medians, steps of {batch_tokens:,} tokens, {clock}, on {machine}, load
average {load:.1f} (others were at work, too, as far as it exceeds the threads).

All train the same shapes on the same random tokens: forward with the mean next-token loss, backward, clipping of
the gradient's norm, fused AdamW; Mixtures of Experts with a balance loss, except litgpt, which has none. One process
for each library; contestants take turns of a few steps. All have this project's setting of the C library's allocator
(`checkpoint/allocator.py`), without which each is slower. `x8`: 8 experts, 2 of them for a token, each as large as the
dense feed-forward.

- `autocast`: float32 weights, products in bf16. `bf16`: weights, gradients and optimizer in bf16, which trains worse;
  `bf16 master` (ours only): bf16 weights, float32 in the optimizer. `compiled`: every layer through torch.compile.
- `eager`, `sdpa`: how transformers computes attention. `loop`, `grouped`: how it computes experts.
- Peak: the fastest square matrix product of this machine, measured first: {peaks}.
  FLOPs are those of the model (`ModelConfig.flops_per_token`).
- Warm-up: three steps and making the network, compilation included.

{table}

Our best against the best mode of each. Missed goals are marked.

{goals}
"""


@dataclass
class Result:
    """What a contestant took, in seconds for a step, or why it could not be measured."""

    shape: str
    length: int
    name: str
    batch_tokens: int
    config: ModelConfig
    rounds: list[dict[str, float]] = field(default_factory=list)
    warm_up_s: float = 0.0
    error: str = ""
    clock: str = "seconds"

    @property
    def tokens_per_s(self) -> float:
        return self.batch_tokens / statistics.median(each[self.clock] for each in self.rounds)

    @property
    def flops_per_s(self) -> float:
        return self.tokens_per_s * self.config.flops_per_token(self.length)


@dataclass(frozen=True)
class Goal:
    """The best of ours has to be `factor` times as fast as the best whose name begins with `against`."""

    what: str
    against: str
    is_sparse: bool
    factor: float


GOALS = [
    Goal("transformers at its best", "transformers", False, 1.5),
    Goal("transformers, bf16 autocast as it comes", "transformers sdpa autocast", False, 2.0),
    Goal("transformers in float32", "transformers sdpa fp32", False, 3.0),
    Goal("litgpt at its best", "litgpt", False, 1.5),
    Goal("transformers at its best", "transformers", True, 2.0),
    Goal("transformers, eager in autocast", "transformers eager autocast loop", True, 4.0),
    Goal("litgpt at its best", "litgpt", True, 2.0),
]
FRACTIONS = {"42M": 0.30, "1.8B": 0.50, "0.6B x8": 0.40}  # of the peak


def best(results: Sequence[Result], prefix: str) -> Result | None:
    """The fastest contestant whose name begins so."""
    there = [each for each in results if each.name.startswith(prefix) and each.rounds and not each.error]
    return max(there, key=lambda each: each.tokens_per_s, default=None)


def ratio(results: Sequence[Result], goal: Goal) -> float | None:
    ours, peer = best(results, "ours"), best(results, goal.against)
    return ours.tokens_per_s / peer.tokens_per_s if ours and peer else None


def table(results: Sequence[Result], peaks: dict[str, float]) -> Iterator[str]:
    """One line a contestant; `of peak` is of the measured product in the precision that it computes in."""
    yield "| shape | tokens | who | tokens/s | of the best | of peak | warm-up, s |"
    yield "|---|---|---|---|---|---|---|"
    for each in results:
        if not each.rounds or each.error:
            yield f"| {each.shape} | {each.length} | {each.name} | {each.error or 'not measured'} | | | |"
            continue
        group = [other for other in results if (other.shape, other.length) == (each.shape, each.length)]
        fastest = best(group, "")
        assert fastest is not None
        share = each.flops_per_s / peaks["float32" if "fp32" in each.name else "bfloat16"]
        yield (
            f"| {each.shape} | {each.length} | {each.name} | {each.tokens_per_s:,.0f} | "
            f"{each.tokens_per_s / fastest.tokens_per_s:.2f} | {share:.0%} | {each.warm_up_s:.1f} |"
        )


def goals(results: Sequence[Result], peaks: dict[str, float]) -> Iterator[str]:
    """One line for each goal of each shape and length; what misses its goal is reported.

    Ratios to float32 are for machines that compute faster in bf16.
    """
    yield "| shape | tokens | our best | against | ratio | goal |"
    yield "|---|---|---|---|---|---|"
    for shape, length in dict.fromkeys((each.shape, each.length) for each in results):
        group = [each for each in results if (each.shape, each.length) == (shape, length)]
        ours = best(group, "ours")
        if ours is None:
            continue
        start = f"| {shape} | {length} | {ours.name.removeprefix('ours ')} |"
        for goal in GOALS:
            if goal.against.endswith("fp32") and "bfloat16" not in peaks:
                continue
            found = ratio(group, goal)
            if goal.is_sparse == ours.config.is_moe and found is not None:
                yield f"{start} {goal.what} | {found:.2f}x | {_judged(found, goal.factor)} |"
        twin = best([each for each in results if f"{each.shape} x8" == shape and each.length == length], "ours")
        if twin is not None:
            found = ours.flops_per_s / twin.flops_per_s
            yield f"{start} our dense {twin.shape}, per active FLOP | {found:.2f}x | {_judged(found, 0.8)} |"
        if shape in FRACTIONS:
            found = ours.flops_per_s / peaks.get("bfloat16", peaks["float32"])
            yield f"{start} the machine's peak | {found:.0%} | {_judged(found, FRACTIONS[shape])} |"


def _judged(value: float, goal: float) -> str:
    return f"{goal:g}" if value >= goal else f"{goal:g}, missed"


def page(results: Sequence[Result], peaks: dict[str, float], about: dict[str, Any]) -> str:
    return PAGE.format(**about, table="\n".join(table(results, peaks)), goals="\n".join(goals(results, peaks)))
