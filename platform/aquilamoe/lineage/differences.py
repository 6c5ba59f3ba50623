"""Why two outputs are different, field by field, through all that they were made from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.expected import ExpectedStage
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.pipeline.fingerprint import Recipe, differences
from aquilamoe.pipeline.store import METRICS

INDENT = "  "
RESULTS = ("params_total", "tokens", "lineage_flops", "loss_start", "loss_end", "kl")


@dataclass(frozen=True)
class Side:
    """One of two things that are compared: a recipe with the fingerprints of what it reads.

    inputs: by role, a name and a fingerprint. look_up: the side of an input, None where it is unknown.
    """

    name: str
    fingerprint: str
    recipe: Recipe
    inputs: Mapping[str, tuple[str, str]]
    look_up: Callable[[str], "Side | None"]


def made(library: ArtifactGraph, entry: Artifact) -> Side:
    """An output as a side."""
    inputs = (
        {role: (each["stage"], each["fingerprint"]) for role, each in entry.inputs.items()} if entry.is_stage else {}
    )

    def look_up(fingerprint: str) -> Side | None:
        found = library.by_fingerprint(fingerprint)
        return None if found is None else made(library, found)

    return Side(entry.stage, entry.fingerprint, entry.recipe, inputs, look_up)


def configured(stage: str, expected: Mapping[str, ExpectedStage]) -> Side:
    """A stage of the experiment, as it is configured now."""
    own = expected[stage]
    inputs = {role: (name, expected[name].fingerprint) for role, name in own.inputs.items()}
    names = {fingerprint: name for name, fingerprint in inputs.values()}

    def look_up(fingerprint: str) -> Side | None:
        return configured(names[fingerprint], expected) if fingerprint in names else None

    return Side(stage, own.fingerprint, own.recipe, inputs, look_up)


def differ(old: Side, new: Side) -> list[str]:
    """A line for each field that is not the same, those of inputs indented below the input that they belong to."""
    return list(_differ(old, new, set()))


def _differ(old: Side, new: Side, seen: set[tuple[str, str]]) -> Iterator[str]:
    before, after = _own(old), _own(new)
    yield from differences(before, after)
    for role in {**old.inputs, **new.inputs}:
        yield from _input_differs(role, old, new, seen)


def _input_differs(role: str, old: Side, new: Side, seen: set[tuple[str, str]]) -> Iterator[str]:
    if role not in old.inputs or role not in new.inputs:
        values = (" ".join(side.inputs[role]) if role in side.inputs else "(absent)" for side in (old, new))
        yield f"inputs.{role} {' -> '.join(values)}"
        return
    (old_name, before), (new_name, after) = old.inputs[role], new.inputs[role]
    if before == after:
        return
    name = f"{old_name} {before} -> {after}" if old_name == new_name else f"{old_name} {before} -> {new_name} {after}"
    if (before, after) in seen:
        yield f"inputs.{role} {name} (above)"
        return
    seen.add((before, after))
    old_input, new_input = old.look_up(before), new.look_up(after)
    if old_input is None or new_input is None:
        gone = before if old_input is None else after
        yield f"inputs.{role} {name} (there is no record of {gone}: nothing more is known)"
        return
    if old_input.recipe["kind"] != new_input.recipe["kind"]:
        yield f"inputs.{role} {name} ({old_input.recipe['kind']} -> {new_input.recipe['kind']})"
        return
    yield f"inputs.{role} {name}"
    yield from (INDENT + line for line in _differ(old_input, new_input, seen))


def _own(side: Side) -> Recipe:
    """A recipe without the fingerprints of stages; digests of files, which growths by hand note, are its own."""
    recipe = {key: value for key, value in side.recipe.items() if key != "inputs" or not side.inputs}
    recipe["code version"] = recipe.pop("version", None)
    return recipe


def circumstances(old: Artifact, new: Artifact) -> list[str]:
    """What is no part of a recipe and may matter all the same: packages and commit; then what came out."""
    notes = [{"made by": {**e.record.get("versions", {}), "commit": e.record.get("git_commit")}} for e in (old, new)]
    before, after = [{key: each.metrics[key] for key in RESULTS if key in each.metrics} for each in (old, new)]
    for key in before.keys() & after.keys():
        before[key], after[key] = _short(before[key], after[key])
    return [line.replace("made by.", "made by ") for line in differences(*notes)] + [
        f"result: {line}" for line in differences(before, after)
    ]


def _short(old: Any, new: Any) -> tuple[Any, Any]:
    """Two figures with as many digits as people read, if these distinguish them."""
    if not (isinstance(old, float) and isinstance(new, float)):
        return old, new
    rounded = float(f"{old:.5g}"), float(f"{new:.5g}")
    return rounded if rounded[0] != rounded[1] else (old, new)


def differing_files(old: Artifact, new: Artifact) -> list[str]:
    """Files that two outputs of one recipe do not share, but for the curves, which have times in them."""
    before, after = old.files, new.files
    return sorted(name for name in {**before, **after} if name != METRICS and before.get(name) != after.get(name))
