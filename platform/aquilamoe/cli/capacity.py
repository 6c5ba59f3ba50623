"""The tables of a plan on what training needs of devices: steps, checkpoints, memory, and layouts that fit."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from aquilamoe import format
from aquilamoe.cli.tables import make_table
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.estimates import layouts, memory
from aquilamoe.estimates.duration import Speed
from aquilamoe.estimates.layouts import Choice, Training
from aquilamoe.pipeline.plan import Planned

PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers")


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


def layout_table(choices: Sequence[Choice], now: Choice) -> Table:
    """The peak of every stage, however the model is divided; what does not fit is marked."""
    table = make_table("a device", *(f">{name}" for name in now.peaks), "")
    for each in choices:
        size = f" {each.cluster.shard_size}" if each.cluster.shard_size else ""
        is_now = each.cluster == now.cluster
        peaks = [
            Text(format.size_or_absent(peak), style="" if peak <= each.room else "red") for peak in each.peaks.values()
        ]
        verdict = Text("fits" if each.fits else "does not fit", style="green" if each.fits else "red")
        table.add_row(f"{each.cluster.parallel}{size}{' (this)' if is_now else ''}", *peaks, verdict)
    return table


def verdict(now: Choice, nearest: Choice | None) -> str:
    """Whether the layout fits, and what to type where it does not."""
    room = format.size_or_absent(now.cluster.gpu_memory_bytes)
    if now.fits:
        return f"Fits: of {room} a device, at most {layouts.RESERVE:.0%} may be used."
    worst = max(now.peaks, key=lambda name: now.peaks[name])
    needs = f"{worst} takes {format.size_or_absent(now.peaks[worst])} of {room} a device"
    if nearest is None:
        return f"Does not fit: {needs}, and no other layout on {now.cluster.workers} workers does; use more of them."
    return f"Does not fit: {needs}. The nearest that does:\n{nearest.overrides}"


def speed(cluster: ClusterConfig) -> str:
    """The basis of time estimates where no training has been measured."""
    speed, devices = Speed.of(cluster), cluster.workers * max(1, cluster.gpus_per_worker)
    if cluster.flops_per_s is not None:
        basis = f"{format.power(cluster.flops_per_s)} FLOP/s"
    elif cluster.device_flops_per_s is not None and cluster.mfu is not None:
        peak = f"{cluster.device_flops_per_s / 1e12:.3g} TFLOP/s"
        basis = f"{cluster.mfu:.0%} of {f'{devices} x ' if devices > 1 else ''}{peak}"
    elif speed.cores:
        basis = f"the measured speed of {speed.cores} CPU cores"
    else:
        return "No time estimate: run a training here, or set cluster.flops_per_s."
    return f"Times assume {basis} where no training has been measured here."
