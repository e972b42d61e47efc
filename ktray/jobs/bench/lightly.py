"""lightly-train's distillation with the student and teacher of a benchmark, where it is installed; ktray does not
depend on it. Run as a program, this module is such a training.

It compares features, while ktray compares predictions, and it decodes every JPEG anew in each epoch. Only the speed is
measured, so random weights are enough.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from ktray.jobs.bench.lesson import Case
from ktray.miniverse.photos import ensure_tars

PACKAGE = "lightly_train"


def lightly_rate(case: Case, folder: Path, steps: int) -> float | None:
    """Measure images a second of the second half of ``steps`` steps; None if lightly-train is not installed.

    Args:
        case: its teacher must be a model of timm.
        folder: of the benchmark; images are kept there.

    Raises:
        subprocess.CalledProcessError: the training failed; its message is on the terminal.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    facts = {
        "student": case.student, "teacher": case.teacher.removeprefix("timm:"), "batch": case.batch,
        "side": case.size, "steps": steps, "images": str(_loose(case, folder)), "out": str(folder / "lightly-train"),
    }  # fmt: skip
    command = [sys.executable, "-m", "ktray.jobs.bench.lightly", json.dumps(facts)]
    environment = {**os.environ, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}  # it reports its use over the network otherwise
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])


def _loose(case: Case, folder: Path) -> Path:
    """The images of the benchmark's tars as single files."""
    loose = folder / f"photos-loose-{case.images}"
    if not loose.exists():
        part = loose.with_suffix(".tmp")
        for path in ensure_tars(folder / "photos", case.images, a_tar=50):
            with tarfile.open(path) as tar:
                tar.extractall(part, filter="data")
        part.replace(loose)
    return loose


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
    images = len(list(Path(facts["images"]).glob("*.jpg")))
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
        epochs=-(-steps // (images // batch)),
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
