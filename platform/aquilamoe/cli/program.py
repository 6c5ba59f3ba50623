"""The program `efficientscale`; the scripts of `workflows/` are its commands under names of their own."""

import sys
from typing import Any

from pydantic import Field

import aquilamoe
from aquilamoe.cli.hydra_cli import recompose, run
from aquilamoe.cli.shipped import STUDIES, options
from aquilamoe.cli.words import Program
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.messages import nearest
from aquilamoe.config.scaling import ScaleConfig
from aquilamoe.config.schema import ExperimentConfig

WITH_DEFAULTS = ("data", "model", "growth", "upcycling", "optimizer", "schedule", "cluster")


class Experiment(ExperimentConfig):
    """One experiment: a graph of stages, and - apart from it - where and how it runs."""

    scale: ScaleConfig = Field(default=ScaleConfig(), description="What the sizes of all stages are divided by")


class Ablations(Experiment):
    """The keys of `ablate`: an experiment's, the ablation, and the source that advice is about."""

    ablation: AblationConfig = Field(description="What is varied: ablation=NAME")
    source: str | None = Field(
        description="action=advise: model to grow: a stage, a directory, a fingerprint, or parameters such as 0.45M"
    )
    source_tokens: str | float | None = Field(
        description="action=advise: training of the source, such as 3.6M; null: as its record states [tokens]"
    )
    target: str | dict[str, Any] | None = Field(
        description="action=advise: parameters such as 1.6M or 8x0.45M, or sizes that change: {hidden_size: 128}"
    )
    budget: str | float | None = Field(
        description="action=advise: training of the target: tokens such as 2M, or 1e13FLOPs [tokens or FLOPs]"
    )


PIPELINE = Program("config", Experiment, ("experiment",), WITH_DEFAULTS, (("experiment", "embedded"),))
ABLATIONS = Program("ablations", Ablations, ("experiment", "ablation"), WITH_DEFAULTS)
GROW = Program("grow", GrowConfig, ("growth", "upcycling", "shrink"))


def run_pipeline() -> None:
    """`efficientscale [run]`, `workflows/efficientscale.py`: pretrain small, scale up, scale out."""
    from aquilamoe.cli.commands import execute

    run(PIPELINE, execute)


def grow() -> None:
    """`efficientscale grow`, `workflows/grow.py`: grow one Hugging Face checkpoint."""
    from aquilamoe.cli.grow import execute

    run(GROW, execute)


def ablate() -> None:
    """`efficientscale ablate`, `workflows/ablations.py`: compare ways of growing."""
    from aquilamoe.cli.ablate import execute

    def compare(values: dict[str, Any], command: str) -> None:
        execute(values, options("ablation"), recompose(ABLATIONS), command, STUDIES)

    run(ABLATIONS, compare)


COMMANDS = {"run": run_pipeline, "grow": grow, "ablate": ablate}


def main() -> None:
    """Run the command that the first word names; `run` where the first word is already one of its settings."""
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"efficientscale {aquilamoe.__version__}")
        return
    name = words[0] if words else "run"
    if name in COMMANDS:
        del sys.argv[1:2]
    elif name.replace("_", "").isalpha():
        raise SystemExit(f"error: {name}: is not a command; {nearest(name, COMMANDS)}")
    else:
        name = "run"
    sys.argv[0] = f"efficientscale {name}"
    COMMANDS[name]()
