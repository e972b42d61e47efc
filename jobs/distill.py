"""``ktray distill`` from a checkout, also where ktray is not installed; see ``ktray/jobs/definitions.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from ktray import cli
except ModuleNotFoundError as error:
    from ktray.bootstrap import lacking

    sys.exit(lacking(error))

if __name__ == "__main__":
    sys.exit(cli.entry(["distill", *sys.argv[1:]]))
