"""Ways of pretraining beside each other on one task: accuracy with its interval against compute, over seeds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.jobs.compare import compare

    compare(recipe, say, debug)


def plan(recipe, say):
    from ktray.jobs.compare.equal_budget import show

    show(recipe, say)


if __name__ == "__main__":
    sys.exit(cli.main("compare", __doc__, run, plan))
