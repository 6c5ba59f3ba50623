"""What a study's numbers say, in sentences, each with its horizon or its interval: nothing here is known beforehand."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from aquilamoe.reports.rows import count, power
from aquilamoe.reports.study import Control, Entry, Interval, Study


@dataclass(frozen=True)
class Sentence:
    """A claim. A warning says what a reader would otherwise take from the numbers wrongly."""

    text: str
    kind: Literal["claim", "warning"] = "claim"


def findings(study: Study) -> list[Sentence]:
    """Every sentence that the numbers carry, the answer first."""
    ranked = study.ranked()
    if not ranked:
        return [Sentence("There is no result yet that could be compared."), *_missing(study)]
    return [
        *_ranks(study, ranked),
        *_controls(study, ranked),
        *_starts(ranked),
        *_recoveries(study, ranked),
        *_savings(study, ranked),
        *_structure(ranked),
        *_changes(study, ranked),
        *_equals(ranked),
        *_missing(study),
    ]


def horizon(study: Study) -> str:
    """How far the claims carry: of the baseline's line."""
    found = study.horizon
    if found is None:
        return "nothing was trained"
    stage = study.objective["stage"]
    return (
        f"{count(found.tokens)} tokens of {stage} ({power(found.flops)} FLOPs; {power(found.lineage_flops)} with "
        "all ancestors)"
    )


def signed(value: float, places: int = 3) -> str:
    """A difference; what rounds to nothing is +0."""
    return f"{round(value, places) + 0.0:+.{places}f}"


def shown(interval: Interval, places: int = 3) -> str:
    """A difference with its interval: +0.052 (+0.031 to +0.073)."""
    text = signed(interval.mean, places)
    if interval.half_width is None:
        return f"{text} (one seed, no interval)"
    low, high = interval.mean - interval.half_width, interval.mean + interval.half_width
    return f"{text} ({signed(low, places)} to {signed(high, places)})"


def measure(study: Study) -> str:
    """The unit of the objective."""
    metric = study.objective["metric"]
    return "nats/token" if metric.startswith("loss") else metric.replace("_", " ")


def called(control: Control) -> str:
    """A control in words."""
    what = "training from scratch" if control.of is None else f"continuing {control.of} without growing it"
    equal = "equal FLOPs" if control.equal == "flops" else "equal tokens"
    return f"{what} at {equal} (LR x{control.learning_rate_ratio:g})"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _quoted(entries: Sequence[Entry]) -> str:
    return listed([f"'{entry.name}'" for entry in entries])


def _ranks(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    first, *others = ranked
    where, unit = horizon(study), measure(study)
    pairs = max((entry.to_baseline.pairs for entry in ranked if entry.to_baseline), default=0)
    if not others:
        yield Sentence(f"After {where}, '{first.name}' stands at {_number(first)} {unit}; there is nothing to rank.")
        return
    if pairs < 2:
        lowest = f"after {where} '{first.name}' is lowest ({_number(first)} {unit})"
        yield Sentence(f"One seed each: {lowest}, which no interval backs.")
        return
    leading = [entry for entry in ranked if entry.rank == 1]
    if len(leading) == 1:
        text = f"After {where}, '{first.name}' is best of {len(ranked)}, at {_number(first)} {unit}"
        if first.name != study.baseline and first.to_baseline:
            text += f", {shown(first.to_baseline)} to the baseline '{study.baseline}'"
        yield Sentence(text + f" ({pairs} seeds, paired, 95 %).")
    else:
        yield Sentence(
            f"After {where}, {_quoted(leading)} share the first rank at {_number(first)} to {_number(leading[-1])} "
            f"{unit}: {pairs} seeds do not tell them apart."
        )
    last = ranked[-1]
    if last.rank != 1 and last.mean is not None and first.mean is not None:
        yield Sentence(f"From the first to the last, '{last.name}', it is {last.mean - first.mean:.3f} {unit}.")


def _number(entry: Entry) -> str:
    assert entry.mean is not None
    return f"{entry.mean:.3f}" if abs(entry.mean) < 1000 else count(entry.mean)


def _controls(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    """The best variant of every set of controls against these."""
    told: set[str] = set()
    for entry in ranked:
        own = [each for each in study.controls if each.control and entry.name in each.control.differences]
        for each in sorted(own, key=lambda each: each.name):
            if each.name not in told and each.control is not None:
                told.add(each.name)
                yield Sentence(_against(entry, each.control, study, each))


def _against(entry: Entry, control: Control, study: Study, other: Entry) -> str:
    difference = control.differences[entry.name]
    source = study.source_of(entry)
    if difference.half_width is None:
        verdict = "is, in one seed, " + ("better than" if difference.mean > 0 else "not better than")
    elif not difference.excludes_zero:
        verdict = "cannot be told from"
    else:
        verdict = "beats" if difference.mean > 0 else "does not beat"
    length = f", grown at {source.tokens_per_parameter:.3g} tokens per parameter," if source is not None else ""
    mean = f"{other.mean:.3f}" if other.mean is not None else "-"
    return (
        f"'{entry.name}'{length} {verdict} {called(control)}, which ends at {mean}: the control's loss less the "
        f"variant's is {shown(difference)}."
    )


def _starts(ranked: Sequence[Entry]) -> Iterator[Sentence]:
    """What growing lost at once, and whether that decides the end."""
    jumps = {entry.name: statistics.fmean(values) for entry in ranked if (values := entry.figure("loss_jump"))}
    if len(jumps) < 2:
        return
    order = sorted(jumps, key=jumps.__getitem__)
    least, most = order[0], order[-1]
    text = (
        f"At the moment of growth '{least}' changes the loss least ({signed(jumps[least])} nats/token) and '{most}' "
        f"most ({signed(jumps[most])})"
    )
    if len({entry.rank for entry in ranked}) < 2:
        yield Sentence(f"{text}.")
        return
    rank = next(entry.rank for entry in ranked if entry.name == least)
    decides = "which leads at the end, too" if rank == 1 else f"which ends at rank {rank} of {len(ranked)}"
    yield Sentence(f"{text}; the former is the one {decides}.")


def _recoveries(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    grown = [entry for entry in ranked if entry.figure("loss_source")]
    back = [entry for entry in grown if len(entry.figure("recovery_tokens")) == len(entry.seeds)]
    if not grown:
        return
    if not back:
        yield Sentence(f"No variant is back at its source's final loss in every seed within {horizon(study)}.")
        return
    means = {entry.name: statistics.fmean(entry.figure("recovery_tokens")) for entry in back}
    first, last = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    text = f"{len(back)} of {len(grown)} variants are back at their source's final loss in every seed"
    span = f": '{first}' first, after {count(means[first])} tokens"
    if last != first:
        span += f", '{last}' last, after {count(means[last])}"
    yield Sentence(f"{text}{span}.")


def _savings(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    scratch = [entry.control for entry in study.controls if entry.control and entry.control.kind == "scratch_flops"]
    compared = {name for control in scratch for name in control.differences}
    saved = [entry for entry in ranked if entry.saving is not None]
    if saved:
        best = max(saved, key=lambda entry: entry.saving.mean if entry.saving else 0.0)
        assert best.saving is not None
        width = best.saving.half_width
        low, high = best.saving.mean - (width or 0.0), best.saving.mean + (width or 0.0)
        inside = f" ({low:.2f} to {high:.2f})" if width is not None else ""
        yield Sentence(
            f"Most is saved by '{best.name}': training from scratch costs {best.saving.mean:.2f} times{inside} the "
            "FLOPs of its whole line to the loss that scratch ends with."
        )
    short = [entry for entry in ranked if entry.saving is None and entry.name in compared]
    if short:
        yield Sentence(
            f"{_quoted(short)} {'do' if len(short) > 1 else 'does'} not reach, in every seed, the loss that training "
            "from scratch ends with: no saving."
        )


def _structure(ranked: Sequence[Entry]) -> Iterator[Sentence]:
    for key, what in (("rank", "effective rank of the matrices"), ("similarity", "cosine similarity of experts")):
        ends = {entry.name: statistics.fmean(values) for entry in ranked if (values := entry.figure(f"{key}_end"))}
        starts = {entry.name: statistics.fmean(values) for entry in ranked if (values := entry.figure(f"{key}_grown"))}
        if len(ends) > 1 and starts.keys() == ends.keys():
            low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
            yield Sentence(
                f"The {what} ends lowest in '{low}' ({ends[low]:.3f}, {starts[low]:.3f} after growth) and highest in "
                f"'{high}' ({ends[high]:.3f}, {starts[high]:.3f})."
            )
    loads = {entry.name: statistics.fmean(values) for entry in ranked if (values := entry.figure("load_end"))}
    if loads:
        worst = max(loads, key=loads.__getitem__)
        yield Sentence(
            f"The fullest expert has at the end at most {loads[worst]:.2f} times the mean load ('{worst}'); "
            "1 is balance."
        )


def _changes(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    """Where a longer or a shorter budget would have ranked otherwise."""
    certain, noise = [], 0
    for entry in ranked:
        places = [count(round(crossing.tokens)) for crossing in entry.crossings if crossing.shown]
        noise += len(entry.crossings) - len(places)
        certain += [f"'{entry.name}' at {listed(places)} tokens"] if places else []
    if certain:
        yield Sentence(
            f"Against the baseline '{study.baseline}' the order depends on the budget. It is crossed, and the seeds "
            f"tell apart both sides, by {listed(certain)}.",
            "warning",
        )
    if noise:
        several = noise > 1
        yield Sentence(
            f"{noise} {'further crossing' if certain else 'crossing'}{'s' if several else ''} of mean curves with the "
            f"baseline's {'are' if several else 'is'} within the seeds' noise on one side or both."
        )
    yield from _leaders(study, ranked)


def _leaders(study: Study, ranked: Sequence[Entry]) -> Iterator[Sentence]:
    """Since when the lowest mean loss is one of those that lead at the end; before, it was another's."""
    first = {entry.name for entry in ranked if entry.rank == 1}
    others = [index for index, leader in enumerate(study.leaders) if leader.name not in first]
    if not others:
        return
    names = list(dict.fromkeys(study.leaders[index].name for index in others))
    last = others[-1] + 1
    since = f"until {count(study.leaders[last].tokens)} tokens" if last < len(study.leaders) else "at the end still"
    yield Sentence(
        f"The lowest mean loss is not that of a first rank {since}: it is that of {listed([f'{n!r}' for n in names])}. "
        "What is best holds at this horizon.",
        "warning",
    )


def _equals(ranked: Sequence[Entry]) -> Iterator[Sentence]:
    """Variants that gave the same numbers, seed by seed: two names for one computation."""
    groups: dict[tuple[tuple[int, float], ...], list[Entry]] = {}
    for entry in ranked:
        key = tuple(sorted((number, seed.value) for number, seed in entry.seeds.items()))
        groups.setdefault(key, []).append(entry)
    for group in groups.values():
        if len(group) > 1:
            yield Sentence(
                f"{_quoted(group)} gave the same numbers in every seed: here they are two names for one computation, "
                "not two results.",
                "warning",
            )


def _missing(study: Study) -> Iterator[Sentence]:
    failed = [entry for entry in study.variants if entry.missing]
    for entry in failed:
        reason = next(iter(entry.missing.values())).partition(";")[0]
        seeds = listed([str(seed) for seed in entry.missing])
        yield Sentence(f"'{entry.name}' has no result for seed {seeds}: {reason.rstrip('.')}.", "warning")
