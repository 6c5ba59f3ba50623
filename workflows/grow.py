"""Grow a Hugging Face checkpoint: wider and deeper, or into a Mixture of Experts.

python workflows/grow.py source=DIR target=DIR growth=NAME|upcycling=NAME [action=run|plan|certify] [KEY=VALUE ...]
"""

from composition import run

from aquilamoe.growing.command import execute

if __name__ == "__main__":
    run("grow", execute, optional_groups=("growth", "upcycling"), paths=("source", "target", "certificate.text"))
