"""What a run would do, and why, without doing it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline import checkpoint_sync, code, expectation
from aquilamoe.pipeline import fingerprint as identity
from aquilamoe.pipeline.cost import Cost, own, rates
from aquilamoe.pipeline.fingerprint import Recipe
from aquilamoe.pipeline.stage import Estimate, module
from aquilamoe.pipeline.store import METRICS, Record, Store, read_points

State = Literal["cached", "fetched", "resumes", "runs"]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage with its identity and what will become of it.

    state: `fetched` has its output on the remote, from where a run takes it. reason: why it runs (field, old, new), or
    where the output lies. seconds: expected, from records of earlier runs or the speed of the cluster; 0 for what
    is there, None if unknown. directory: of the output, now or once it is complete. record: of an output that is there.
    """

    node: Node
    recipe: Recipe
    fingerprint: str
    estimate: Estimate
    state: State
    reason: str
    seconds: float | None
    directory: Path
    record: Record | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def is_computed(self) -> bool:
        """Whether a run has to work for it: its output is not cached."""
        return self.state in ("resumes", "runs")


class TrainingSpeed(Protocol):
    """How fast training is where no record has it; the plan itself does not depend on devices."""

    def seconds(self, node: Node, work: float | None) -> float | None:
        """For a stage that trains; None where it is unknown. work: as `Estimate.work`."""
        ...


def make(
    nodes: Mapping[str, Node], store: Store, speed: TrainingSpeed, cluster: ClusterConfig | None = None
) -> list[Planned]:
    """Fingerprint every stage in order and compare with what the store holds.

    speed: of training, where the store has no record of one to learn it from. cluster: where stages train; records of
    another number of devices do not count for the speed. None: all do.
    """
    plan: dict[str, Planned] = {}
    made_by: dict[str, str] = {}
    for name, recipe in recipes(nodes).items():
        node = nodes[name]
        planned = _available(node, recipe, store) or _to_run(node, recipe, Surroundings(store, plan, speed, cluster))
        first = made_by.setdefault(planned.fingerprint, node.name)
        if first != node.name and planned.is_computed:
            # Two names for one recipe: it is computed once.
            planned = replace(planned, state="runs", reason=f"as {first}", estimate=Estimate(), seconds=0.0)
        plan[node.name] = planned
    return list(plan.values())


def estimate(node: Node) -> Estimate:
    """What is known of a stage before it runs; UserError if it cannot be done."""
    return module(node.stage.kind).estimate(node)


def recipes(nodes: Mapping[str, Node]) -> dict[str, Recipe]:
    """The recipe of every stage; nothing is looked up. `nodes` are in an order in which inputs come first."""
    found: dict[str, Recipe] = {}
    for node in nodes.values():
        inputs = {role: identity.fingerprint(found[name]) for role, name in node.stage.inputs.items()}
        config = node.stage.model_dump(mode="json")
        version = module(node.stage.kind).VERSION
        found[node.name] = identity.recipe(node.stage.kind, version, config, inputs, code.of(config))
    return found


def _available(node: Node, recipe: Recipe, store: Store) -> Planned | None:
    """A stage whose output is in the store or on its remote."""
    fingerprint = identity.fingerprint(recipe)
    state: State = "cached"
    if (found := store.find(node.name, fingerprint)) is not None:
        directory, record = found
        reason = f"in {directory.name}"
    elif store.remote and (elsewhere := store.remote.find(fingerprint)) is not None:
        name, record = elsewhere
        directory = store.directory(node.name, fingerprint)
        state, reason = "fetched", f"in {name} of {store.remote}"
    else:
        return None
    return Planned(
        node=node,
        recipe=recipe,
        fingerprint=fingerprint,
        estimate=estimate(node),
        state=state,
        reason=reason,
        seconds=0.0,
        directory=directory,
        record=record,
    )


@dataclass(frozen=True)
class Surroundings:
    """What decides of a stage without an output: the store, the stages `done` before it, how fast it trains where."""

    store: Store
    done: Mapping[str, Planned]
    speed: TrainingSpeed
    cluster: ClusterConfig | None


def _to_run(node: Node, recipe: Recipe, where: Surroundings) -> Planned:
    """A stage that a run has to work for."""
    store = where.store
    fingerprint = identity.fingerprint(recipe)
    expected = estimate(node)
    history = store.history(node.name)
    known = expectation.Experience(
        history=history,
        store=store,
        by_speed=where.speed.seconds(node, expected.work) if node.flops else None,
        devices=rates(node, where.cluster).devices if where.cluster else None,
    )
    inputs = {role: where.done[name] for role, name in node.stage.inputs.items()}
    seconds = expectation.seconds(node, expected, _sizes(inputs), known)
    resume_point = _resume_point(node, fingerprint, store)
    if store.is_complete(partial := store.partial(node.name, fingerprint)):
        resume_point, seconds = "interrupted when it was complete", 0.0
    return Planned(
        node=node,
        recipe=recipe,
        fingerprint=fingerprint,
        estimate=expected,
        state="resumes" if resume_point else "runs",
        reason=resume_point
        or ("interrupted, starts over" if partial.exists() else _why(recipe, history, node, where.done)),
        seconds=seconds,
        directory=store.directory(node.name, fingerprint),
    )


def _sizes(inputs: Mapping[str, Planned]) -> dict[str, tuple[str, int | None]]:
    """Of every input its fingerprint and its bytes, as far as they are known before it is there."""
    return {
        role: (
            each.fingerprint,
            expectation.num_bytes(each.record) if each.record is not None else each.estimate.disk_bytes or None,
        )
        for role, each in inputs.items()
    }


def _why(recipe: Recipe, history: Iterable[Record], node: Node, done: Mapping[str, Planned]) -> str:
    latest = next(iter(history), None)
    if latest is None:
        return "no output yet"
    changes = identity.differences(latest["recipe"], recipe)
    own = [change for change in changes if not change.startswith("inputs.")]
    if own:
        more = f" (and {len(own) - 3} more fields)" if len(own) > 3 else ""
        return "; ".join(own[:3]) + more
    again = [name for name in node.stage.inputs.values() if done[name].is_computed]
    return f"{', '.join(again)} runs" if again else "; ".join(changes[:3])


def _resume_point(node: Node, fingerprint: str, store: Store) -> str | None:
    """Where the stage resumes, in words; None if it starts from its beginning."""
    if not module(node.stage.kind).RESUMES:
        return None
    if (partial := store.partial(node.name, fingerprint)).exists():
        return _interrupted_at(partial, node)
    saved = checkpoint_sync.newest(store.remote, fingerprint) if node.tokens and store.remote else None
    return f"from {saved} of {store.remote}" if saved else None


def _interrupted_at(partial: Path, node: Node) -> str:
    points = read_points(partial / METRICS)
    steps = [point for point in points if "tokens" in point]
    if steps and node.tokens:
        return f"interrupted at {steps[-1]['tokens']:,} of {node.tokens:,} tokens"
    last = points[-1] if points else {}
    if last.get("done") and {"total", "unit"} <= last.keys():
        return f"interrupted at {last['done']:,} of {last['total']:,} {last['unit']}"
    return "interrupted at its start"


def estimated(planned: Planned, cluster: ClusterConfig) -> Cost:
    """Of a stage that will run, what its expected time costs; of a cached one, what it did cost."""
    if planned.record is not None:
        return own(planned.record)
    return rates(planned.node, cluster).cost(planned.seconds or 0.0, planned.node.flops)


def estimated_total(plan: Iterable[Planned], cluster: ClusterConfig) -> Cost:
    """Of stages together; two names for one recipe are computed once."""
    unique: Mapping[str, Planned] = {planned.fingerprint: planned for planned in reversed(list(plan))}
    return sum((estimated(planned, cluster) for planned in unique.values()), Cost())
