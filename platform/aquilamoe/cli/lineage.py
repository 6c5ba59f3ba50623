"""What `action=lineage`, `why`, `verify` and `rebuild` do, and what they print."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.estimates.duration import StageSpeed
from aquilamoe.format import size
from aquilamoe.lineage import differences
from aquilamoe.lineage import rebuild as rebuilding
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.expected import ExpectedStage, expected_stages
from aquilamoe.lineage.graph import ArtifactGraph, read_graph
from aquilamoe.lineage.lookup import WAYS, find
from aquilamoe.lineage.tree import tree
from aquilamoe.lineage.verify import Verified, verify
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.stage import Input
from aquilamoe.pipeline.store import METRICS, Store

ACTIONS = ("lineage", "why", "verify", "rebuild")
PrintLine = Callable[[str], None]
AsJson = Callable[[ArtifactGraph, Artifact], str]
Run = Callable[[Sequence[Planned], Store], Mapping[str, Input]]


@dataclass(frozen=True, kw_only=True)
class LineageQuery:
    """An experiment and the outputs that are there.

    print_line: prints a line for the user. run: runs a plan in a store and returns every stage's
    output. as_json: an output's lineage as a document.
    """

    experiment: ExperimentConfig
    expected: Mapping[str, ExpectedStage]
    store: Store
    library: ArtifactGraph
    print_line: PrintLine
    run: Run
    as_json: AsJson

    def find(self, key: str, text: str | None, latest: bool = False) -> tuple["LineageQuery", Artifact]:
        """An output by the value of a configuration key, and the query with what lies beside that output."""
        if text is None:
            raise UserError(f"{key}: action={self.experiment.action} needs one; {WAYS}")
        try:
            fingerprints = {name: stage.fingerprint for name, stage in self.expected.items()}
            entry = find(self.library, fingerprints, text, latest)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        return replace(self, library=self.library.with_neighbours(entry)), entry


def run_query(
    experiment: ExperimentConfig,
    nodes: Mapping[str, Node],
    store: Store,
    *,
    print_line: PrintLine,
    run: Run,
    as_json: AsJson,
) -> None:
    """Do one of `ACTIONS`; UserError for queries without a result and for outputs that do not match their records."""
    query = LineageQuery(
        experiment=experiment,
        expected=expected_stages(nodes),
        store=store,
        library=read_graph(store.stages),
        print_line=print_line,
        run=run,
        as_json=as_json,
    )
    actions: dict[str, Callable[[LineageQuery], None]] = {
        "lineage": _lineage,
        "why": _why,
        "verify": _verify,
        "rebuild": _rebuild,
    }
    actions[experiment.action](query)


def _lineage(query: LineageQuery) -> None:
    query, entry = query.find("checkpoint", query.experiment.checkpoint)
    if query.experiment.as_json:
        query.print_line(query.as_json(query.library, entry))
        return
    for line in tree(query.library, entry):
        query.print_line(line)


def _why(query: LineageQuery) -> None:
    query, entry = query.find("checkpoint", query.experiment.checkpoint, latest=True)
    if query.experiment.other is not None:
        query, other = query.find("other", query.experiment.other, latest=True)
        _print_differences(query, entry, other)
    else:
        _why_not_as_configured(query, entry)


def _why_not_as_configured(query: LineageQuery, entry: Artifact) -> None:
    """An output against its stage as it is configured now; if they are the same, against the output before it."""
    name = query.experiment.name
    same = [stage for stage, expected in query.expected.items() if expected.fingerprint == entry.fingerprint]
    if same:
        query.print_line(f"{_label(entry)} is {same[0]} of experiment {name}, as it is configured now.")
        before = [other for other in query.library.of_stage(entry.stage) if _finished(other) < _finished(entry)]
        if not before:
            query.print_line(f"It is the first output of {entry.stage} in this store.")
            return
        query.print_line(f"It was made after {_label(before[0])}, because of:")
        _print_reasons(query, differences.made(query.library, before[0]), differences.made(query.library, entry))
        return
    if entry.stage not in query.expected:
        raise UserError(
            f"checkpoint: {_label(entry)} is of stage {entry.stage}, which experiment {name} does not have; "
            "choose its experiment, or compare it with other=..."
        )
    now = differences.configured(entry.stage, query.expected)
    query.print_line(
        f"{_label(entry)} is not {entry.stage} of experiment {name} as it is configured now, {now.fingerprint}:"
    )
    _print_reasons(query, differences.made(query.library, entry), now)


def _print_differences(query: LineageQuery, old: Artifact, new: Artifact) -> None:
    """Two outputs: their recipes with all that they read, and what is no part of a recipe."""
    if old.directory == new.directory:
        query.print_line(f"checkpoint and other are the same output, {_label(old)}.")
        return
    if old.recipe == new.recipe:
        query.print_line(f"{old.directory} and {new.directory} have the same recipe, {old.fingerprint}.")
        files = differences.differing_files(old, new)
        shared = len({*old.files, *new.files} - {METRICS}) - len(files)
        query.print_line(
            f"{shared} files are the same; " + (f"other bytes: {', '.join(files)}" if files else "none differs.")
        )
    else:
        query.print_line(f"{_label(old)} -> {_label(new)}:")
        for older, newer in ((old, new), (new, old)):
            if older.directory in [each.directory for each in query.library.ancestors(newer)]:
                query.print_line(f"  {_label(newer)} was made from {_label(older)}, see action=lineage")
        _print_reasons(query, differences.made(query.library, old), differences.made(query.library, new))
    for line in differences.circumstances(old, new):
        query.print_line(f"  {line}")


def _print_reasons(query: LineageQuery, old: differences.Side, new: differences.Side) -> None:
    for line in differences.differ(old, new):
        query.print_line(f"  {line}")


def _verify(query: LineageQuery) -> None:
    """Re-hash every file, of one output with its ancestors or of the whole store; UserError if anything differs."""
    if query.experiment.checkpoint is None:
        entries, damaged = list(query.library.entries.values()), dict(query.library.damaged)
    else:
        query, entry = query.find("checkpoint", query.experiment.checkpoint)
        entries, damaged = [entry, *query.library.ancestors(entry)], {}
    if not entries and not damaged:
        raise UserError(f"{query.store.stages}: there is no output to verify; run the experiment first")
    width = max((len(_label(entry)) for entry in entries), default=0)
    bad = list(damaged.values())
    for reason in damaged.values():
        query.print_line(f"damaged  {reason}")
    for entry in entries:
        verified = verify(entry, query.library)
        query.print_line(_verdict(verified, width))
        for problem in verified.problems:
            query.print_line(f"  {entry.directory / problem}")
        bad += [str(entry.directory)] if verified.problems else []
    if bad:
        raise UserError(
            f"{len(bad)} of {len(entries) + len(damaged)} outputs do not match their records; remove their "
            "directories and run again to rebuild them"
        )


def _verdict(verified: Verified, width: int) -> str:
    state = "DIFFERS" if verified.problems else "ok"
    content = f"{verified.files:>4} files {size(verified.num_bytes):>12}"
    return f"{_label(verified.entry):<{width}}  {content}  {state}"


def _rebuild(query: LineageQuery) -> None:
    """Rebuild an output beside the store and compare it with its record; UserError if other bytes come out."""
    query, entry = query.find("checkpoint", query.experiment.checkpoint)
    speed = StageSpeed(query.experiment.cluster)
    rebuild = rebuilding.prepare(
        query.experiment, entry, query.library, expected=query.expected, root=query.store.root, speed=speed
    )
    taken = ", ".join(each.stage for each in rebuild.taken) or "nothing"
    query.print_line(f"Rebuilding {_label(entry)} in {rebuild.store.root}; reusing {taken}.")
    with rebuild.store.lock():
        rebuild.forget()
        made = query.run(rebuild.plan, rebuild.store)
    again = next(
        Artifact(done.directory, done.record) for done in made.values() if _fingerprint(done) == entry.fingerprint
    )
    files = differences.differing_files(entry, again)
    if files:
        for name in files:
            query.print_line(f"  {name}: {_digest(entry, name)} -> {_digest(again, name)}")
        for line in differences.circumstances(entry, again):
            query.print_line(f"  {line}")
        raise UserError(
            f"{_label(entry)}: {len(files)} of {len(entry.files)} files differ after the rebuild; "
            f"the rebuilt files are kept in {again.directory}"
        )
    shutil.rmtree(rebuild.store.root)
    with suppress(OSError):  # another rebuild is there
        rebuild.store.root.parent.rmdir()
    compared = [name for name in entry.files if name != METRICS]
    num_bytes = sum(entry.files[name][0] for name in compared)
    query.print_line(
        f"identical: {len(compared)} files, {size(num_bytes)}; {METRICS} contains times and is not compared."
    )


def _fingerprint(done: Input) -> str:
    return str(done.record["fingerprint"])


def _digest(entry: Artifact, name: str) -> str:
    return str(entry.files[name][1])[:12] if name in entry.files else "(absent)"


def _label(entry: Artifact) -> str:
    return f"{entry.stage} {entry.fingerprint}"


def _finished(entry: Artifact) -> str:
    return str(entry.record.get("finished", ""))
