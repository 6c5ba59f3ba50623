import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, CorpusStage, ExportStage, TokenizerStage
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.attempts import Attempts
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.remote import Remote
from aquilamoe.pipeline.stage import Context, Estimate, Input, Metrics
from aquilamoe.pipeline.store import Record, Store
from waiting import until

CLUSTER = ClusterConfig(
    executor="process",
    address=None,
    workers=1,
    cpus_per_worker=1,
    gpus_per_worker=0,
    gpu_memory_bytes=0,
    max_failures=0,
    micro_batch_tokens=1,
    checkpoint_every_tokens=1,
    compile=False,
    flops_per_s=1.0,
)
# A chain of three: the kinds stand for three modules with which the pipeline could be filled.
NODES = {
    "text": Node(
        name="text",
        stage=CorpusStage.model_validate(
            {
                "kind": "corpus",
                "inputs": {},
                "sources": {"en": {"path": "x", "sha256": None}},
                "validation_fraction": 0.1,
            }
        ),
    ),
    "words": Node(name="words", stage=TokenizerStage(kind="tokenizer", inputs={"corpus": "text"}, vocab_size=300)),
    "out": Node(name="out", stage=ExportStage(kind="export", inputs={"source": "words"}, dtype="float32")),
}


@dataclass
class FakeStage:
    """A stage module that writes `result.txt`, and whatever `during` does."""

    during: Callable[[Context], None] = lambda _: None
    RESUMES: bool = False
    VERSION: int = 1
    runs: int = 0

    def estimate(self, _: Node) -> Estimate:
        return Estimate()

    def run(self, context: Context) -> Metrics:
        self.runs += 1
        self.during(context)
        (context.out / "result.txt").write_text(f"made by {context.node.name}")
        return {"size": 1}


@dataclass
class Recorder:
    """An observer that remembers its events."""

    events: list[tuple[str, str, Any]] = field(default_factory=list)

    def stage_started(
        self, stage: str, fingerprint: str, directory: Path, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> None:
        about = {"fingerprint": fingerprint, "directory": directory, "recipe": recipe, "inputs": inputs}
        self.events.append(("started", stage, about))

    def stage_progress(self, stage: str, points: list[dict[str, Any]]) -> None:
        self.events.append(("progress", stage, points))

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        self.events.append(("finished", stage, {"directory": directory, "record": record, "cached": cached}))

    def stage_failed(self, stage: str, message: str) -> None:
        self.events.append(("failed", stage, message))

    def of(self, event: str) -> list[tuple[str, Any]]:
        return [(stage, about) for name, stage, about in self.events if name == event]


class Pipeline:
    """A store, three fake stages by name, and an observer."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = Store(root)
        self.stages = {name: FakeStage() for name in NODES}
        self.observer = Recorder()
        by_kind = {node.stage.kind: self.stages[name] for name, node in NODES.items()}
        monkeypatch.setattr(planning, "module", by_kind.__getitem__)
        monkeypatch.setattr(runner, "module", by_kind.__getitem__)
        monkeypatch.setattr(runner, "POLL_S", 0.005)

    def plan(self, nodes: Mapping[str, Node] = NODES) -> list[Planned]:
        return planning.make(nodes, self.store, Speed(1.0))

    def run(self, nodes: Mapping[str, Node] = NODES) -> dict[str, Input]:
        return runner.run(self.plan(nodes), self.store, CLUSTER, [self.observer])

    def fail(self, error: type[BaseException] = RuntimeError) -> None:
        with pytest.raises(error):
            self.run()


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return Pipeline(tmp_path, monkeypatch)


def raising(error: BaseException) -> Callable[[Context], None]:
    def during(context: Context) -> None:
        (context.out / "half.txt").write_text("half")
        raise error

    return during


def test_what_another_store_has_copied_to_their_remote_is_fetched_and_not_computed(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    remote = Remote(str(tmp_path / "shared"))
    pipeline.store = Store(tmp_path / "one", remote)
    made = pipeline.run()
    pipeline.store = Store(tmp_path / "other", remote)
    fetched = pipeline.run()
    assert {name: stage.runs for name, stage in pipeline.stages.items()} == dict.fromkeys(NODES, 1)
    for name in NODES:
        assert fetched[name].directory == tmp_path / "other" / "stages" / made[name].directory.name
        assert fetched[name].record == made[name].record
        assert (fetched[name].directory / "result.txt").read_text() == f"made by {name}"
    assert [about["cached"] for _, about in pipeline.observer.of("finished")] == [False] * 3 + [True] * 3


def test_stages_run_in_order_and_observers_hear_start_and_end_of_each(pipeline: Pipeline) -> None:
    pipeline.run()
    assert [(event, stage) for event, stage, _ in pipeline.observer.events] == [
        (event, stage) for stage in NODES for event in ("started", "finished")
    ]


def test_a_stage_reads_the_finished_outputs_that_its_inputs_name(pipeline: Pipeline) -> None:
    seen: list[str] = []
    pipeline.stages["words"].during = lambda context: seen.append(
        (context.inputs["corpus"].directory / "result.txt").read_text()
    )
    done = pipeline.run()
    assert seen == ["made by text"]
    assert (done["out"].directory / "result.txt").read_text() == "made by out"


def test_a_stage_grows_in_its_partial_directory_and_is_renamed_when_it_is_complete(pipeline: Pipeline) -> None:
    outs: list[Path] = []
    pipeline.stages["text"].during = lambda context: outs.append(context.out)
    done = pipeline.run()
    assert outs == [done["text"].directory.with_name(f"{done['text'].directory.name}.partial")]
    assert not outs[0].exists()


def test_observers_hear_where_a_stage_grows_from_which_recipe_and_inputs(pipeline: Pipeline) -> None:
    done = pipeline.run()
    (words,) = (about for stage, about in pipeline.observer.of("started") if stage == "words")
    record = done["words"].record
    assert words == {
        "fingerprint": record["fingerprint"],
        "directory": done["words"].directory.with_name(f"{done['words'].directory.name}.partial"),
        "recipe": record["recipe"],
        "inputs": record["inputs"],
    }


def test_a_record_states_what_was_done_with_what_when_and_by_which_code(pipeline: Pipeline) -> None:
    done = pipeline.run()
    record = json.loads((done["words"].directory / "record.json").read_text())
    planned = {planned.name: planned for planned in pipeline.plan()}["words"]
    assert record["stage"] == "words"
    assert record["kind"] == "tokenizer"
    assert record["fingerprint"] == planned.fingerprint
    assert record["recipe"] == planned.recipe
    text = done["text"]
    (source,) = record["inputs"].values()
    assert (source["stage"], source["fingerprint"]) == ("text", text.record["fingerprint"])
    assert source["directory"] == text.directory.name
    files = f"{hashlib.sha256(b'made by text').hexdigest()}  result.txt\n"
    assert source["sha256"] == hashlib.sha256(files.encode()).hexdigest()
    assert record["metrics"] == {"size": 1}
    assert set(record["files"]) == {"result.txt"}
    assert {"python", "torch", "aquilamoe"} <= set(record["versions"])
    assert record["started"] <= record["finished"]
    assert 0 <= record["seconds"] < 60
    assert record["resumed"] is False
    assert record["git_commit"] is None or len(record["git_commit"].removesuffix("+changes")) == 40


def test_a_second_run_computes_nothing_and_observers_hear_that_all_is_cached(pipeline: Pipeline) -> None:
    first = pipeline.run()
    pipeline.observer.events.clear()
    assert pipeline.run() == first
    assert [stage.runs for stage in pipeline.stages.values()] == [1, 1, 1]
    assert [(event, stage, about["cached"]) for event, stage, about in pipeline.observer.events] == [
        ("finished", stage, True) for stage in NODES
    ]


def test_two_stages_with_one_recipe_are_computed_once(pipeline: Pipeline) -> None:
    done = pipeline.run({**NODES, "again": Node(name="again", stage=NODES["out"].stage)})
    assert pipeline.stages["out"].runs == 1
    assert done["again"].directory == done["out"].directory
    assert [stage for stage, about in pipeline.observer.of("finished") if about["cached"]] == ["again"]


def test_a_failure_is_reported_and_raised_and_the_later_stages_do_not_start(pipeline: Pipeline) -> None:
    pipeline.stages["words"].during = raising(UserError("stages.words: no words; write some"))
    pipeline.fail(UserError)
    assert pipeline.observer.of("failed") == [("words", "stages.words: no words; write some")]
    assert [stage for stage, _ in pipeline.observer.of("started")] == ["text", "words"]


def test_what_a_failed_stage_left_is_kept_and_what_was_finished_before_is_cached(pipeline: Pipeline) -> None:
    pipeline.stages["words"].during = raising(RuntimeError("broken"))
    pipeline.fail()
    (partial,) = pipeline.store.stages.glob("*.partial")
    assert (partial / "half.txt").read_text() == "half"
    assert [planned.state for planned in pipeline.plan()] == ["cached", "runs", "runs"]


def test_an_interruption_by_the_user_is_reported_and_passed_on(pipeline: Pipeline) -> None:
    pipeline.stages["words"].during = raising(KeyboardInterrupt())
    pipeline.fail(KeyboardInterrupt)
    assert pipeline.observer.of("failed") == [("words", "KeyboardInterrupt")]
    assert len(list(pipeline.store.stages.glob("*.partial"))) == 1


def complete(context: Context) -> None:
    (context.out / "half.txt").rename(context.out / "whole.txt")


def test_a_stage_that_resumes_finds_what_the_interrupted_run_left_and_its_record_states_so(pipeline: Pipeline) -> None:
    stage = pipeline.stages["words"]
    stage.RESUMES, stage.during = True, raising(RuntimeError("broken"))
    pipeline.fail()
    stage.during = complete
    done = pipeline.run()
    assert (done["words"].directory / "whole.txt").read_text() == "half"
    assert done["words"].record["resumed"] is True


def test_a_stage_that_does_not_resume_starts_in_an_empty_directory(pipeline: Pipeline) -> None:
    stage = pipeline.stages["words"]
    stage.during = raising(RuntimeError("broken"))
    pipeline.fail()
    found: list[Path] = []
    stage.during = lambda context: found.extend(context.out.iterdir())
    done = pipeline.run()
    assert found == []
    assert set(done["words"].record["files"]) == {"result.txt"}
    assert done["words"].record["resumed"] is False


def test_a_stage_killed_after_its_record_was_written_is_published_without_running_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(Path, "rename", killed)
        pipeline.fail(KeyboardInterrupt)
    done = pipeline.run()
    assert pipeline.stages["text"].runs == 1
    assert (done["text"].directory / "result.txt").exists()
    assert [stage for stage, about in pipeline.observer.of("finished") if about["cached"]] == []


def test_an_output_damaged_between_plan_and_run_is_refused(pipeline: Pipeline) -> None:
    done = pipeline.run()
    plan = pipeline.plan()
    (done["text"].directory / "result.txt").unlink()
    with pytest.raises(UserError, match=r"result.txt: is missing"):
        runner.run(plan, pipeline.store, CLUSTER, [])


def test_points_reach_observers_while_the_stage_runs_and_all_before_its_end(pipeline: Pipeline) -> None:
    def during(context: Context) -> None:
        context.progress(1, 2, "tensors")
        until(lambda: pipeline.observer.of("progress") != [])
        context.progress(2, 2, "tensors")

    pipeline.stages["text"].during = during
    pipeline.run()
    heard = [point for stage, points in pipeline.observer.of("progress") for point in points]
    assert heard == [{"done": done, "total": 2, "unit": "tensors"} for done in (1, 2)]
    events = [event for event, stage, _ in pipeline.observer.events if stage == "text"]
    assert events == ["started", "progress", "progress", "finished"]


def test_each_step_is_reported_once_though_a_resumed_worker_replaces_the_file_and_repeats_steps(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[runner._Follower] = []
    new_points = runner._Follower.new_points

    def counting(follower: runner._Follower) -> list[runner.Point]:
        read.append(follower)
        return new_points(follower)

    monkeypatch.setattr(runner._Follower, "new_points", counting)

    def reported() -> list[int]:
        return [point["step"] for _, points in pipeline.observer.of("progress") for point in points]

    def during(context: Context) -> None:
        write(context.metrics_file, range(6))
        until(lambda: reported() == list(range(6)))
        replacement = context.metrics_file.with_suffix(".tmp")
        write(replacement, range(4))
        replacement.replace(context.metrics_file)
        before = len(read)
        until(lambda: len(read) > before + 1)  # one that began after the replacement
        write(context.metrics_file, range(4, 9))

    pipeline.stages["text"].during = during
    pipeline.run()
    assert reported() == list(range(9))


def test_a_half_written_point_is_reported_when_it_is_whole(pipeline: Pipeline) -> None:
    def during(context: Context) -> None:
        with context.metrics_file.open("a") as file:
            file.write('{"step": 1}\n{"st')
            file.flush()
            until(lambda: pipeline.observer.of("progress") != [])
            file.write('ep": 2}\n')

    pipeline.stages["text"].during = during
    pipeline.run()
    assert pipeline.observer.of("progress") == [("text", [{"step": 1}]), ("text", [{"step": 2}])]


def test_a_resumed_stage_reports_again_what_its_file_already_holds(pipeline: Pipeline) -> None:
    stage = pipeline.stages["text"]
    stage.RESUMES = True

    def during(context: Context) -> None:
        write(context.metrics_file, range(3))
        raise RuntimeError("broken")

    stage.during = during
    pipeline.fail()
    pipeline.observer.events.clear()
    stage.during = lambda context: write(context.metrics_file, range(3, 5))
    pipeline.run()
    assert [point["step"] for _, points in pipeline.observer.of("progress") for point in points] == list(range(5))


def write(path: Path, steps: range) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def test_a_record_carries_what_its_stage_cost_with_what_failed_before_and_with_its_ancestors(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = pipeline.stages["words"]

    def alive_for_a_while(context: Context) -> None:
        attempts = Attempts(context.root, context.out.stem)
        until(lambda: (attempts.last_alive() or 0.0) > attempts.read()[-1].started + 0.3)

    stage.during = alive_for_a_while
    original = stage.run
    monkeypatch.setattr(stage, "run", raising_after(original))
    pipeline.fail()
    monkeypatch.setattr(stage, "run", original)
    done = pipeline.run()
    cost = {name: output.record["cost"] for name, output in done.items()}
    assert {name: each["attempts"] for name, each in cost.items()} == {"text": 1, "words": 2, "out": 1}
    own = {name: each["own"]["device_seconds"] for name, each in cost.items()}
    assert own["words"] > done["words"].record["seconds"] + 0.25
    assert cost["out"]["lineage"]["device_seconds"] == pytest.approx(sum(own.values()))
    assert not (pipeline.store.root / "attempts").exists()


def raising_after(run: Callable[[Context], Metrics]) -> Callable[[Context], Metrics]:
    def ran(context: Context) -> Metrics:
        run(context)
        raise RuntimeError("broken")

    return ran
