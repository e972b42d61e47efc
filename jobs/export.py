"""A run's student as files to deploy: ONNX (and int8), plain timm, a model card, a model version in MLflow."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.jobs.export.card import closing
    from ktray.jobs.export.run import export

    found = export(recipe, say, debug)
    say(f"\n{closing(found)}\n\nexport    {found['folder']}\ncard      {found['folder']}/README.md")


def plan(recipe, say):
    from ktray.jobs.export.run import show

    show(recipe, say)


if __name__ == "__main__":
    sys.exit(cli.main("export", __doc__, run, plan))
