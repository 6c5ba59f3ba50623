"""An output made once more from its recipe, in a scratch root, to see whether the same bytes come out."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aquilamoe.ancestors import ancestors
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ExperimentConfig, ReportConfig, Stage
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.expected import ExpectedStage
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.lineage.verify import verify
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.fingerprint import Recipe, differences
from aquilamoe.pipeline.plan import Planned, TrainingSpeed
from aquilamoe.pipeline.store import Store

FOLDER = "rebuild"
SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Rebuild:
    """What has to run to rebuild an output.

    plan: the output, last, after those of its ancestors that are not in the store as recorded (`rebuilt`).
    taken: ancestors that are used as they are. store: in the scratch root.
    """

    entry: Artifact
    plan: list[Planned]
    rebuilt: list[str]
    taken: list[Artifact]
    store: Store

    def forget(self) -> None:
        """Remove what an earlier rebuild made of this output; what one that was interrupted left is continued."""
        for directory in self.store.stages.glob(f"*-{self.entry.fingerprint}"):
            shutil.rmtree(directory)


@dataclass(frozen=True)
class _Known:
    """A recipe, and the stage that has it."""

    stage: str
    recipe: Recipe


def prepare(
    experiment: ExperimentConfig,
    entry: Artifact,
    library: ArtifactGraph,
    *,
    expected: Mapping[str, ExpectedStage],
    root: Path,
    speed: TrainingSpeed,
) -> Rebuild:
    """Plan it, and put ancestors that are whole where the plan finds them; UserError if it cannot be made by this code.

    expected: the experiment's stages, for recipes that no record has any more. root: the scratch root lies in it.
    speed: of training, for expected times.
    """
    if not entry.is_stage:
        raise UserError(
            f"{entry.directory}: is a growth by workflows/grow.py; run the command in its README.md with another "
            "target, then action=why with both as checkpoint and other"
        )
    known = _recipes(entry, library, expected)
    names = _names(known)
    store = Store(root / FOLDER / f"{entry.stage}-{entry.fingerprint}")
    taken: list[Artifact] = []
    needed = _needed(entry.fingerprint, known, library, taken)
    store.stages.mkdir(parents=True, exist_ok=True)
    for each in taken:
        _link(store.directory(names[each.fingerprint], each.fingerprint), each.directory)
    nodes = graph.build(_experiment(experiment, entry, known, names))
    plan = planning.make(nodes, store, speed)
    _check_code(entry, known, names, plan)
    plan = [planned for planned in plan if planned.fingerprint in needed]
    rebuilt = [planned.name for planned in plan if planned.state != "cached"]
    return Rebuild(entry, plan, rebuilt, taken, store)


def _recipes(entry: Artifact, library: ArtifactGraph, expected: Mapping[str, ExpectedStage]) -> dict[str, _Known]:
    """The recipes of an output and of all that it was made from, by fingerprint, inputs first."""
    configured = {each.fingerprint: _Known(name, each.recipe) for name, each in expected.items()}
    found: dict[str, _Known] = {}

    def visit(fingerprint: str, own: _Known) -> None:
        for role, source in own.recipe["inputs"].items():
            if source in found:
                continue
            other = library.by_fingerprint(source)
            known = _Known(other.stage, other.recipe) if other else configured.get(source)
            if known is None:
                raise UserError(
                    f"{entry.stage} {entry.fingerprint}: cannot be rebuilt, no record has the recipe of {source} "
                    f"({role} of {own.stage}) any more; restore its record, or choose the experiment that describes it"
                )
            visit(source, known)
        found[fingerprint] = own

    visit(entry.fingerprint, _Known(entry.stage, entry.recipe))
    return found


def _names(known: Mapping[str, _Known]) -> dict[str, str]:
    """A name for every fingerprint: its stage's, and where two have one, with the fingerprint."""
    stages = [each.stage for each in known.values()]
    return {
        fingerprint: each.stage if stages.count(each.stage) == 1 else f"{each.stage}-{fingerprint}"
        for fingerprint, each in known.items()
    }


def _needed(fingerprint: str, known: Mapping[str, _Known], library: ArtifactGraph, taken: list[Artifact]) -> set[str]:
    """What has a part in it: the output, its ancestors up to those that are in the store and whole."""
    whole: dict[str, Artifact] = {}

    def missing(output: str) -> Iterable[str]:
        there = library.by_fingerprint(output) if output != fingerprint else None
        if there is not None and not verify(there).problems:
            whole[output] = there
            return []
        return known[output].recipe["inputs"].values()

    needed = {fingerprint, *ancestors(fingerprint, missing)}
    taken += whole.values()
    return needed


def _link(link: Path, directory: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(directory.absolute(), target_is_directory=True)


def _experiment(
    experiment: ExperimentConfig, entry: Artifact, known: Mapping[str, _Known], names: Mapping[str, str]
) -> ExperimentConfig:
    """The experiment with the stages of these recipes instead of its own."""
    stages: dict[str, Any] = {
        names[fingerprint]: {
            "kind": each.recipe["kind"],
            "inputs": {role: names[source] for role, source in each.recipe["inputs"].items()},
            **each.recipe["config"],
            **_places(experiment, each),
        }
        for fingerprint, each in known.items()
    }
    try:
        parsed = TypeAdapter(dict[str, Stage]).validate_python(stages)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{_cannot(entry)}: {where}: {problem['msg']}; {_checkout(entry)}") from None
    return experiment.model_copy(update={"stages": parsed, "report": ReportConfig(chain=[], control=None)})


def _places(experiment: ExperimentConfig, known: _Known) -> dict[str, Any]:
    """Where the experiment finds files that a recipe has no place for."""
    stage = experiment.stages.get(known.stage)
    if stage is None or stage.kind != known.recipe["kind"]:
        return {}
    return {place: getattr(stage, place) for place in stage.places}


def _check_code(entry: Artifact, known: Mapping[str, _Known], names: Mapping[str, str], plan: list[Planned]) -> None:
    """UserError where this code makes another recipe of the same configuration."""
    planned = {each.name: each for each in plan}
    for fingerprint, name in names.items():
        if planned[name].fingerprint != fingerprint:
            changes = differences(known[fingerprint].recipe, planned[name].recipe)
            own = [change for change in changes if not change.startswith("inputs.")] or changes
            raise UserError(f"{_cannot(entry)}: {name}: {'; '.join(own[:SHOWN_CHANGES])}; {_checkout(entry)}")


def _cannot(entry: Artifact) -> str:
    return f"{entry.stage} {entry.fingerprint}: cannot be rebuilt by this code"


def _checkout(entry: Artifact) -> str:
    commit = str(entry.record.get("git_commit") or "").partition("+")[0]
    return f"check out {commit[:12]}, which made it" if commit else "take the version of the code that made it"
