"""How long a stage is expected to take: from the time of a similar one, scaled by the work."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aquilamoe.config.graph import Node
from aquilamoe.pipeline.stage import Estimate
from aquilamoe.pipeline.store import Record, Store

# A run is no measure of one with more than so many times the work: its time was the start of Python and packages.
FAR = 30.0
Inputs = Mapping[str, tuple[str, int | None]]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What is known of the speed of stages.

    history: records of the stage in question, newest first. store: has those of all stages. by_speed: seconds of a
    training by the speed of the cluster, where no record has one; None where that is unknown. devices: how many train;
    records of another number do not count, None: all do.
    """

    history: Sequence[Record]
    store: Store
    by_speed: float | None
    devices: int | None


def seconds(node: Node, estimate: Estimate, inputs: Inputs, known: Experience) -> float | None:
    """By this stage's last run, scaled; of a training without one, by the one most like it here, or by the speed.

    inputs: by role, fingerprint and bytes. None where unknown.
    """
    whole = [record for record in known.history if not record.get("resumed")]
    if node.flops:
        return _of_training(node, estimate, whole, known)
    scaled = _scaled(whole[0], estimate, inputs, known.store) if whole else None
    return estimate.seconds if scaled is None else scaled


def num_bytes(record: Record) -> int:
    """Of the files of an output."""
    return sum(entry["bytes"] for entry in record["files"].values())


def _scaled(record: Record, estimate: Estimate, inputs: Inputs, store: Store) -> float | None:
    """What a run took, times how much more there is to do: by its work, and by the bytes of inputs that it reads."""
    ratio = 1.0
    if estimate.work is not None:
        if not record.get("work"):
            return None
        ratio = estimate.work / record["work"]
    elif not estimate.grows_with:
        return None
    for roles in estimate.grows_with:
        more = _growth(record, {role: inputs[role] for role in roles}, store)
        if more is None:
            return None
        ratio *= more
    if estimate.seconds is None and ratio > FAR:
        return None
    return float(record["seconds"]) * ratio


def _growth(record: Record, inputs: Inputs, store: Store) -> float | None:
    """How many times the bytes these inputs have that they had; None where the one or the other is not known."""
    before = {role: record["recipe"]["inputs"].get(role) for role in inputs}
    if before == {role: fingerprint for role, (fingerprint, _) in inputs.items()}:
        return 1.0
    sizes = {str(each["fingerprint"]): num_bytes(each) for each in store.history()}
    old = [sizes.get(str(fingerprint)) for fingerprint in before.values()]
    new = [size for _, size in inputs.values()]
    if not all(old) or not all(new):
        return None
    return sum(filter(None, new)) / sum(filter(None, old))


def _of_training(node: Node, estimate: Estimate, whole: list[Record], known: Experience) -> float | None:
    comparable = [record for record in whole if _on(record, known.devices)][:1]
    if not comparable:
        same_kind = [record for record in known.store.history() if record["kind"] == node.stage.kind]
        others = [record for record in same_kind if not record.get("resumed") and _on(record, known.devices)]
        comparable = _most_alike(node, others) or others
    records = [record for record in comparable if record["metrics"].get("flops")]
    if not records:
        return known.by_speed
    took = sum(record["seconds"] for record in records)
    if estimate.work and all(record.get("work") for record in records):
        return float(took * estimate.work / sum(record["work"] for record in records))
    return float(took * node.flops / sum(record["metrics"]["flops"] for record in records))


def _most_alike(node: Node, records: Iterable[Record]) -> list[Record]:
    """The training of a model with experts as this one, or without as this one, that is nearest in FLOPs a token.

    Experts make another speed of the same device, and so do sizes: small products leave it idle.
    """
    assert node.model is not None
    per_token, found = node.flops / node.tokens, []
    for record in records:
        known = record["metrics"]
        if not known.get("flops") or not known.get("tokens"):
            continue
        if (known.get("params_total") != known.get("params_active")) == node.model.is_moe:
            found.append((abs(math.log(known["flops"] / known["tokens"] / per_token)), record))
    return [min(found, key=lambda pair: pair[0])[1]] if found else []


def _on(record: Record, devices: int | None) -> bool:
    """Whether a stage ran on so many devices; a record without a ledger may have."""
    return devices is None or (record.get("cost") or {}).get("devices", devices) == devices
