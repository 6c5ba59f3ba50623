"""Compare ways of growing: every variant with every seed, and the controls that they must beat.

python workflows/ablations.py +ablation=NAME [action=plan|status] [seeds=N] [KEY=VALUE ...]
python workflows/ablations.py action=advise source=0.45M source_tokens=3.6M target=1.6M budget=2M
"""

from aquilamoe.cli.program import ablate

if __name__ == "__main__":
    ablate()
