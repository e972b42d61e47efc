"""A labelled folder and an unlabelled one that the smallest student learns in seconds."""

import io
import tarfile
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


def write_captioned(path: Path, count: int = 80) -> Path:
    """A tar of the same world with captions; one image has none."""
    rng = np.random.default_rng(2)
    names = ["flat stripes", "upright stripes", "a chequer"]
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            kind = int(rng.integers(0, 3))
            encoded = io.BytesIO()
            picture(kind, rng).save(encoded, "JPEG", quality=92)
            parts = {"jpg": encoded.getvalue()} | ({} if i == 7 else {"txt": f"a picture of {names[kind]}".encode()})
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{i:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def write_generic(folder: Path, count: int = 20) -> Path:
    """Class folders of other things: discs, crosses, noise, plain."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:40, :36] - np.array([20, 18])[:, None, None]
    masks = [x**2 + y**2 < 120, (abs(x) < 4) | (abs(y) < 4), rng.random((40, 36)) < 0.5, np.zeros((40, 36), bool)]
    for mask, name in zip(masks, ("disc", "cross", "noise", "plain"), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colours = rng.integers(0, 256, (2, 3))
            noise = rng.normal(0, 8, (40, 36, 3))
            image = (colours[np.roll(mask, rng.integers(-6, 7, 2), (0, 1)).astype(int)] + noise).clip(0, 255)
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{i}.png")
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
    "train.patience=0",  # with so few validation images, a training would end early by chance
]


def scene(rng: np.random.Generator, side: int = 40) -> tuple[Image.Image, Image.Image]:
    """A bright square and a dark disc on grey noise, and the mask: 0 ground, 1 square, 2 disc, 255 along the rim."""
    y, x = np.mgrid[:side, :side]
    image = rng.normal(110, 12, (side, side, 3))
    mask = np.zeros((side, side), np.uint8)
    for kind, corner in zip(rng.permutation([1, 2]).tolist(), (0, side // 2), strict=True):
        top, size = int(rng.integers(2, side - 18)), int(rng.integers(12, 16))
        if kind == 1:
            inside = (y >= top) & (y < top + size) & (x >= corner + 2) & (x < corner + 2 + size)
        else:
            inside = (y - top - size / 2) ** 2 + (x - corner - 2 - size / 2) ** 2 < size**2 / 4
        mask[inside] = kind
        image[inside] = (220 if kind == 1 else 20) + rng.normal(0, 12, (int(inside.sum()), 3))
    mask[0] = 255
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def write_scenes(task: Path, gallery: Path) -> None:
    """A segmentation task of three classes (20 training pictures, 6 and 12 held out) and unlabelled pictures."""
    rng = np.random.default_rng(4)
    for split, count in (("train", 20), ("val", 6), ("test", 12)):
        for what in ("images", "masks"):
            (task / split / what).mkdir(parents=True)
        for i in range(count):
            for what, one in zip(("images", "masks"), scene(rng), strict=True):
                one.save(task / split / what / f"{i}.png")
    (task / "classes.txt").write_text("ground\nsquare\ndisc\n")
    gallery.mkdir(parents=True)
    for i in range(80):
        scene(rng)[0].save(gallery / f"{i}.jpg", quality=92)
