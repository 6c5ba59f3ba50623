"""Whether to grow, how, from where and with which learning rate: what recorded studies and published rules support.

A sentence is printed only with its evidence. Evidence counts for a query that is like it: sizes, growth, tokens per
parameter and budget within a factor of two of what was recorded. Otherwise the advice states that there is none.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from aquilamoe.ablation import study as studies
from aquilamoe.ablation.advice_query import AdviceQuery
from aquilamoe.ablation.conclusions import horizon, listed, shown
from aquilamoe.ablation.intervals import mean_interval
from aquilamoe.ablation.statistics import mean_curve, value_at
from aquilamoe.ablation.study import Control, Entry, Interval, Study
from aquilamoe.config.numbers import Config
from aquilamoe.format import count

LIKE = 2.0  # within this factor something is like what was recorded
Topic = Literal["whether", "how", "start", "rate"]
TITLES: Mapping[Topic, str] = {
    "whether": "Whether to grow",
    "how": "How",
    "start": "From where",
    "rate": "Learning rate after growth",
}


@dataclass(frozen=True)
class AdviceLine:
    """evidence: where it is from; empty for the statement that no evidence exists."""

    topic: Topic
    text: str
    evidence: str = ""


class Rule(Config):
    """A published finding and where it holds.

    source: parameters. growth: how many times as many. budget_of_source_tokens: the budget over the source's tokens.
    """

    topic: Topic
    kind: Literal["scale_up", "scale_out"]
    source: tuple[float, float]
    growth: tuple[float, float]
    budget_of_source_tokens: tuple[float, float] | None = None
    text: str
    citation: str


@dataclass(frozen=True)
class Recorded:
    """A study and where its file is."""

    study: Study
    where: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """A variant of a study as a precedent: what was grown, after which training, for how long."""

    recorded: Recorded
    entry: Entry
    kind: str
    source: float
    growth: float
    tokens_per_parameter: float
    tokens: float


def load(folders: Sequence[Path]) -> list[Recorded]:
    """Every study below some folders; UserError for a file that is not a study."""
    paths = [path for folder in folders for path in sorted(folder.glob(f"*/{studies.SUMMARY}"))]
    return [Recorded(studies.read(path), str(path)) for path in paths]


def rules() -> list[Rule]:
    text = resources.files("aquilamoe.ablation").joinpath("published.json").read_text("utf-8")
    return TypeAdapter(list[Rule]).validate_python(json.loads(text))


def advise(query: AdviceQuery, recorded: Sequence[Recorded], published: Sequence[Rule]) -> list[AdviceLine]:
    """Advice on each of the four topics, the recorded evidence first."""
    cases = [case for each in recorded for case in _cases(each) if case.kind == query.kind]
    like = [case for case in cases if _is_like(case, query)]
    advice: dict[Topic, list[AdviceLine]] = {
        "whether": list(_whether(query, like)),
        "how": list(_how(query, like)),
        "start": list(_start(query, cases)),
        "rate": list(_rate(like)),
    }
    found: list[AdviceLine] = []
    reasons: set[str] = set()
    for topic, own in advice.items():
        if not own:
            reason = _why(topic, query, cases, like)
            own = [AdviceLine(topic, f"No recorded evidence{', as above' if reason in reasons else f': {reason}'}.")]
            reasons.add(reason)
        found += [*own, *_published(topic, query, published)]
    return found


def _cases(recorded: Recorded) -> Iterator[Case]:
    for entry in recorded.study.variants:
        source, seed = recorded.study.source_of(entry), next(iter(entry.seeds.values()), None)
        if source is None or seed is None or entry.params_total is None:
            continue
        sparse = entry.params_active != entry.params_total
        yield Case(
            recorded=recorded,
            entry=entry,
            kind="scale_out" if sparse else "scale_up",
            source=source.params,
            growth=entry.params_total / source.params,
            tokens_per_parameter=source.tokens_per_parameter,
            tokens=seed.tokens,
        )


def _near(ours: float | None, theirs: float) -> bool:
    return ours is not None and theirs / LIKE <= ours <= theirs * LIKE


def _is_like(case: Case, query: AdviceQuery) -> bool:
    return (
        _of_size(case, query)
        and _near(query.source.tokens_per_parameter, case.tokens_per_parameter)
        and _near(query.budget, case.tokens)
    )


def _of_size(case: Case, query: AdviceQuery) -> bool:
    return _near(query.source.params, case.source) and _near(query.growth, case.growth)


def _whether(query: AdviceQuery, like: Sequence[Case]) -> Iterator[AdviceLine]:
    """Of every like study, its best variant against each control of equal FLOPs."""
    for recorded in dict.fromkeys(case.recorded.where for case in like):
        own = [case for case in like if case.recorded.where == recorded]
        best = min(own, key=lambda case: case.entry.mean if case.entry.mean is not None else float("inf"))
        for control in best.recorded.study.controls:
            known = control.control
            difference = known.differences.get(best.entry.name) if known else None
            if known is not None and difference is not None and known.equal == "flops":
                yield AdviceLine("whether", _verdict(known, difference), _evidence(best, difference, query))


def _verdict(control: Control, difference: Interval) -> str:
    other = "train the target from scratch" if control.of is None else f"continue the source ({control.of})"
    if not difference.excludes_zero:
        return f"Undecided against the choice to {other}: the recorded seeds do not separate the two at equal FLOPs."
    if difference.mean > 0:
        return f"Grow rather than {other}: it ends {difference.mean:.3f} nats/token lower at equal FLOPs."
    return f"Do not grow; {other}: it ends {-difference.mean:.3f} nats/token lower at equal FLOPs."


def _evidence(case: Case, difference: Interval, query: AdviceQuery) -> str:
    return (
        f"{case.recorded.where}: '{case.entry.name}', control less variant {shown(difference)}, {difference.pairs} "
        f"seeds, source {count(case.source)} at {case.tokens_per_parameter:.3g} tokens per parameter, "
        f"{count(case.tokens)} tokens after growth (your budget is {count(query.budget)})"
    )


def _how(query: AdviceQuery, like: Sequence[Case]) -> Iterator[AdviceLine]:
    """Of every like study that varies a way of growing, those that lead at the budget, if it is within the horizon."""
    for where in dict.fromkeys(case.recorded.where for case in like):
        own = [case for case in like if case.recorded.where == where]
        study = own[0].recorded.study
        ranked = [entry for entry in study.ranked() if any(case.entry.name == entry.name for case in own)]
        if len(ranked) < 2:
            continue
        first = [entry.name for entry in ranked if entry.rank == ranked[0].rank]
        reach = f"after {horizon(study)}"
        yield AdviceLine(
            "how",
            f"{listed([repr(name) for name in first])} {'lead' if len(first) > 1 else 'leads'} {reach}"
            f"{'; the seeds do not separate them' if len(first) > 1 else ''}.",
            f"{where}: {len(ranked)} variants, {len(study.seeds)} seeds",
        )
        shorter = _leader_at(ranked, query.budget)
        if shorter is not None and shorter not in first:
            yield AdviceLine(
                "how",
                f"At your {count(query.budget)} tokens the lowest mean loss was that of {shorter!r}: the order "
                "depends on the budget.",
                f"{where}: the curves before their cooldown",
            )


def _leader_at(entries: Sequence[Entry], tokens: float) -> str | None:
    """Who was lowest there; None beyond the curves."""
    losses = {
        entry.name: loss
        for entry in entries
        if (loss := value_at(mean_curve([seed.by_tokens() for seed in entry.seeds.values()]), tokens)) is not None
    }
    return min(losses, key=losses.__getitem__) if len(losses) > 1 else None


def _start(query: AdviceQuery, cases: Sequence[Case]) -> Iterator[AdviceLine]:
    """Whether longer training of the source has made growing better than continuing it, in one study."""
    for where in dict.fromkeys(case.recorded.where for case in cases):
        own = [case for case in cases if case.recorded.where == where and _of_size(case, query)]
        lengths = sorted({case.tokens_per_parameter for case in own})
        if len(lengths) < 2:
            continue
        known: dict[float, Interval] = {}
        for length in lengths:
            best = _best_against_continuing([case for case in own if case.tokens_per_parameter == length])
            known |= {length: best} if best is not None else {}
        better = [length for length, found in known.items() if found.excludes_zero and found.mean > 0]
        listed_pairs = ", ".join(f"{length:.3g}: {shown(found)}" for length, found in known.items())
        if better:
            text = f"From {min(better):.3g} tokens per parameter on growing beat continuing the source at equal FLOPs."
        else:
            tried = listed([f"{length:.3g}" for length in known])
            text = f"At none of {tried} tokens per parameter did growing beat continuing the source at equal FLOPs."
        if known:
            yield AdviceLine("start", text, f"{where}: control less variant by tokens per parameter, {listed_pairs}")


def _best_against_continuing(cases: Sequence[Case]) -> Interval | None:
    found = [
        difference
        for case in cases
        for control in case.recorded.study.controls
        if control.control is not None and control.control.of is not None and control.control.equal == "flops"
        if (difference := control.control.differences.get(case.entry.name)) is not None
    ]
    return max(found, key=lambda difference: difference.mean, default=None)


def _rate(like: Sequence[Case]) -> Iterator[AdviceLine]:
    """Of every like study that varies the learning rate, the best one, all else being equal, over the source's."""
    for where in dict.fromkeys(case.recorded.where for case in like):
        own = [case.entry for case in like if case.recorded.where == where and case.entry.learning_rate is not None]
        rates = sorted({entry.learning_rate or 0.0 for entry in own})
        values = {rate: _by_the_rest(own, rate) for rate in rates}
        shared = set.intersection(*(set(found) for found in values.values())) if values else set()
        if len(rates) < 2 or not shared:
            continue
        means = {rate: statistics.fmean(values[rate][key] for key in shared) for rate in rates}
        best, second = sorted(rates, key=means.__getitem__)[:2]
        gap = mean_interval([values[second][key] - values[best][key] for key in shared])
        certain = "" if gap.excludes_zero else f"; the seeds do not distinguish it from {second:g}"
        edge = "; it is at the edge of the range tried" if best in (rates[0], rates[-1]) else ""
        source = like[0].recorded.study.source_of(own[0])
        over = f", {best / source.learning_rate:.2g} of the source's peak" if source and source.learning_rate else ""
        listed_pairs = ", ".join(f"{rate:g}: {mean:.3f}" for rate, mean in means.items())
        yield AdviceLine("rate", f"{best:g}{over}{certain}{edge}.", f"{where}: mean objective by rate, {listed_pairs}")


def _by_the_rest(entries: Sequence[Entry], rate: float) -> dict[tuple[str, ...], float]:
    """The objective of entries of a rate, by all that distinguishes them and their seeds but the rate."""
    found: dict[tuple[str, ...], float] = {}
    for entry in entries:
        if entry.learning_rate == rate:
            others = [value for value in entry.axes.values() if not _names_rate(value, entries, entry)]
            found |= {(*others, str(number)): seed.value for number, seed in entry.seeds.items()}
    return found


def _names_rate(value: str, entries: Sequence[Entry], entry: Entry) -> bool:
    """Whether an axis' value is that of the learning rate: its entries share one rate that no other has."""
    with_it = {each.learning_rate for each in entries if value in each.axes.values()}
    return with_it == {entry.learning_rate}


def _published(topic: Topic, query: AdviceQuery, published: Sequence[Rule]) -> Iterator[AdviceLine]:
    for rule in published:
        if rule.topic != topic or rule.kind != query.kind:
            continue
        inside = rule.source[0] <= query.source.params <= rule.source[1]
        inside = inside and rule.growth[0] <= query.growth <= rule.growth[1]
        if inside and rule.budget_of_source_tokens is not None:
            low, high = rule.budget_of_source_tokens
            tokens = query.source.tokens
            inside = tokens is not None and low <= query.budget / tokens <= high
        if inside:
            yield AdviceLine(topic, f"Published: {rule.text}.", rule.citation)


def _why(topic: Topic, query: AdviceQuery, cases: Sequence[Case], like: Sequence[Case]) -> str:
    """What is missing for advice: the study, or its range."""
    if not cases:
        return f"no recorded study is of a {query.kind.replace('_', '-')}"
    if like:
        varied = {"rate": "the learning rate", "how": "the way of growing", "whether": "a control at equal FLOPs"}
        return f"no recorded study like this one varies or has {varied.get(topic, 'the training of the source')}"
    if query.source.tokens is None and any(_of_size(case, query) for case in cases):
        return "the number of tokens that the source was trained on is not known; set source_tokens=N"
    if topic == "start" and any(_of_size(case, query) for case in cases):
        return "no recorded study of this size varies the training of the source"
    return (
        f"your query is {count(query.source.params)} -> {count(query.target_params)} at "
        f"{_plain(query.source.tokens_per_parameter)} tokens per parameter with {count(query.budget)} tokens; "
        f"recorded are sources of {_span([case.source for case in cases], count)}, grown "
        f"{_span([case.growth for case in cases], _plain)} times, at "
        f"{_span([case.tokens_per_parameter for case in cases], _plain)} tokens per parameter, with "
        f"{_span([case.tokens for case in cases], count)} tokens after growth"
    )


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _span(values: Sequence[float], write: Callable[[float], str]) -> str:
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"
