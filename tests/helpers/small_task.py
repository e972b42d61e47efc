"""A labelled folder and an unlabelled one that the smallest student learns in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["flat stripes", "upright Ström", "格子"]


def picture(kind: int, rng: np.random.Generator, height: int = 40, width: int = 36) -> Image.Image:
    """Stripes or a chequer in random colours, phase and width."""
    y, x = np.mgrid[:height, :width]
    period, phase = int(rng.integers(6, 10)), int(rng.integers(0, 10))
    bands = [(y + phase) // period % 2, (x + phase) // period % 2]
    mask = [bands[0], bands[1], bands[0] ^ bands[1]][kind]
    colours = rng.integers(0, 256, (2, 3))
    while np.abs(colours[0] - colours[1]).sum() < 200:
        colours = rng.integers(0, 256, (2, 3))
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray((colours[mask] + noise).clip(0, 255).astype(np.uint8))


def write_task(folder: Path, train: int = 5, val: int = 6, test: int = 15) -> Path:
    """``train/ val/ test/`` with class folders; one more class folder is empty."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for kind, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture(kind, rng).save(place / f"{split} {i}.png")
    (folder / "train" / "empty class").mkdir()
    return folder


def write_gallery(folder: Path, count: int = 120) -> Path:
    """Unlabelled JPEGs of the same world."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for i in range(count):
        picture(int(rng.integers(0, 3)), rng).save(folder / f"{i:04d}.jpg", quality=92)
    return folder


SMALL = [
    "teacher.name=miniverse",
    "teacher.adapt=probe",
    "image_size=32",
    "student.name=test_resnet",
    "student.kwargs={output_stride: 16}",
    "transfer.size=60",
    "teach.views=2",
    "teach.hflip=0",
    "train.batch_size=32",
    "train.lr=0.003",
    "finetune.steps=10",
    "finetune.batch_size=16",
    "finetune.evals=2",
    "baselines.scratch_steps=20",
    "train.precision=fp32",
]
