"""The program `efficientscale`; the scripts of `workflows/` are its commands under names of their own."""

import sys

import aquilamoe
from aquilamoe.cli.hydra_cli import recompose, run
from aquilamoe.cli.shipped import STUDIES, options
from aquilamoe.config.messages import nearest


def run_pipeline() -> None:
    """`efficientscale [run]`, `workflows/efficientscale.py`: pretrain small, scale up, scale out."""
    from aquilamoe.commands import execute

    run("config", execute, optional_groups=("experiment",), paths=("checkpoint", "other", "prompt", "tasks"))


def grow() -> None:
    """`efficientscale grow`, `workflows/grow.py`: grow one Hugging Face checkpoint."""
    from aquilamoe.growing.command import execute

    run("grow", execute, optional_groups=("growth", "upcycling"), paths=("source", "target", "certificate.text"))


def ablate() -> None:
    """`efficientscale ablate`, `workflows/ablations.py`: compare ways of growing."""
    from aquilamoe.ablation.command import execute

    run(
        "ablations",
        lambda values, command: execute(values, options("ablation"), recompose("ablations"), command, STUDIES),
        optional_groups=("ablation",),
    )


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
