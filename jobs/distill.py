"""From a few labels to a small model: adapt, retrieve, distil, finetune, test, account."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.pipeline.run import run as pipeline
    from ktray.reporting.report import closing_table

    result = pipeline(recipe, say, debug)
    folder = result["folder"]
    uri = result["mlflow"]["tracking_uri"]
    say("")
    say(closing_table(result))
    say(f"\nreport    {folder}/report.html\nstudent   {folder}/student\nresult    {folder}/result.json")
    say(f"runs      mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else f"runs      {uri}")


def plan(recipe, say):
    from ktray.pipeline.plan import show

    show(recipe, say)


if __name__ == "__main__":
    sys.exit(cli.main("distill", __doc__, run, plan))
