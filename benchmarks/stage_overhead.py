"""What it costs to start a training stage on Ray Train workers instead of in this process, and what its steps wait for.

python benchmarks/stage_overhead.py [--rounds N] [--out FILE]

The small model of conf/config.yaml is trained for a few steps, the same job each time; measured is what passes from
the call until its first point is written (model built, held-out loss of step 0 known), and what the whole call takes.

  in this process          cluster=local_process
  Ray, from nothing        a session of Ray and a group of workers are started for it (the first stage of a run that
                           trains at once: a run that makes data first does both beside that)
  Ray, new workers         the session stands, the workers are started for this stage
  Ray, standing workers  every further stage of a run
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aquilamoe.estimates.duration import Speed

HERE = Path(__file__).resolve().parent
MODES = ("in this process", "Ray, from nothing", "Ray, new workers", "Ray, standing workers")
GOAL_S, WAIT_GOAL = 3.0, 0.01
STEPS = 40


def experiment(root: Path) -> Any:
    """The experiment of conf/config.yaml up to its first training, with a budget of a few steps."""
    import hydra
    from omegaconf import OmegaConf

    from aquilamoe.config import graph

    words = [f"stages.prepare.total_tokens={STEPS * 4096}", "stages.prepare.schedule.warmup_tokens=8192"]
    with hydra.initialize_config_dir(str(HERE.parent / "conf"), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose("config", [*words, f"paths.root={root}"]), resolve=True)
    kept = ("corpus", "tokenizer", "tokens", "prepare")
    values["stages"] = {name: stage for name, stage in values["stages"].items() if name in kept}
    return graph.parse(values | {"report": {"chain": [], "control": None}})


def tokens_of(experiment: Any, root: Path) -> Path:
    """Make the token files; return their folder."""
    from aquilamoe.config import graph
    from aquilamoe.pipeline import plan as planning
    from aquilamoe.pipeline import runner
    from aquilamoe.pipeline.store import Store

    plan = planning.make(graph.build(experiment), Store(root), Speed(1e9))
    return runner.run(plan[:-1], Store(root), experiment.cluster, [])["tokens"].directory


def measure(experiment: Any, tokens: Path, mode: str, out: Path, root: Path) -> tuple[float, float, float]:
    """Seconds until the first point, seconds of the call, share of the steps' time that waited for data."""
    from aquilamoe.config import graph
    from aquilamoe.training.job import Job
    from aquilamoe.training.ray.launch import launch

    node = graph.build(experiment)["prepare"]
    assert node.stage.kind == "pretrain"
    assert node.model is not None
    cluster = experiment.cluster.model_copy(update={"executor": "process" if mode == MODES[0] else "ray"})
    started = time.time()
    launch(
        Job(
            name="prepare",
            stage=node.stage,
            model=node.model,
            tokens=tokens,
            source=None,
            out=out,
            ancestor_tokens=0,
            ancestor_flops=0,
            cluster=cluster,
        ),
        root,
    )
    seconds = time.time() - started
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    waited = statistics.mean(point["train/data_wait_share"] for point in points if "train/data_wait_share" in point)
    return points[0]["time"] - started, seconds, waited


def one_round(root: Path) -> None:
    """Runs in a process of its own, since a session of Ray cannot be started twice as for the first time."""
    from aquilamoe.training.ray.launch import release

    configured = experiment(root)
    tokens = tokens_of(configured, root)
    measure(configured, tokens, MODES[0], root / "warm-up", root)  # imports of this process
    for mode in MODES:
        if mode == MODES[2]:
            release()
        out = root / mode.replace(" ", "-").replace(",", "")
        print(json.dumps([mode, *measure(configured, tokens, mode, out, root)]), flush=True)
    release()


def table(results: dict[str, list[list[float]]]) -> list[str]:
    """Medians as a Markdown table, differences to training in this process, and the goals."""
    medians = {
        mode: [statistics.median(column) for column in zip(*rows, strict=True)] for mode, rows in results.items()
    }
    first, whole, _ = medians[MODES[0]]
    lines = [
        "| where | s to first point | over in-process | s of the call | over in-process | waits for data |",
        "|---|---|---|---|---|---|",
    ]
    for mode, (to_first, seconds, waited) in medians.items():
        over = f"{to_first - first:+.2f} | {seconds:.2f} | {seconds - whole:+.2f}"
        lines.append(f"| {mode} | {to_first:.2f} | {over} | {waited:.2%} |")
    over, waited = medians[MODES[3]][0] - first, medians[MODES[3]][2]
    lines += [
        "",
        f"A stage on standing workers starts {over:+.2f} s later than in this process (goal: under {GOAL_S:g} s); "
        f"its steps wait for data {waited:.2%} of their time (goal: under {WAIT_GOAL:.0%}).",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each in a process of its own; medians are printed")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--one-round", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_round:
        one_round(arguments.one_round)
        return
    results: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for _ in range(arguments.rounds):
        root = Path(tempfile.mkdtemp())
        try:
            command = [sys.executable, __file__, "--one-round", str(root)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        finally:
            shutil.rmtree(root, ignore_errors=True)
        for mode, *values in map(json.loads, output.splitlines()):
            results[mode].append(values)
    lines = table(results)
    print("\n".join(lines))
    if arguments.out:
        command_line = f"python benchmarks/stage_overhead.py --rounds {arguments.rounds}"
        heading = ["# What starting a training stage costs", "", f"`{command_line}`, medians", ""]
        arguments.out.write_text("\n".join([*heading, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
