"""The best small model that a budget buys: transfer sets, objectives, teachers, students and schedules, searched."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.jobs.tune.run import tune

    tune(recipe, say, debug)


def plan(recipe, say):
    from ktray.jobs.tune.plan import report

    report(recipe, say)


if __name__ == "__main__":
    sys.exit(cli.main("tune", __doc__, run, plan))
