"""Writes the miniverse to disk: an unlabelled gallery in tar shards, and tasks as class folders.

A folder appears under its final name only when it is complete (written beside it, then renamed), and its
name holds the world's version: what exists is right, and is not written again. Two callers at once both
write; the first to finish wins and the other's copy is dropped.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktray.errors import KtrayError
from ktray.miniverse.captions import prompt_templates
from ktray.miniverse.vocabulary import SUBJECTS, WORLD_VERSION
from ktray.miniverse.world import sample

IMAGE_SIZE = 32
GALLERY_IMAGES = 30_000
SHARD_IMAGES = 2_000

Labelled = list[tuple[NDArray[np.uint8], int]]


@dataclass(frozen=True)
class Task:
    """A built-in task.

    Attributes:
        name: its name in recipes (``task.name``).
        classes: folder names, in the order of the labels.
        class_names: folder -> noun phrase for prompts.
        labels_per_class: images a class in ``train``.
        splits: gives ``train``, ``val`` and ``test``, each a list of (uint8 [size, size, 3], label).
        about: one sentence on where the images come from.
    """

    name: str
    classes: tuple[str, ...]
    class_names: dict[str, str]
    labels_per_class: int
    splits: Callable[[], dict[str, Labelled]]
    about: str


def _letters() -> dict[str, Labelled]:
    order = {subject: label for label, subject in enumerate(SUBJECTS["capital"])}
    counts = {"train": 10, "val": 10, "test": 100}
    return {
        split: [
            (drawn.image, order[drawn.subject])
            for drawn in (sample(f"letters-{split}", i, size=IMAGE_SIZE) for i in range(26 * each))
        ]
        for split, each in counts.items()
    }


def _digits() -> dict[str, Labelled]:
    from sklearn.datasets import load_digits

    scans = load_digits()
    ink = np.asarray(scans.images, dtype=np.float32) / 16.0
    labels = np.asarray(scans.target)
    order = np.random.default_rng(0).permutation(len(labels))
    splits: dict[str, Labelled] = {"train": [], "val": [], "test": []}
    seen = [0] * 10
    for row in order.tolist():
        label = int(labels[row])
        split = "train" if seen[label] < 10 else "val" if seen[label] < 20 else "test"
        seen[label] += 1
        # Dark ink on light paper, as it was before the scan.
        paper = Image.fromarray(np.round(255 * (1 - ink[row])).astype(np.uint8))
        grown = paper.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")
        splits[split].append((np.asarray(grown), label))
    return splits


TASKS: dict[str, Task] = {
    "letters": Task(
        name="letters",
        classes=tuple(subject.token for subject in SUBJECTS["capital"]),
        class_names={subject.token: subject.name for subject in SUBJECTS["capital"]},
        labels_per_class=10,
        splits=_letters,
        about="capital letters of the miniverse, drawn apart from the gallery and from what the teacher saw",
    ),
    "digits": Task(
        name="digits",
        classes=tuple(subject.token for subject in SUBJECTS["digit"]),
        class_names={subject.token: subject.name for subject in SUBJECTS["digit"]},
        labels_per_class=10,
        splits=_digits,
        about="handwritten digits, real scans of 8 x 8 points, from scikit-learn's load_digits",
    ),
}


def ensure_gallery(root: Path, *, images: int = GALLERY_IMAGES) -> Path:
    """The gallery's folder under `root`, written if it is not there.

    It holds ``gallery-00000.tar`` and so on (WebDataset): ``{key}.jpg`` and ``{key}.txt`` (the caption),
    2,000 images a shard. There are no labels; captions are there for those who retrieve by text.

    Args:
        root: any folder; made if missing.
        images: how many.

    Raises:
        KtrayError: `root` cannot be written, or the disk is full.
    """

    def write(folder: Path) -> None:
        for shard, start in enumerate(range(0, images, SHARD_IMAGES)):
            with tarfile.open(folder / f"gallery-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(start, min(start + SHARD_IMAGES, images)):
                    drawn = sample("gallery", index, size=IMAGE_SIZE)
                    encoded = io.BytesIO()
                    # 4:4:4, as halved colour would blur glyphs that differ from their ground by hue alone.
                    Image.fromarray(drawn.image).save(encoded, "JPEG", quality=92, subsampling=0)
                    _add(tar, f"{index:06d}.jpg", encoded.getvalue())
                    _add(tar, f"{index:06d}.txt", drawn.caption.encode())

    return _ensure(Path(root), f"miniverse-v{WORLD_VERSION}-gallery-{images}", write)


def ensure_task(root: Path, name: str) -> Path:
    """The folder of a built-in task under `root`, written if it is not there.

    It holds ``train/ val/ test/``, each with class folders of PNG files, and ``task.json``: ``name``,
    ``classes``, ``class_names`` (folder -> noun phrase), ``prompts`` (templates with ``{}``),
    ``labels_per_class``, ``image_size``, ``about``.

    Args:
        root: any folder; made if missing.
        name: a key of `TASKS`.

    Raises:
        KtrayError: there is no such task, or `root` cannot be written, or the disk is full.
    """
    if name not in TASKS:
        raise KtrayError(f"there is no built-in task {name!r}", f"task.name is one of {', '.join(TASKS)}")
    task = TASKS[name]

    def write(folder: Path) -> None:
        for split, images in task.splits().items():
            for label in task.classes:
                (folder / split / label).mkdir(parents=True)
            for number, (image, index) in enumerate(images):
                Image.fromarray(image).save(folder / split / task.classes[index] / f"{number:05d}.png")
        about = {
            "name": task.name,
            "classes": list(task.classes),
            "class_names": task.class_names,
            "prompts": prompt_templates(),
            "labels_per_class": task.labels_per_class,
            "image_size": IMAGE_SIZE,
            "about": task.about,
        }
        (folder / "task.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    return _ensure(Path(root), f"miniverse-v{WORLD_VERSION}-task-{name}", write)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, owner and mode are constants: equal content, equal bytes
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _ensure(root: Path, name: str, write: Callable[[Path], None]) -> Path:
    final = root / name
    if final.is_dir():
        return final
    partial: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        write(partial)
        partial.chmod(0o755)
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    except OSError as error:
        raise KtrayError(
            f"cannot write the miniverse to {final}: {error.strerror or error}",
            "Point `store` to a folder with write permission and some 100 MB of free space",
        ) from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return final
