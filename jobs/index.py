"""The gallery, embedded: a folder of shards that later runs search, and that grows with the gallery."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.pipeline.run import index_only

    result = index_only(recipe, say, debug)
    held = result["index"]
    say(f"\nindex     {held['folder']}: {held['images']:,} images, {held['rows']:,} rows in {held['shards']:,} shards")
    say(f"result    {result['folder']}/result.json")


def plan(recipe, say):
    from ktray.pipeline.plan import show_index

    show_index(recipe, say)


if __name__ == "__main__":
    sys.exit(cli.main("index", __doc__, run, plan))
