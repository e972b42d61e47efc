"""What this machine reaches: each part's rate as a share of a limit measured in the same run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ktray import cli


def run(recipe, say, debug):
    from ktray.jobs.bench.run import bench

    result = bench(recipe, say, debug)
    say(f"\ntable     {result['folder']}/bench.md\nresult    {result['folder']}/result.json")


def plan(recipe, say):
    say(f"bench     {', '.join(recipe.bench.only)}: {recipe.bench.repeats} turns each, some minutes in all")


if __name__ == "__main__":
    short = {"--only": "bench.only=[{}]", "--quick": "bench.quick=true", "--json": "bench.json_file={}"}
    sys.exit(cli.main("bench", __doc__, run, plan, options=short))
