"""What the numbers of an experiment show, in words: did growing beat its control, and how far does that carry."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from aquilamoe.format import UNKNOWN, count, decimal, power, stated
from aquilamoe.pipeline.figures import Record, before, input_stages, metric
from aquilamoe.reports.curves import Series, crossing

SMALL_RUN_TOKENS = 1e9
# Differences below this (nats/token) need several paired seeds even in this project's own small studies.
RESOLVABLE = 0.02
# Budgets are whole optimizer steps, so equal FLOPs are equal only to about a step.
EQUAL_FLOPS = 0.01
VALIDATION = "nats/token, validation while training"

Outcome = Literal["beat", "lost", "level", "open"]


@dataclass(frozen=True)
class HeldOutLosses:
    """Held-out losses of one checkpoint by an evaluate stage."""

    stage: str
    nats: float | None
    lang_nats: dict[str, float]
    lang_bits: dict[str, float]  # per byte


@dataclass(frozen=True)
class Effect:
    """One measure of the grown model and of the control; lower is better in all of them."""

    measure: str
    grown: float
    control: float

    @property
    def difference(self) -> float:
        """Grown minus control, of the values as they are printed."""
        return round(self.grown, 3) - round(self.control, 3)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The one thing that the experiment was made to find out."""

    outcome: Outcome
    headline: str
    caveats: list[str]
    grown: str | None = None
    control: str | None = None
    comparisons: list[Effect] = field(default_factory=list)


def checkpoints(records: Mapping[str, Record]) -> list[HeldOutLosses]:
    """Return the checkpoints that evaluate stages measured, in the order of `records`; the last evaluation counts."""
    found: dict[str, HeldOutLosses] = {}
    for record in records.values():
        if record.get("kind") == "evaluate":
            stages = input_stages(record)
            for role in _roles(record):
                found[stages.get(role, role)] = _checkpoint(stages.get(role, role), role, record)
    order = list(records)
    return sorted(found.values(), key=lambda point: order.index(point.stage) if point.stage in order else len(order))


def _roles(record: Record) -> list[str]:
    names = (record.get("metrics") or {}).keys()
    return sorted({name.split("/")[0] for name in names if name.endswith(("nats_per_token", "bits_per_byte"))})


def _checkpoint(stage: str, role: str, record: Record) -> HeldOutLosses:
    nats: dict[str, float] = {}
    bits: dict[str, float] = {}
    for name in sorted(record["metrics"]):
        parts = name.split("/")
        value = metric(record, name)
        if len(parts) == 3 and parts[0] == role and value is not None:
            target = {"nats_per_token": nats, "bits_per_byte": bits}.get(parts[2])
            if target is not None:
                target[parts[1]] = value
    return HeldOutLosses(stage, metric(record, f"{role}/nats_per_token"), nats, bits)


def last_trained(records: Mapping[str, Record], chain: Sequence[str]) -> str | None:
    """Return the last stage of the chain that trained and has a record."""
    return next((name for name in reversed(chain) if records.get(name, {}).get("kind") == "pretrain"), None)


def find(records: Mapping[str, Record], chain: Sequence[str], control: str | None) -> Finding:
    """Compare the end of the chain with the control, by the evaluate stage, else by validation during training."""
    grown = last_trained(records, chain)
    if grown is None:
        return Finding(
            outcome="open",
            headline="Nothing of the chain has been trained yet, so there is nothing to compare.",
            caveats=[],
        )
    loss = _loss(records, grown)
    if control is None or control not in records:
        return Finding(
            outcome="open",
            headline=f"Whether growing paid is unknown: there is no control at equal FLOPs. {grown} ended at "
            f"{decimal(loss, 3)} nats/token.",
            caveats=[_one_seed(None)],
            grown=grown,
        )
    comparisons = _comparisons(records, grown, control)
    if not comparisons:
        headline = f"Whether growing paid is unknown: {grown} or {control} has no held-out loss."
        return Finding(outcome="open", headline=headline, caveats=[], grown=grown, control=control)
    ours = comparisons[0].grown
    theirs = comparisons[0].control
    difference = comparisons[0].difference
    against = f"{decimal(ours, 3)} against {decimal(theirs, 3)} nats/token"
    where, equal = _flops(records[grown], records[control])
    small = "simply continuing the small model"
    if abs(difference) < 0.0005:
        outcome: Outcome = "level"
        verdict = f"Growth and {small} ended level here: {against} {where}."
    elif difference < 0:
        outcome, verdict = "beat", f"Growth beat {small} here: {against} {where}."
    else:
        outcome, verdict = "lost", f"Growth did not beat {small} here: {against} {where}."
    return Finding(
        outcome=outcome,
        headline=verdict,
        caveats=[*equal, _one_seed(difference)],
        grown=grown,
        control=control,
        comparisons=comparisons,
    )


def _loss(records: Mapping[str, Record], stage: str) -> float | None:
    evaluated = {point.stage: point.nats for point in checkpoints(records)}.get(stage)
    return evaluated if evaluated is not None else metric(records[stage], "loss_end")


def _comparisons(records: Mapping[str, Record], grown: str, control: str) -> list[Effect]:
    """Nats per token of the mixture first; from the evaluate stage where it has both, and then by language too."""
    points = {point.stage: point for point in checkpoints(records)}
    ours, theirs = points.get(grown), points.get(control)
    a, b = metric(records[grown], "loss_end"), metric(records[control], "loss_end")
    curves = [] if a is None or b is None else [Effect(VALIDATION, a, b)]
    if ours is None or theirs is None or ours.nats is None or theirs.nats is None:
        return curves
    rows = [Effect(f"nats/token, {_held_out(records)}", ours.nats, theirs.nats), *curves]
    for lang in [lang for lang in ours.lang_nats if lang in theirs.lang_nats]:
        rows.append(Effect(f"{lang}, nats/token", ours.lang_nats[lang], theirs.lang_nats[lang]))
    for lang in [lang for lang in ours.lang_bits if lang in theirs.lang_bits]:
        rows.append(Effect(f"{lang}, bits/byte", ours.lang_bits[lang], theirs.lang_bits[lang]))
    return rows


def _held_out(records: Mapping[str, Record]) -> str:
    """What the last evaluation read."""
    recipes = [record.get("recipe") or {} for record in records.values() if record.get("kind") == "evaluate"]
    tokens = (recipes[-1].get("config") or {}).get("validation_tokens") if recipes else None
    return "all held-out text" if tokens is None else f"{count(tokens)} held-out tokens of each language"


def _flops(grown: Record, control: Record) -> tuple[str, list[str]]:
    """State at which cumulative FLOPs the two stand, and warn where they are not equal."""
    ours, theirs = metric(grown, "lineage_flops"), metric(control, "lineage_flops")
    if not ours or not theirs:
        return "", ["The cumulative FLOPs of the two are not known, so they may not be equal."]
    if abs(theirs / ours - 1) <= EQUAL_FLOPS:
        since = " since the checkpoint from elsewhere" if before(grown) else ""
        return f"at equal cumulative FLOPs{since} ({power(ours)})", []
    return (
        f"at {power(ours)} against {power(theirs)} cumulative FLOPs",
        [f"The FLOPs are not equal: the control used {theirs / ours:.2f} times those of the chain."],
    )


def _one_seed(difference: float | None) -> str:
    text = "One seed, no interval: another seed would give other numbers."
    if difference is not None and abs(difference) < RESOLVABLE:
        text += f" Differences below {RESOLVABLE} nats/token need several paired seeds to be significant."
    return text


def parts_note(records: Mapping[str, Record], finding: Finding) -> str:
    """Explain why the headline and the ends of the curves differ, where both are there."""
    validation = next((row for row in finding.comparisons[1:] if row.measure == VALIDATION), None)
    if validation is None or finding.grown is None:
        return ""
    config = (records[finding.grown].get("recipe") or {}).get("config") or {}
    tokens = config.get("validation_tokens")
    part = f"a fixed part of {count(tokens)} tokens" if isinstance(tokens, int) else "a fixed part"
    text = f"The headline is about {_held_out(records)}; validation while training, as in the curves, reads {part}"
    text += " of it." if _held_out(records) == "all held-out text" else "."
    if validation.difference * finding.comparisons[0].difference < 0:
        text += " On that part the order is reversed."
    return text


def crossing_note(line: Series, control: Series) -> str:
    """State from where on the grown line is below the control, by the validation while training."""
    flops = crossing(line, control)
    if flops is None:
        return "By the validation while training, the grown line does not end below the control."
    share = flops / line.x[-1]
    return (
        f"By the validation while training, the grown line is below the control from {power(flops)} cumulative FLOPs "
        f"on, which is {share:.0%} of its run."
    )


def verdict(finding: Finding) -> str:
    """The finding as the last line of a run."""
    if not finding.comparisons:
        return finding.headline
    difference = finding.comparisons[0].difference
    if finding.outcome == "level":
        return "growing and the control ended level"
    if finding.outcome == "beat":
        return f"growing beat the control by {-difference:.3f} nats/token"
    return f"growing did not beat the control: it ended {difference:.3f} nats/token above it"


def scale_note(records: Mapping[str, Record], chain: Sequence[str]) -> str:
    """Rate a result of this size."""
    tokens = trained_tokens(records, chain)
    if tokens is None:
        return ""
    corpus, works = _corpus(records)
    if tokens < SMALL_RUN_TOKENS:
        return f"This is a demonstration on {corpus}, not a scaling result: {count(tokens)} training tokens{works}."
    return (
        f"This is one run of {count(tokens)} training tokens on {corpus}, at one size; "
        "it does not show how the comparison changes with scale."
    )


def trained_tokens(records: Mapping[str, Record], chain: Sequence[str]) -> float | None:
    """Tokens that the chain trained on, all stages together."""
    last = last_trained(records, chain)
    if last is None:
        return None
    inherited = metric(records[last], "lineage_tokens")
    if inherited is not None:
        return inherited
    trained = [records[name] for name in chain if records.get(name, {}).get("kind") == "pretrain"]
    return sum(metric(record, "tokens") or 0.0 for record in trained)


def _corpus(records: Mapping[str, Record]) -> tuple[str, str]:
    """Describe the corpus, and name its works if they are those of the package, known by their checksums."""
    sources: dict[str, Any] = {}
    for record in records.values():
        if record.get("kind") == "corpus":
            sources |= ((record.get("recipe") or {}).get("config") or {}).get("sources") or {}
    if not sources:
        return "its corpus", ""
    manifest = resources.files("aquilamoe").joinpath("data", "embedded", "manifest.json")
    embedded = {work["parquet_sha256"]: work for work in json.loads(manifest.read_text("utf-8")).values()}
    hashes = [source.get("sha256") if isinstance(source, Mapping) else None for source in sources.values()]
    if all(value in embedded for value in hashes):
        works = "; ".join(embedded[value]["works"] for value in hashes)
        number = {1: "one public-domain work", 2: "two public-domain works"}
        return number.get(len(hashes), f"{len(hashes)} public-domain works"), f" ({works})"
    return f"its corpus ({', '.join(map(str, sources))})", ""


def story(records: Mapping[str, Record], chain: Sequence[str]) -> str:
    """Describe in one sentence what the chain did, from its records."""
    parts: list[str] = []
    for name in chain:
        record = records.get(name, {})
        params, active = metric(record, "params_total"), metric(record, "params_active")
        size = "unknown size" if params is None else f"{count(params)} parameters"
        kind = record.get("kind")
        if kind == "checkpoint":
            behind = before(record)
            tokens = stated(behind.tokens if behind else None, count)
            seen = "an unknown number of tokens" if tokens == UNKNOWN else f"{tokens} tokens"
            parts.append(f"A checkpoint from elsewhere of {size}, trained on {seen} before, was taken")
        elif kind == "pretrain":
            tokens = f"{count(metric(record, 'tokens'))} tokens"
            parts.append(f"trained on {tokens}" if parts else f"A model of {size} was trained on {tokens}")
        elif kind == "scale_up":
            parts.append(f"grown to {size}")
        elif kind == "scale_out":
            size += f" ({count(active)} active)" if active is not None and active != params else ""
            parts.append(f"upcycled to a Mixture of Experts of {size}")
    if not parts:
        return ""
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."
