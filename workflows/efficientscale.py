"""Pretrain small, scale up, scale out.

python workflows/efficientscale.py [experiment=NAME] [action=run|plan|status|...] [KEY=VALUE ...]
"""

from composition import run

from aquilamoe.commands import execute

if __name__ == "__main__":
    run("config", execute, optional_groups=("experiment",), paths=("checkpoint", "other", "prompt", "tasks"))
