"""The transfer set alone: adapt, index, retrieve, and a page to look at what was found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.pipeline.run import curate_only

    result = curate_only(recipe, say, debug)
    folder, chosen = result["folder"], result["transfer_set"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in chosen["dropped"].items()) or "none"
    say(
        f"\nkept      {chosen['kept']:,} of {chosen['gallery']:,} images; dropped as copies of held-out ones: {dropped}"
    )
    say(f"list      {chosen['path']}\npage      {folder}/transfer.html\nresult    {folder}/result.json")


def plan(recipe, say):
    from ktray.pipeline.plan import show

    show(recipe, say, until="curate")


if __name__ == "__main__":
    sys.exit(cli.main("curate", __doc__, run, plan))
