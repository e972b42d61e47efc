"""lightly-train's distillation with the student and teacher of a benchmark, where it is installed; ktray does not
depend on it. Run as a program, this module is such a training.

It compares features, while ktray compares predictions, and it decodes every JPEG anew in each epoch. Only the speed is
measured, so random weights are enough.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ktray.distributed.device_workers import WORKERS
from ktray.jobs.bench.lesson import Case
from ktray.miniverse.photos import DISTINCT, jpeg

PACKAGE = "lightly_train"

logger = logging.getLogger("ktray")


def lightly_rate(case: Case, folder: Path, steps: int) -> float | None:
    """Measure images a second of the second half of ``steps`` steps; None if lightly-train is not installed, or, with a
    warning, if it fails.

    Args:
        case: its teacher must be a model of timm. Some students do not fit (FastViT: its last layer has more channels
            than the features that lightly-train takes).
        folder: of the benchmark; images are kept there.
        steps: at least 4.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    WORKERS.end()  # they hold memory of the GPU
    facts = {
        "student": case.student, "teacher": case.teacher.removeprefix("timm:"), "batch": case.batch,
        "side": case.size, "steps": steps, "images": str(_images(case.batch * steps, folder)),
        "out": str(folder / "lightly-train"),
    }  # fmt: skip
    command = [sys.executable, "-m", "ktray.jobs.bench.lightly", json.dumps(facts)]
    environment = {**os.environ, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}  # it reports its use over the network otherwise
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    except subprocess.CalledProcessError as error:  # the other rows must not be lost for it
        logger.warning(f"lightly-train has no row, because it ended with exit code {error.returncode}")
        return None
    finally:
        shutil.rmtree(folder / "lightly-train", ignore_errors=True)
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])


def _images(count: int, folder: Path) -> Path:
    """A folder with ``count`` JPEGs of 500 x 375 pixels. Few are distinct; the others are links, which take no space.

    All steps are in one epoch, because a new epoch starts with new processes that read.
    """
    images = folder / f"photos-{count}"
    if not images.exists():
        part = images.with_suffix(".tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for number in range(count):
            if number < DISTINCT:
                (part / f"{number:08d}.jpg").write_bytes(jpeg(number))
            else:
                os.link(part / f"{number % DISTINCT:08d}.jpg", part / f"{number:08d}.jpg")
        part.replace(images)
    return images


class StepClock:
    """Times of the forward passes of a layer in training. Only two of them wait for the device."""

    def __init__(self, steps: int) -> None:
        self.first, self.last = steps // 2, steps - 1
        self.seen = 0
        self.times: dict[int, float] = {}

    def __call__(self, layer: Any, inputs: Any) -> None:
        import torch

        if not layer.training:
            return
        if self.seen in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[self.seen] = time.perf_counter()
        self.seen += 1

    def rate(self, batch: int) -> float:
        """Images a second between the two passes."""
        return (self.last - self.first) * batch / (self.times[self.last] - self.times[self.first])


def main(argument: str) -> None:
    """Train like lightly-train's own quick start, in bf16 on a GPU; prints images a second."""
    import lightly_train
    import timm
    import torch

    facts = json.loads(argument)
    batch, side, steps = facts["batch"], facts["side"], facts["steps"]
    model = timm.create_model(facts["student"], num_classes=0)
    clock = StepClock(steps)
    # The methods of the model are called one by one, so that a hook of the model itself would never be.
    next(layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)).register_forward_pre_hook(clock)
    lightly_train.pretrain(
        out=facts["out"],
        data=facts["images"],
        model=model,
        method="distillationv3",  # the only one with teachers of timm
        method_args={"teacher": f"timm/{facts['teacher']}"},
        epochs=1,
        batch_size=batch,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        overwrite=True,
        transform_args={"image_size": (side, side)},
        loggers={"tensorboard": None},
    )
    print(json.dumps({"rate": clock.rate(batch)}))


if __name__ == "__main__":
    main(sys.argv[1])
