"""The program `efficientscale`; the scripts of `workflows/` are its commands under names of their own."""

import sys
from typing import Any

import aquilamoe
from aquilamoe.cli.hydra_cli import recompose, run
from aquilamoe.cli.shipped import STUDIES, options
from aquilamoe.cli.words import Program
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.messages import nearest
from aquilamoe.config.schema import ExperimentConfig

WITH_DEFAULTS = ("data", "model", "growth", "upcycling", "optimizer", "schedule", "cluster")


class Ablations(ExperimentConfig):
    """The keys of `ablate`: an experiment's, the ablation, and the source that advice is about."""

    ablation: AblationConfig
    source: str | None


PIPELINE = Program("config", ExperimentConfig, ("experiment",), WITH_DEFAULTS, (("experiment", "embedded"),))
ABLATIONS = Program("ablations", Ablations, ("experiment", "ablation"), WITH_DEFAULTS)
GROW = Program("grow", GrowConfig, ("growth", "upcycling"))


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
        raise SystemExit(f"error: {name}: is no command; {nearest(name, COMMANDS)}")
    else:
        name = "run"
    sys.argv[0] = f"efficientscale {name}"
    COMMANDS[name]()
