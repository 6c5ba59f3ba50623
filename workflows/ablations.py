"""Compare ways of growing: every variant with every seed, and the controls that they must beat.

python workflows/ablations.py +ablation=NAME [action=plan] [seeds=N] [KEY=VALUE ...]
"""

from composition import options, recompose, run

from aquilamoe.ablation.command import execute

if __name__ == "__main__":
    run(
        "ablations",
        lambda values, command: execute(values, options("ablation"), recompose("ablations"), command),
        optional_groups=("ablation",),
    )
