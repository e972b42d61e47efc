"""The data of the rehearsal: real counts, tiny images. A folder that is complete is not drawn again."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ktray.data.labelled.draw import keep_budget
from ktray.data.labelled.rows import LabelledRow
from ktray.miniverse import world
from ktray.miniverse.vocabulary import COLOURS, STYLE_SHARES, SUBJECTS

SIDE = 32
CLASSES = 1000
TAR_IMAGES = 1000
SPLIT_SEED = 0


@dataclass(frozen=True)
class Counts:
    """Numbers of images. The defaults are those of the paper with 1% of ImageNet's labels, and a tenth of the gallery.

    ``pool`` are the labelled names, of which ``labels_per_class`` of each class are read; only these have a file.
    """

    pool: int = 1_281_167
    labels_per_class: int = 13
    val: int = 10_000
    test: int = 50_000
    gallery: int = 1_000_000
    transfer: int = 153_600

    def share(self, of: float) -> Counts:
        """The same with a share of the images; the classes stay, with one label at least."""
        labels = max(1, round(self.labels_per_class * of))
        rest = (self.pool, self.val, self.test, self.gallery, self.transfer)
        pool, val, test, gallery, transfer = (max(CLASSES, round(count * of)) for count in rest)
        return Counts(pool, labels, val, test, gallery, transfer)


def labelled(folder: Path, counts: Counts, cores: int) -> Path:
    """The list of the labelled images, ``images.csv``: uri, label and split."""
    path = folder / "images.csv"
    if path.exists():
        return path
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    split_counts = {"train": counts.pool, "val": counts.val, "test": counts.test}
    rows = [(f"{split}/{i:07d}.jpg", i % CLASSES, split) for split, n in split_counts.items() for i in range(n)]
    train = [LabelledRow(uri, uri, _name(label), "train") for uri, label, split in rows if split == "train"]
    kept, _ = keep_budget(train, SPLIT_SEED, counts.labels_per_class, [], [])
    wanted = {row.uri for row in kept}
    drawn = [(folder / uri, label) for uri, label, split in rows if split != "train" or uri in wanted]
    for split in split_counts:
        (folder / split).mkdir()
    numbered = list(enumerate(drawn))
    _each(_write_labelled, [numbered[first : first + 2000] for first in range(0, len(numbered), 2000)], cores)
    part = path.with_suffix(".tmp")
    with open(part, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["uri", "label", "split"])
        writer.writerows((uri, _name(label), split) for uri, label, split in rows)
    part.replace(path)
    return path


def gallery(folder: Path, count: int, cores: int) -> Path:
    """Tars of 1,000 images each, without captions."""
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        missing = [n for n in range(-(-count // TAR_IMAGES)) if not (folder / f"{n:05d}.tar").exists()]
        _each(partial(_write_tar, folder, count), missing, cores)
        (folder / "done").touch()
    return folder


def _name(label: int) -> str:
    return f"class {label:04d}"


def _each(work, items: Iterable, cores: int) -> None:
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as workers:
        for _ in workers.map(work, items):
            pass


def _write_labelled(drawn: Iterable[tuple[int, tuple[Path, int]]]) -> None:
    for number, (path, label) in drawn:
        path.write_bytes(_jpeg(picture(label, number)))


def _write_tar(folder: Path, count: int, number: int) -> None:
    part = folder / f"{number:05d}.tmp"
    first = number * TAR_IMAGES
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, min(first + TAR_IMAGES, count)):
            content = _jpeg(world.sample("gallery", index, size=SIDE).image)
            info = tarfile.TarInfo(f"{index:08d}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    part.replace(folder / f"{number:05d}.tar")


def picture(label: int, number: int) -> np.ndarray:
    """An image of a class: uint8 [side, side, 3].

    A class is a subject in a colour of the miniverse (68 x 12); the classes after those have a chequered background.
    """
    subjects = [s for kind, several in SUBJECTS.items() if kind not in ("text", "texture") for s in several]
    subject, colour = subjects[label % len(subjects)], label // len(subjects)
    rng = np.random.default_rng([label, number])
    uniform: Iterator[float] = iter(rng.random(96).tolist())
    draw = uniform.__next__
    _, ink, paper = world.two_colours(draw, colour % len(COLOURS))
    canvas = world.background("plain" if colour < len(COLOURS) else "checked", paper, SIDE, draw, rng)
    cover = world.in_frame(world.subject_mask(subject, STYLE_SHARES, SIDE, draw), subject, SIDE, draw)
    return world.camera(canvas + cover * (ink - canvas), draw, rng)


def _jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()
