"""Grow a Hugging Face checkpoint: wider and deeper, or into a Mixture of Experts.

python workflows/grow.py source=DIR target=DIR growth=NAME|upcycling=NAME [action=run|plan|certify] [KEY=VALUE ...]
"""

from aquilamoe.cli.program import grow

if __name__ == "__main__":
    grow()
