"""What `action=lineage`, `why`, `verify` and `rebuild` do, and what they print."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.estimates.duration import Speed
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
Say = Callable[[str], None]
AsJson = Callable[[ArtifactGraph, Artifact], str]
Run = Callable[[Sequence[Planned], Store], Mapping[str, Input]]


@dataclass(frozen=True)
class LineageQuery:
    """An experiment and the outputs that are there.

    say: takes a line for the user. run: runs a plan in a store and returns every stage's output. as_json: an output's
    lineage as a document.
    """

    experiment: ExperimentConfig
    wanted: Mapping[str, ExpectedStage]
    store: Store
    library: ArtifactGraph
    say: Say
    run: Run
    as_json: AsJson

    def find(self, key: str, text: str | None, latest: bool = False) -> tuple["LineageQuery", Artifact]:
        """An output by the value of a configuration key, and the query with what lies beside that output."""
        if text is None:
            raise UserError(f"{key}: action={self.experiment.action} needs one; {WAYS}")
        try:
            fingerprints = {name: stage.fingerprint for name, stage in self.wanted.items()}
            entry = find(self.library, fingerprints, text, latest)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        return replace(self, library=self.library.with_neighbours(entry)), entry


def answer(
    experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store, say: Say, run: Run, as_json: AsJson
) -> None:
    """Do one of `ACTIONS`; UserError for queries without a result, and for what is not as it should be."""
    question = LineageQuery(experiment, expected_stages(nodes), store, read_graph(store.stages), say, run, as_json)
    actions: dict[str, Callable[[LineageQuery], None]] = {
        "lineage": _lineage,
        "why": _why,
        "verify": _verify,
        "rebuild": _rebuild,
    }
    actions[experiment.action](question)


def _lineage(question: LineageQuery) -> None:
    question, entry = question.find("checkpoint", question.experiment.checkpoint)
    if question.experiment.as_json:
        question.say(question.as_json(question.library, entry))
        return
    for line in tree(question.library, entry):
        question.say(line)


def _why(question: LineageQuery) -> None:
    question, entry = question.find("checkpoint", question.experiment.checkpoint, latest=True)
    if question.experiment.other is not None:
        question, other = question.find("other", question.experiment.other, latest=True)
        _say_differences(question, entry, other)
    else:
        _why_not_as_configured(question, entry)


def _why_not_as_configured(question: LineageQuery, entry: Artifact) -> None:
    """An output against its stage as it is configured now; if they are the same, against the output before it."""
    name = question.experiment.name
    same = [stage for stage, wanted in question.wanted.items() if wanted.fingerprint == entry.fingerprint]
    if same:
        question.say(f"{_label(entry)} is {same[0]} of experiment {name}, as it is configured now.")
        before = [other for other in question.library.of_stage(entry.stage) if _finished(other) < _finished(entry)]
        if not before:
            question.say(f"It is the first output of {entry.stage} in this store.")
            return
        question.say(f"It was made after {_label(before[0])}, because of:")
        _say_reasons(question, differences.made(question.library, before[0]), differences.made(question.library, entry))
        return
    if entry.stage not in question.wanted:
        raise UserError(
            f"checkpoint: {_label(entry)} is of stage {entry.stage}, which experiment {name} does not have; "
            "choose its experiment, or compare it with other=..."
        )
    now = differences.configured(entry.stage, question.wanted)
    question.say(
        f"{_label(entry)} is not {entry.stage} of experiment {name} as it is configured now, {now.fingerprint}:"
    )
    _say_reasons(question, differences.made(question.library, entry), now)


def _say_differences(question: LineageQuery, old: Artifact, new: Artifact) -> None:
    """Two outputs: their recipes with all that they read, and what is no part of a recipe."""
    if old.directory == new.directory:
        question.say(f"checkpoint and other are the same output, {_label(old)}.")
        return
    if old.recipe == new.recipe:
        question.say(f"{old.directory} and {new.directory} have the same recipe, {old.fingerprint}.")
        files = differences.differing_files(old, new)
        shared = len({*old.files, *new.files} - {METRICS}) - len(files)
        question.say(
            f"{shared} files are the same; " + (f"other bytes: {', '.join(files)}" if files else "none differs.")
        )
    else:
        question.say(f"{_label(old)} -> {_label(new)}:")
        for older, newer in ((old, new), (new, old)):
            if older.directory in [each.directory for each in question.library.ancestors(newer)]:
                question.say(f"  {_label(newer)} was made from {_label(older)}, see action=lineage")
        _say_reasons(question, differences.made(question.library, old), differences.made(question.library, new))
    for line in differences.circumstances(old, new):
        question.say(f"  {line}")


def _say_reasons(question: LineageQuery, old: differences.Side, new: differences.Side) -> None:
    for line in differences.differ(old, new):
        question.say(f"  {line}")


def _verify(question: LineageQuery) -> None:
    """Read all bytes again, of one output with its ancestors or of the whole store; UserError if anything differs."""
    if question.experiment.checkpoint is None:
        entries, damaged = list(question.library.entries.values()), dict(question.library.damaged)
    else:
        question, entry = question.find("checkpoint", question.experiment.checkpoint)
        entries, damaged = [entry, *question.library.ancestors(entry)], {}
    if not entries and not damaged:
        raise UserError(f"{question.store.stages}: there is no output to verify; run the experiment first")
    width = max((len(_label(entry)) for entry in entries), default=0)
    bad = list(damaged.values())
    for reason in damaged.values():
        question.say(f"damaged  {reason}")
    for entry in entries:
        verified = verify(entry, question.library)
        question.say(_verdict(verified, width))
        for problem in verified.problems:
            question.say(f"  {entry.directory / problem}")
        bad += [str(entry.directory)] if verified.problems else []
    if bad:
        raise UserError(
            f"{len(bad)} of {len(entries) + len(damaged)} outputs are not what their records say; remove their "
            "directories and run again to rebuild them"
        )


def _verdict(verified: Verified, width: int) -> str:
    state = "DIFFERS" if verified.problems else "ok"
    content = f"{verified.files:>4} files {size(verified.num_bytes):>12}"
    return f"{_label(verified.entry):<{width}}  {content}  {state}"


def _rebuild(question: LineageQuery) -> None:
    """Rebuild an output beside the store and compare it with its record; UserError if other bytes come out."""
    question, entry = question.find("checkpoint", question.experiment.checkpoint)
    speed = Speed.of(question.experiment.cluster)
    rebuild = rebuilding.prepare(
        question.experiment, entry, question.library, question.wanted, question.store.root, speed
    )
    taken = ", ".join(each.stage for each in rebuild.taken) or "nothing"
    question.say(f"{_label(entry)} is made anew in {rebuild.store.root}; taken from the store: {taken}.")
    with rebuild.store.lock():
        rebuild.forget()
        made = question.run(rebuild.plan, rebuild.store)
    again = next(
        Artifact(done.directory, done.record) for done in made.values() if _fingerprint(done) == entry.fingerprint
    )
    files = differences.differing_files(entry, again)
    if files:
        for name in files:
            question.say(f"  {name}: {_digest(entry, name)} -> {_digest(again, name)}")
        for line in differences.circumstances(entry, again):
            question.say(f"  {line}")
        raise UserError(
            f"{_label(entry)}: {len(files)} of {len(entry.files)} files have other bytes when they are made anew; "
            f"what was made is kept in {again.directory}"
        )
    shutil.rmtree(rebuild.store.root)
    with suppress(OSError):  # another rebuild is there
        rebuild.store.root.parent.rmdir()
    compared = [name for name in entry.files if name != METRICS]
    num_bytes = sum(entry.files[name][0] for name in compared)
    question.say(f"identical: {len(compared)} files, {size(num_bytes)}; {METRICS} has times in it and is not compared.")


def _fingerprint(done: Input) -> str:
    return str(done.record["fingerprint"])


def _digest(entry: Artifact, name: str) -> str:
    return str(entry.files[name][1])[:12] if name in entry.files else "(absent)"


def _label(entry: Artifact) -> str:
    return f"{entry.stage} {entry.fingerprint}"


def _finished(entry: Artifact) -> str:
    return str(entry.record.get("finished", ""))
