"""What is wrong with this cluster and recipe, before a job is paid for: one line a check."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.distributed.doctor.run import show

    show(recipe, say, debug)


def plan(recipe, say):
    say("Checks versions, store, checkpoints, GPUs, clocks, plan, decoding, network, token and MLflow; costs nothing.")


if __name__ == "__main__":
    sys.exit(cli.main("doctor", __doc__, run, plan))
