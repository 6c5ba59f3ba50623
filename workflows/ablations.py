"""Compare ways of growing: every variant with every seed, and the controls that they must beat.

python workflows/ablations.py +ablation=NAME [action=plan|status] [seeds=N] [KEY=VALUE ...]
python workflows/ablations.py action=advise source=0.45M source_tokens=3.6M target=1.6M budget=2M
"""

from composition import CONF, options, recompose, run

from aquilamoe.ablation.command import execute

STUDIES = CONF.parent / "docs" / "studies"

if __name__ == "__main__":
    run(
        "ablations",
        lambda values, command: execute(values, options("ablation"), recompose("ablations"), command, STUDIES),
        optional_groups=("ablation",),
    )
