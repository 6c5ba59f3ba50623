"""Conclusions from a study's numbers, in sentences, each with its horizon or its interval."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from aquilamoe.ablation.intervals import mean_ratio, paired_difference
from aquilamoe.ablation.study import Control, Entry, Interval, Ratio, Study
from aquilamoe.format import count, power

KEPT = 5e-4  # nats/token: a change at growth that the third decimal does not show


@dataclass(frozen=True)
class Conclusion:
    """A claim. A warning corrects what a reader would otherwise conclude wrongly."""

    text: str
    kind: Literal["claim", "warning"] = "claim"


def conclusions(study: Study) -> list[Conclusion]:
    """Every sentence that the numbers support, the ranks first."""
    ranked = study.ranked()
    if not ranked:
        return [Conclusion("There is no result yet that could be compared."), *_missing(study)]
    return [
        *_ranks(study, ranked),
        *_few_seeds(ranked),
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


def times(ratio: Ratio) -> str:
    """A ratio with its interval: 1.27 (0.97 to 1.66)."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.2f} (one seed, no interval)"
    return f"{ratio.mean:.2f} ({_factor(ratio.low)} to {_factor(ratio.high)})"


def _factor(value: float) -> str:
    return f"{value:.2f}" if 0.005 <= value < 1000 else f"{value:.0e}"


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


def _ranks(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    first, *others = ranked
    where, unit = horizon(study), measure(study)
    pairs = max((entry.to_baseline.pairs for entry in ranked if entry.to_baseline), default=0)
    if not others:
        yield Conclusion(f"After {where}, '{first.name}' stands at {_number(first)} {unit}; there is nothing to rank.")
        return
    if pairs < 2:
        lowest = f"after {where} '{first.name}' is lowest ({_number(first)} {unit})"
        yield Conclusion(f"One seed each: {lowest}, without an interval.")
        return
    leading = [entry for entry in ranked if entry.rank == 1]
    apart = {entry.name for entry in others if _difference(entry, first).excludes_zero}
    close = [entry for entry in others if entry.rank != 1 and entry.name not in apart]
    if len(leading) == 1:
        place = "lowest" if close else "best"
        text = f"After {where}, '{first.name}' is {place} of {len(ranked)}, at {_number(first)} {unit}"
        if first.name != study.baseline and first.to_baseline:
            text += f", {shown(first.to_baseline)} to the baseline '{study.baseline}'"
        yield Conclusion(text + f" ({pairs} seeds, paired, 95 %).")
    else:
        yield Conclusion(
            f"After {where}, {_quoted(leading)} share the first rank at {_number(first)} to {_number(leading[-1])} "
            f"{unit}: {pairs} seeds do not separate them."
        )
    if close:
        yield Conclusion(
            f"{_quoted(close)} {'have' if len(close) > 1 else 'has'} a higher mean, but the seeds do not distinguish "
            f"{'them' if len(close) > 1 else 'it'} from '{first.name}' either."
        )
    last = ranked[-1]
    if last.rank != 1:
        yield Conclusion(f"From the first to the last, '{last.name}', it is {shown(_difference(last, first))} {unit}.")


def _few_seeds(ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    if max((entry.to_baseline.pairs for entry in ranked if entry.to_baseline), default=0) == 2:
        yield Conclusion(
            "Two seeds: intervals of two differences are 12.7 standard errors wide on each side, and the error itself "
            "is estimated from two numbers. Add seeds before drawing conclusions; with three it is 4.3.",
            "warning",
        )


def _difference(one: Entry, other: Entry, figure: str | None = None) -> Interval:
    """`one - other` of the objective, or of a figure, over the seeds that both have; no interval if none is common."""
    ones, others = (
        {number: seed.value if figure is None else seed.figures[figure] for number, seed in entry.seeds.items()}
        for entry in (one, other)
    )
    if not ones.keys() & others.keys():
        return Interval(
            mean=statistics.fmean(ones.values()) - statistics.fmean(others.values()), half_width=None, pairs=0
        )
    return paired_difference(ones, others)


def _complete(entries: Sequence[Entry], figure: str) -> list[tuple[float, Entry]]:
    """The entries all of whose seeds have a figure, with its means, least first."""
    found = [entry for entry in entries if entry.seeds and len(entry.figure(figure)) == len(entry.seeds)]
    return sorted(((statistics.fmean(entry.figure(figure)), entry) for entry in found), key=lambda each: each[0])


def _number(entry: Entry) -> str:
    assert entry.mean is not None
    return f"{entry.mean:.3f}" if abs(entry.mean) < 1000 else count(entry.mean)


def _controls(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    """The best variant of every set of controls against these."""
    compared: set[str] = set()
    for entry in ranked:
        own = [each for each in study.controls if each.control and entry.name in each.control.differences]
        for each in sorted(own, key=lambda each: each.name):
            if each.name not in compared and each.control is not None:
                compared.add(each.name)
                yield Conclusion(_against(entry, each.control, study, each))


def _against(entry: Entry, control: Control, study: Study, other: Entry) -> str:
    difference = control.differences[entry.name]
    source = study.source_of(entry)
    if difference.half_width is None:
        verdict = "is, in one seed, " + ("better than" if difference.mean > 0 else "not better than")
    elif not difference.excludes_zero:
        verdict = "cannot be distinguished from"
    else:
        verdict = "beats" if difference.mean > 0 else "does not beat"
    length = f", grown at {source.tokens_per_parameter:.3g} tokens per parameter," if source is not None else ""
    mean = f"{other.mean:.3f}" if other.mean is not None else "-"
    return (
        f"'{entry.name}'{length} {verdict} {called(control)}, which ends at {mean}: the control's loss less the "
        f"variant's is {shown(difference)}."
    )


def _starts(ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    """What growing lost at once, and whether that decides the end."""
    changes = sorted(_complete(ranked, "loss_jump"), key=lambda each: abs(each[0]))
    if len(changes) < 2:
        return
    kept = [entry for change, entry in changes if abs(change) < KEPT]
    (least, first), (most, last) = changes[0], changes[-1]
    if abs(most) < KEPT:
        yield Conclusion(f"At the moment of growth {_quoted(kept)} keep the loss.")
        return
    if kept:
        text = f"At the moment of growth {_quoted(kept)} {'keep' if len(kept) > 1 else 'keeps'} the loss"
    else:
        text = f"At the moment of growth '{first.name}' changes the loss least in the mean ({signed(least)} nats/token)"
    text += f"; '{last.name}' changes it most in the mean ({signed(most)} nats/token)"
    if not _difference(last, first, "loss_jump").excludes_zero:
        text += ", which the seeds do not distinguish from the least"
    ends = listed(list(dict.fromkeys(f"rank {entry.rank}" for entry in kept or [first])))
    has = "have" if len(kept) > 1 else "has"
    yield Conclusion(f"{text}. At the end the former {has} {ends}, the latter rank {last.rank}.")


def _recoveries(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    grown = [entry for entry in ranked if entry.figure("loss_source")]
    back = _complete(grown, "recovery_tokens")
    if not grown:
        return
    if not back:
        yield Conclusion(f"No variant is back at its source's final loss in every seed within {horizon(study)}.")
        return
    never_left = [entry for mean, entry in back if mean == 0]
    later = [(mean, entry) for mean, entry in back if mean > 0]
    text = (
        f"{len(back)} of {len(grown)} variants {'are' if len(back) > 1 else 'is'} back at "
        f"{'their' if len(back) > 1 else 'its'} source's final loss in every seed, within 0.001 nats/token"
    )
    parts = [f"{_quoted(never_left)} never left it"] if never_left else []
    if later:
        parts.append(f"'{later[0][1].name}' is there after {count(later[0][0])} tokens in the mean")
    if len(later) > 1:
        parts[-1] += f", '{later[-1][1].name}' after {count(later[-1][0])}"
        if not _difference(later[-1][1], later[0][1], "recovery_tokens").excludes_zero:
            parts[-1] += ", which the seeds do not separate"
    yield Conclusion(f"{text}: {'; '.join(parts)}.")


def _savings(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    scratch = {
        name: entry
        for entry in study.controls
        if entry.control and entry.control.kind == "scratch_flops"
        for name in entry.control.differences
    }
    had = [entry for entry in ranked if entry.name in scratch and _had_it(entry, scratch[entry.name])]
    saved = sorted(
        ((entry.saving, entry) for entry in ranked if entry.saving is not None and entry not in had),
        key=lambda each: -each[0].mean,
    )
    if saved:
        yield Conclusion(_most_saved(saved))
    if had:
        yield Conclusion(
            f"{_quoted(had)} {'have' if len(had) > 1 else 'has'}, in at least one seed, the loss that training from "
            "scratch ends with already at growth: a saving would not measure growing."
        )
    short = [entry for entry in ranked if entry.saving is None and entry.name in scratch and entry not in had]
    if short:
        yield Conclusion(
            f"{_quoted(short)} {'do' if len(short) > 1 else 'does'} not reach, in every seed, the loss that training "
            "from scratch ends with: no saving."
        )


def _had_it(entry: Entry, scratch: Entry) -> bool:
    """Whether a line was, in any seed, at scratch's final loss when its compared stage began."""
    return any(
        seed.curve[0][2] <= scratch.seeds[number].curve[-1][2]
        for number, seed in entry.seeds.items()
        if number in scratch.seeds and seed.curve and scratch.seeds[number].curve
    )


def _most_saved(saved: Sequence[tuple[Ratio, Entry]]) -> str:
    ratio, best = saved[0]
    costs = (
        f"training from scratch costs {times(ratio)} times the FLOPs of the whole line of '{best.name}' to the loss "
        "that scratch ends with"
    )
    if ratio.low is None:
        return f"In one seed, without an interval, {costs}."
    if not ratio.excludes_one:
        return f"Whether anything is saved is open: {costs}, and the interval contains 1."
    if ratio.mean < 1:
        return f"Nothing is saved: {costs}."
    equal = [entry for _, entry in saved[1:] if not _saves_less(entry, best)]
    also = f"; the seeds do not distinguish {_quoted(equal)} from it" if equal else ""
    return f"Most is saved by '{best.name}': {costs}{also}."


def _saves_less(entry: Entry, best: Entry) -> bool:
    common = entry.seeds.keys() & best.seeds.keys()
    quotients = [best.seeds[number].figures["saving"] / entry.seeds[number].figures["saving"] for number in common]
    return bool(quotients) and mean_ratio(quotients).excludes_one


def _structure(ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    for key, what in (("rank", "effective rank of the matrices"), ("similarity", "cosine similarity of experts")):
        ends = _complete(ranked, f"{key}_end")
        starts = {entry.name: mean for mean, entry in _complete(ranked, f"{key}_grown")}
        if len(ends) > 1 and starts.keys() == {entry.name for _, entry in ends}:
            (low, lowest), (high, highest) = ends[0], ends[-1]
            is_shown = _difference(highest, lowest, f"{key}_end").excludes_zero
            yield Conclusion(
                f"The mean {what} ends lowest in '{lowest.name}' ({low:.3f}, {starts[lowest.name]:.3f} after growth) "
                f"and highest in '{highest.name}' ({high:.3f}, {starts[highest.name]:.3f})"
                f"{'' if is_shown else '; the seeds do not separate them'}."
            )
    loads = {entry.name: statistics.fmean(values) for entry in ranked if (values := entry.figure("load_end"))}
    if loads:
        worst = max(loads, key=loads.__getitem__)
        yield Conclusion(
            f"The fullest expert ends, in the mean over seeds, with at most {loads[worst]:.2f} times the mean load "
            f"('{worst}'); 1 is balance."
        )


def _changes(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    """Where a longer or a shorter budget would have ranked otherwise."""
    certain, noise = [], 0
    for entry in ranked:
        places = [count(round(crossing.tokens)) for crossing in entry.crossings if crossing.shown]
        noise += len(entry.crossings) - len(places)
        certain += [f"'{entry.name}' at {listed(places)} tokens"] if places else []
    if certain:
        yield Conclusion(
            f"Against the baseline '{study.baseline}' the order depends on the budget. It is crossed, and the seeds "
            f"separate both sides, by {listed(certain)}.",
            "warning",
        )
    if noise:
        several = noise > 1
        yield Conclusion(
            f"{noise} {'further crossing' if certain else 'crossing'}{'s' if several else ''} of mean curves with the "
            f"baseline's {'are' if several else 'is'} within the seeds' noise on one side or both."
        )
    yield from _leaders(study, ranked)


def _leaders(study: Study, ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    """Since when the lowest mean loss is one of those that lead at the end; before, it was another's."""
    first = {entry.name for entry in ranked if entry.rank == 1}
    others = [index for index, leader in enumerate(study.leaders) if leader.name not in first]
    if not others:
        return
    names = list(dict.fromkeys(study.leaders[index].name for index in others))
    last = others[-1] + 1
    since = f"until {count(study.leaders[last].tokens)} tokens" if last < len(study.leaders) else "even at the end"
    yield Conclusion(
        f"The lowest mean loss is not that of a first rank {since}: it is that of {listed([f'{n!r}' for n in names])}. "
        "What is best holds at this horizon.",
        "warning",
    )


def _equals(ranked: Sequence[Entry]) -> Iterator[Conclusion]:
    """Variants that gave the same numbers, seed by seed: two names for one computation."""
    groups: dict[tuple[tuple[int, float], ...], list[Entry]] = {}
    for entry in ranked:
        key = tuple(sorted((number, seed.value) for number, seed in entry.seeds.items()))
        groups.setdefault(key, []).append(entry)
    for group in groups.values():
        if len(group) > 1:
            yield Conclusion(
                f"{_quoted(group)} gave the same numbers in every seed: here they are two names for one computation, "
                "not two results.",
                "warning",
            )


def _missing(study: Study) -> Iterator[Conclusion]:
    failed = [entry for entry in study.variants if entry.missing]
    for entry in failed:
        reason = next(iter(entry.missing.values())).partition(";")[0]
        seeds = listed([str(seed) for seed in entry.missing])
        yield Conclusion(f"'{entry.name}' has no result for seed {seeds}: {reason.rstrip('.')}.", "warning")
