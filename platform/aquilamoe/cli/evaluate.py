"""What `action=generate` and `action=evaluate` do with a checkpoint."""

import json
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import local
from aquilamoe.config.points import note
from aquilamoe.config.schema import EvaluateStage, ExperimentConfig
from aquilamoe.files import write_atomically
from aquilamoe.lineage.artifacts import read_artifact
from aquilamoe.lineage.expected import expected_stages
from aquilamoe.lineage.graph import read_graph
from aquilamoe.lineage.lookup import WAYS, find
from aquilamoe.lineage.verify import check_unchanged
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.store import RECORD, Store

if TYPE_CHECKING:
    from aquilamoe.evaluation.generation import Generator

ACTIONS = ("generate", "evaluate")
FOLDER, MODEL = "evaluations", "model"
KEPT = ("results", "configs", "versions", "n-samples", "higher_is_better")
EXTRA = "pip install 'aquilamoe[evaluation]', in a checkout pip install -c constraints.txt -e '.[evaluation]'"
PrintLine = Callable[[str], None]
Rows = list[tuple[str, str, float, int]]


def generate(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store, print_line: PrintLine) -> None:
    """Continue `prompt` with a checkpoint, or each prompt of the evaluation's samples."""
    from aquilamoe.evaluation.samples import manner

    label, directory = checkpoint(experiment, nodes, store)
    prompts = [experiment.prompt] if experiment.prompt is not None else _prompts(experiment)
    if not prompts:
        raise UserError("prompt: action=generate needs one; the experiment's evaluate stage has none either")
    writer, settings = _open(directory), experiment.generation
    print_line(f"{label}, {manner(settings)}, {settings.max_new_tokens} tokens at most")
    for prompt, text in zip(prompts, writer.continue_texts(prompts, settings), strict=True):
        print_line(f"\n{prompt}│{text}")


def evaluate(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> tuple[str, Rows, Path]:
    """Evaluate a checkpoint on tasks through lm-eval.

    Returns the results, (task, metric, value, items) for each figure, and the file with all of lm-eval's results.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"tasks: action=evaluate runs them through lm-eval, which is not installed; {EXTRA}")
    label, directory = checkpoint(experiment, nodes, store)
    folders, names = _tasks(experiment, nodes, store)
    from aquilamoe.evaluation import harness

    results = harness.evaluate(_open(directory), folders, experiment.tasks or names, store.root / FOLDER / "cache")
    path = store.root / FOLDER / f"{label}.json"
    _keep(path, directory, results)
    return label, _rows(results), path


def _keep(path: Path, directory: Path, results: Mapping[str, Any]) -> None:
    """Add the results to the checkpoint's earlier results; the same task again is replaced."""
    before = _read(path)
    kept = {key: {**before.get(key, {}), **results.get(key, {})} for key in KEPT}
    values = {"checkpoint": str(directory), **_plain(kept)}
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False, default=str, allow_nan=False))


def _plain(value: Any) -> Any:
    """A task's results as JSON has them: what it could not measure (NaN, or infinite) is null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Saved results; none of a damaged file, with a note."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(before, dict) and all(isinstance(before.get(key, {}), dict) for key in KEPT):
            return before
        raise ValueError("it does not hold results")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        note(f"{path}: cannot be read ({' '.join(str(error).split())}); it is replaced")
        return {}


def checkpoint(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> tuple[str, Path]:
    """A name for a checkpoint, and its Hugging Face directory: any on the disk, or an output that `find` finds."""
    text = experiment.checkpoint
    if text is None:
        raise UserError(f"checkpoint: action={experiment.action} needs one; {WAYS}")
    path = local(text)
    reader = f"action={experiment.action}"
    if text not in nodes and (path / "config.json").is_file():
        integrity.check_checkpoint(path, reader)
        if (path / RECORD).is_file():
            check_unchanged(read_artifact(path), reader)
        return path.resolve().name, path
    fingerprints = {name: expected.fingerprint for name, expected in expected_stages(nodes).items()}
    try:
        entry = find(read_graph(store.stages), fingerprints, text, latest=True)
    except UserError as error:
        raise UserError(f"checkpoint: {error}") from None
    directory = entry.directory / MODEL if entry.is_stage else entry.directory
    check_unchanged(entry, reader)
    if not (directory / "config.json").is_file():
        raise UserError(f"checkpoint: {entry.directory.name} is a {entry.kind} stage and has no checkpoint; {WAYS}")
    return entry.directory.name, directory


def _open(directory: Path) -> "Generator":
    from aquilamoe.evaluation.generation import Generator

    return Generator.open(directory)


def _prompts(experiment: ExperimentConfig) -> list[str]:
    stages = [stage for stage in experiment.stages.values() if isinstance(stage, EvaluateStage)]
    return [prompt for stage in stages for each in stage.prompts.values() for prompt in each]


def _tasks(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> tuple[list[Path], list[str]]:
    """Folders with tasks, and the names of those that are made of the corpus - if it has been prepared."""
    folders, names = [], []
    if experiment.evaluation.folder is not None:
        folder = local(experiment.evaluation.folder)
        if not folder.is_dir():
            raise UserError(f"evaluation.folder: {folder} is not a directory; set it to one with lm-eval's YAML files")
        folders.append(folder.absolute())
    expected = expected_stages(nodes)
    for name, node in nodes.items():
        if node.stage.kind == "corpus" and (found := store.find(name, expected[name].fingerprint)):
            from aquilamoe.evaluation.cloze import write_tasks

            integrity.check(*found, f"action={experiment.action}")
            own = store.root / FOLDER / "tasks" / f"{expected[name].fingerprint}-{experiment.evaluation.items}"
            names += write_tasks(found[0], own, experiment.evaluation.items)
            folders.append(own)
    if not folders:
        raise UserError(
            "tasks: the corpus has no output from which to make them; run it first, or set evaluation.folder"
        )
    if not (experiment.tasks or names):
        raise UserError("tasks: name some of evaluation.folder; the corpus has no output from which to make others")
    return folders, names


def _rows(results: Mapping[str, Any]) -> Rows:
    """Every figure of every task; names like `acc,none` are lm-eval's for a metric and a filter."""
    found: Rows = []
    for task, figures in results["results"].items():
        items = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in figures.items():
            metric, _, _ = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and "," in key:
                found.append((task, metric, float(value), items))
    return found
