"""Pretrain small, scale up, scale out.

python workflows/efficientscale.py [experiment=NAME] [action=run|plan|status|...] [KEY=VALUE ...]
"""

from aquilamoe.cli.program import run_pipeline

if __name__ == "__main__":
    run_pipeline()
