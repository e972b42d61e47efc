"""``ktray curate`` from a checkout, also where ktray is not installed; see ``ktray/jobs/definitions.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray.start import start

if __name__ == "__main__":
    sys.exit(start(["curate", *sys.argv[1:]]))
