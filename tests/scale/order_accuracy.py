"""Accuracy of a student whose transfer set is streamed in small windows, and of one whose transfer set stays in memory.

The transfer set is the class-sorted images of the task (digits, 10 classes), so an order that is not well mixed would
cost accuracy. Some minutes on two cores:

    python tests/scale/order_accuracy.py STORE [SEEDS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ktray import recipe as recipes  # noqa: E402
from ktray.pipeline.run import run  # noqa: E402

COMMON = [
    "transfer.source=target",
    "train.steps=400",
    "finetune.steps=0",
    "baselines.scratch=false",
    "teacher.candidates=[probe]",
]
# A row has 3 kB. A window of 3.3 MB is a quarter of the set.
ORDERS = {"resident": [], "streamed": ["train.resident_bytes=0", "train.window_bytes=3300000"]}


def main(store: str, seeds: int) -> None:
    found: dict[str, list[float]] = {}
    for name, keys in ORDERS.items():
        for seed in range(seeds):
            # How rows are read is not in the keys of stages, so each order has its own store.
            recipe = recipes.load("digits", [*COMMON, *keys, f"seed={seed}", f"store={store}/{name}"])
            found.setdefault(name, []).append(run(recipe)["metric"]["test"])
            print(name, seed, f"{found[name][-1]:.4f}", flush=True)
    for name, values in found.items():
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name}: {mean(values):.4f}{spread} over {len(values)} seeds")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
