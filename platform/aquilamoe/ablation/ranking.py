"""From the results of every seed to supported claims: ranks, differences with intervals, crossings, savings."""

from collections.abc import Mapping, Sequence

from aquilamoe.ablation import statistics
from aquilamoe.ablation.intervals import mean_interval, mean_ratio, paired_difference
from aquilamoe.ablation.statistics import mean_curve, ranking
from aquilamoe.ablation.study import Control, Crossing, Entry, Horizon, Interval, Leader, Seed

EQUAL = 0.01  # budgets are whole batches: FLOPs this close are the same
SCRATCH = "scratch_flops"  # the control that savings are of


def judge(entries: Sequence[Entry], baseline: str) -> list[Entry]:
    """Entries with all that follows from comparing them; variants first, as they were, then controls."""
    variants = [entry for entry in entries if entry.control is None]
    controls = _best(_compared([entry for entry in entries if entry.control is not None], variants))
    horizon = horizon_of(variants, baseline)
    if horizon is None:
        return [*variants, *controls]
    scratch = {name: entry for entry in controls for name in _scratch_of(entry)}
    judged = [_with_saving(entry, scratch.get(entry.name)) for entry in variants]
    judged = _ranked(judged, baseline)
    return _at_equal_flops([*judged, *controls], baseline, horizon.equal_flops)


def horizon_of(variants: Sequence[Entry], baseline: str) -> Horizon | None:
    """How far the baseline went, and what the cheapest seed of any variant has cost; None without a result of it."""
    reference = next((entry for entry in variants if entry.name == baseline), None)
    if reference is None or not reference.seeds:
        return None
    first = next(iter(reference.seeds.values()))
    return Horizon(
        tokens=first.tokens,
        flops=first.flops,
        lineage_tokens=first.lineage_tokens,
        lineage_flops=first.lineage_flops,
        equal_flops=min(seed.lineage_flops for entry in variants for seed in entry.seeds.values()),
    )


def leaders_of(variants: Sequence[Entry]) -> list[Leader]:
    """Which variant's mean loss was lowest, along the compared stage, start excluded."""
    curves = {
        entry.name: [point for point in mean_curve([seed.by_tokens() for seed in entry.seeds.values()]) if point[0] > 0]
        for entry in variants
        if entry.seeds
    }
    return [Leader(tokens=tokens, name=name) for tokens, name in statistics.leaders(curves)]


def values_of(entry: Entry) -> dict[int, float]:
    """The objective by seed."""
    return {number: seed.value for number, seed in entry.seeds.items()}


def _ranked(variants: Sequence[Entry], baseline: str) -> list[Entry]:
    """Ranks of the variants that share seeds with the baseline, and where their curves cross the baseline's."""
    reference = next(entry for entry in variants if entry.name == baseline)
    paired = {entry.name: values_of(entry) for entry in variants if entry.seeds.keys() & reference.seeds.keys()}
    found = {each.name: each for each in ranking(paired, baseline)} if paired else {}
    return [
        entry.model_copy(
            update={
                "rank": found[entry.name].rank,
                "mean": found[entry.name].mean,
                "to_baseline": found[entry.name].to_baseline,
                "crossings": _crossings(entry, reference),
            }
        )
        if entry.name in found
        else entry
        for entry in variants
    ]


def _crossings(entry: Entry, reference: Entry) -> list[Crossing]:
    if entry.name == reference.name:
        return []
    ours, theirs = ({number: seed.by_tokens() for number, seed in each.seeds.items()} for each in (entry, reference))
    return [Crossing(tokens=found.place, shown=found.is_shown) for found in statistics.shown_crossings(ours, theirs)]


def _compared(controls: Sequence[Entry], variants: Sequence[Entry]) -> list[Entry]:
    """Controls with their means, and their differences to the variants that they stand for."""
    by_name = {entry.name: values_of(entry) for entry in variants}
    found = []
    for entry in controls:
        assert entry.control is not None
        values = values_of(entry)
        differences = {
            name: paired_difference(values, by_name[name])
            for name in entry.control.stands_for
            if values.keys() & by_name[name].keys()
        }
        mean = mean_interval(list(values.values())).mean if values else None
        control = entry.control.model_copy(update={"differences": differences})
        found.append(entry.model_copy(update={"control": control, "mean": mean}))
    return found


def _best(controls: Sequence[Entry]) -> list[Entry]:
    """Of the controls that differ in their learning rates alone, the one of the lowest mean is marked as the best."""
    chosen: dict[tuple[str, ...], Entry] = {}
    for entry in controls:
        assert entry.control is not None
        key = (entry.control.kind, *entry.control.stands_for)
        if entry.mean is not None and (key not in chosen or entry.mean < (chosen[key].mean or 0.0)):
            chosen[key] = entry
    return [
        entry.model_copy(update={"control": _marked(entry.control, entry in chosen.values())})
        for entry in controls
        if entry.control is not None
    ]


def _marked(control: Control, best: bool) -> Control:
    return control.model_copy(update={"best": best})


def _scratch_of(entry: Entry) -> list[str]:
    """The variants that an entry is the fair training from scratch of."""
    control = entry.control
    return control.stands_for if control is not None and control.best and control.kind == SCRATCH else []


def _with_saving(entry: Entry, scratch: Entry | None) -> Entry:
    """An entry whose seeds have a saving where their line reaches the loss that scratch ends with, after its growth."""
    if scratch is None:
        return entry
    seeds: dict[int, Seed] = {}
    for number, seed in entry.seeds.items():
        other = scratch.seeds.get(number)
        found = statistics.saving(other.by_flops(), seed.by_flops()) if other is not None else None
        figures = {key: value for key, value in seed.figures.items() if key != "saving"}
        seeds[number] = seed.model_copy(update={"figures": figures | ({"saving": found} if found else {})})
    savings = [seed.figures["saving"] for seed in seeds.values() if "saving" in seed.figures]
    ratio = mean_ratio(savings) if savings and len(savings) == len(seeds) else None
    return entry.model_copy(update={"seeds": seeds, "saving": ratio})


def _at_equal_flops(entries: Sequence[Entry], baseline: str, flops: float) -> list[Entry]:
    """Every entry's loss where it has cost so much, ranked among variants; none for what ends, or begins, elsewhere."""
    losses = {entry.name: _losses_at(entry, flops) for entry in entries}
    reference = losses[baseline]
    variants = {entry.name: losses[entry.name] for entry in entries if entry.control is None and losses[entry.name]}
    paired = {name: found for name, found in variants.items() if found.keys() & reference.keys()}
    ranks = {each.name: each.rank for each in ranking(paired, baseline)} if reference else {}
    found = []
    for entry in entries:
        own = losses[entry.name]
        update: dict[str, float | int | Interval | None] = {
            "equal_flops": mean_interval(list(own.values())).mean if own else None,
            "equal_flops_rank": ranks.get(entry.name) if entry.control is None else None,
            "equal_flops_minus_baseline": paired_difference(own, reference) if own.keys() & reference.keys() else None,
        }
        found.append(entry.model_copy(update=update))
    return found


def _losses_at(entry: Entry, flops: float) -> Mapping[int, float]:
    found: dict[int, float] = {}
    for number, seed in entry.seeds.items():
        if abs(seed.lineage_flops / flops - 1) <= EQUAL:
            found[number] = seed.loss
        elif (loss := statistics.value_at(seed.by_flops(), flops)) is not None:
            found[number] = loss
    return found
