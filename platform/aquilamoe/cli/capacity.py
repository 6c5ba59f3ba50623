"""The tables of a plan on what training needs of devices: steps, checkpoints, memory, and layouts that fit."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from aquilamoe import format
from aquilamoe.cli.tables import make_table
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.estimates import layouts, memory, step_time
from aquilamoe.estimates.duration import Speed
from aquilamoe.estimates.layouts import Ranking, Training
from aquilamoe.estimates.step_time import Links, StepTime
from aquilamoe.pipeline.plan import Planned

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")
SHOWN = 2  # of the fastest layouts of a stage


def show(out: Any, cluster: ClusterConfig, plan: Sequence[Planned]) -> None:
    """Print what training takes of every device, and of a GPU also how its layouts compare."""
    stages = layouts.training((planned.node for planned in plan), cluster)
    if not stages:
        return
    out.print(f"\n{speed(cluster)}\n")
    out.print(training_table(plan, stages))
    out.print()
    out.print(memory_table(stages))
    rankings = [layouts.rank(each) for each in stages if each.cluster.gpus_per_worker and each.cluster.gpu_memory_bytes]
    if not rankings:
        return
    out.print()
    out.print(layout_table(rankings))
    out.print()
    for each in rankings:
        out.print(verdict(each), soft_wrap=True)
    if any(each.now.time for each in rankings):
        out.print(ANCHORS, soft_wrap=True)


def training_table(plan: Sequence[Planned], stages: Sequence[Training]) -> Table:
    """Steps and their time, forward passes of a step, and what a checkpoint weighs."""
    table = make_table(
        "training", ">steps", ">tokens\na step", ">passes\na step", ">a step", ">tokens/s", ">checkpoint"
    )
    seconds = {planned.name: planned.seconds for planned in plan}
    for each in stages:
        steps, expected = each.stage.num_steps, seconds[each.name]
        speed = steps * each.stage.batch_tokens / expected if expected else None
        table.add_row(
            each.name,
            f"{steps:,}",
            format.count(each.stage.batch_tokens),
            str(memory.micro_batches(each.stage, each.cluster)[1]),
            format.duration(expected / steps) if expected else format.ABSENT,
            format.count(speed),
            format.size_or_absent(memory.checkpoint_bytes(each.model, each.stage)),
        )
    return table


def memory_table(stages: Sequence[Training]) -> Table:
    """Memory of one device by what it is for; the peak is less than the sum, because not all is there at once."""
    table = make_table("a device", *(f">{part}" for part in PARTS), ">peak")
    for each in stages:
        found = memory.estimate(each.model, each.stage, each.cluster)
        parts = (found.weights, found.gradients, found.optimizer, found.activations, found.loss, found.communication)
        table.add_row(
            each.name,
            *(format.size_or_absent(part) for part in parts),
            Text(format.size_or_absent(found.peak), style="bold"),
        )
    return table


def layout_table(stages: Sequence[Ranking]) -> Table:
    """Of every stage its own layout, the one to take, the fastest that fit, and the fastest of all if that does not."""
    table = make_table(
        "layout", "", ">tokens\na pass", ">peak", ">a step", ">computing", ">exchanges\nnot hidden", ">MFU", ""
    )
    for each in stages:
        best = [each.best] if each.best else []
        rows = {id(found): found for found in (each.now, *best, *each.ranked[:SHOWN], *each.beyond)}
        for number, found in enumerate(rows.values()):
            table.add_row(
                Text(each.training.name if number == 0 else "", style="bold"),
                described(found.cluster) + (" (this)" if found is each.now else ""),
                format.count(found.cluster.micro_batch_tokens),
                Text(format.size_or_absent(found.peak), style="" if found.fits else "red"),
                *_times(found.time),
                Text("fits" if found.fits else "does not fit", style="green" if found.fits else "red"),
            )
    return table


def described(cluster: ClusterConfig) -> str:
    """A layout in a few words."""
    size = f" {cluster.shard_size}" if cluster.shard_size else ""
    apart = f", experts over {cluster.expert_parallel}" if cluster.expert_parallel > 1 else ""
    return f"{cluster.parallel}{size}{apart}{', recompute' if cluster.activation_checkpointing else ''}"


def _times(time: StepTime | None) -> tuple[str, ...]:
    if time is None:
        return (format.ABSENT,) * 4
    seconds = (format.duration(part) for part in (time.seconds, time.compute, time.exposed))
    return (*seconds, f"{time.mfu:.0%}")


def verdict(each: Ranking) -> str:
    """Whether a stage's layout fits and is the fastest that does; if not, what to type, and why."""
    name = each.training.name
    now, best = each.now, each.best
    room = format.size_or_absent(now.cluster.gpu_memory_bytes)
    needs = f"{name} takes {format.size_or_absent(now.peak)} of {room} a device"
    if best is None:
        return f"Does not fit: {needs}, and no other layout on {now.cluster.workers} workers does; use more of them."
    if not best.changes:
        fastest = f", and no other is more than {layouts.ALIKE:.0%} faster" if now.time else ""
        return f"{name}: fits{fastest}."
    if not now.fits:
        return f"Does not fit: {needs}. The {'fastest' if now.time else 'nearest'} that does:\n{best.overrides(name)}"
    if now.time is None or best.time is None:
        return f"{name}: fits."
    return f"{name}: fits. {_gain(now.time, best.time)}:\n{best.overrides(name)}"


def _gain(now: StepTime, best: StepTime) -> str:
    parts = {"computing": now.compute - best.compute, "exchanges": now.exposed - best.exposed}
    changes = [
        f"{what} {format.duration(abs(gain))} {'less' if gain > 0 else 'more'}"
        for what, gain in parts.items()
        if abs(gain) > layouts.ALIKE * now.seconds
    ]
    return f"Faster, by {1 - best.seconds / now.seconds:.0%} of a step ({', '.join(changes)})"


def speed(cluster: ClusterConfig) -> str:
    """The basis of time estimates where no training has been measured."""
    speed, devices = Speed.of(cluster), cluster.workers * max(1, cluster.gpus_per_worker)
    peak = f"{f'{devices} x ' if devices > 1 else ''}{(cluster.device_flops_per_s or 0.0) / 1e12:.3g} TFLOP/s"
    if cluster.flops_per_s is not None:
        basis = f"{format.power(cluster.flops_per_s)} FLOP/s"
    elif cluster.device_flops_per_s is not None and cluster.mfu is not None:
        basis = f"{cluster.mfu:.0%} of {peak}"
    elif cluster.device_flops_per_s is not None and cluster.kernel_efficiency is not None and Links.of(cluster):
        basis = f"products at {cluster.kernel_efficiency:.0%} of {peak}{_exchanges(cluster)},"
    elif speed.cores:
        basis = f"the measured speed of {speed.cores} CPU cores"
    else:
        return "No time estimate: run a training here, or set cluster.flops_per_s."
    return f"Times assume {basis} where no training has been measured here."


def _exchanges(cluster: ClusterConfig) -> str:
    """What a prediction of a step assumes of the links between devices."""
    rates = ((cluster.intra_node_bandwidth, "within a node"), (cluster.inter_node_bandwidth, "between nodes"))
    stated = " and ".join(f"{format.size_or_absent(int(rate))}/s {where}" for rate, where in rates if rate)
    if cluster.workers == 1 or not stated:
        return ""
    return f" and exchanges at {stated}, {step_time.OVERLAP:.0%} of those of parameters beside computing"


ANCHORS = (
    "MFU published for H100 in bf16: dense models 33% to 46%, Mixtures of Experts 22% to 34%; the prediction is no "
    "measurement."
)
