"""Write the miniverse to disk: an unlabelled gallery, a generic labelled set, and tasks as folders of images.

A folder is written under a temporary name and renamed when it is complete, and its name contains the version of the
world. Therefore an existing folder is valid and is not written again. If two callers write the same folder at the same
time, the first complete copy is used and the other one is deleted.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import multiprocessing
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ktray.accounting.device import usable_cpus
from ktray.errors import KtrayError
from ktray.miniverse.scenes import scene
from ktray.miniverse.tasks import IMAGE_SIZE, TASKS, MiniverseTask
from ktray.miniverse.vocabulary import WORLD_VERSION
from ktray.miniverse.world import sample

GALLERY_IMAGES = 30_000
SCENE_IMAGES = 8_000
LABELLED_IMAGES = 6_000
SHARD_IMAGES = 2_000


def _subject(index: int) -> tuple[NDArray[np.uint8], str]:
    drawn = sample("gallery", index, size=IMAGE_SIZE)
    return drawn.image, drawn.caption


def _scene(index: int) -> tuple[NDArray[np.uint8], str]:
    drawn = scene("scenes-gallery", index)
    return drawn.image, drawn.caption


# By name, the number of images, and a function from the number of an image to the image and its caption.
GALLERIES: dict[str, tuple[int, Callable[[int], tuple[NDArray[np.uint8], str]]]] = {
    "gallery": (GALLERY_IMAGES, _subject),
    "scenes-gallery": (SCENE_IMAGES, _scene),
}


def ensure_gallery(root: Path, name: str = "gallery", *, images: int | None = None) -> Path:
    """The folder of a gallery under `root`; it is written if it does not exist.

    It contains ``gallery-00000.tar`` and so on (WebDataset) with ``{key}.jpg`` and ``{key}.txt`` (the caption), 2,000
    images per shard. There are no labels; the captions are for retrieval by text.

    Args:
        root: any folder; created if needed.
        name: a key of `GALLERIES`.
        images: number of images; None: that of the gallery.

    Raises:
        KtrayError: `root` cannot be written, or the disk is full.
    """
    count = GALLERIES[name][0] if images is None else images

    def write(folder: Path) -> None:
        firsts = range(0, count, SHARD_IMAGES)
        spans = [(name, number, first, min(first + SHARD_IMAGES, count)) for number, first in enumerate(firsts)]
        cores = min(usable_cpus(), len(spans))
        if cores < 2:
            for span in spans:
                _write_shard(folder, span)
            return
        _in_processes([partial(_write_shard, folder, span) for span in spans], cores)

    return _ensure(Path(root), f"miniverse-v{WORLD_VERSION}-{name}-{count}", write)


def _in_processes(calls: Sequence[Callable[[], None]], processes: int) -> None:
    """Make the calls in processes. An interrupt ends them at once: a scheduler gives a job some seconds to end."""
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as workers:
        done = [workers.submit(call) for call in calls]
        try:
            for future in done:
                future.result()
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise


def _write_shard(folder: Path, span: tuple[str, int, int, int]) -> None:
    name, number, first, last = span
    draw = GALLERIES[name][1]
    with tarfile.open(folder / f"gallery-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, last):
            image, caption = draw(index)
            _add(tar, f"{index:06d}.jpg", _jpeg(image))
            _add(tar, f"{index:06d}.txt", caption.encode())


def ensure_generic_labels(root: Path, task: str = "letters", *, images: int = LABELLED_IMAGES) -> Path:
    """A Parquet list of labelled images that do not show a task's classes; it is written if it does not exist.

    It corresponds to ImageNet for the tasks of the paper: a labelled set for supervised pretraining. The columns
    ``image`` (JPEG bytes), ``label`` (the subject of the image, such as ``digit three``) and ``split`` (always
    ``train``) have the format of `ktray.data.labelled.read.read_labelled`.

    Args:
        root: any folder; created if needed.
        task: a key of `TASKS`; subjects of its `MiniverseTask.kinds` are excluded.
        images: number of images.

    Returns:
        The path of the file.

    Raises:
        KtrayError: there is no such task, or `root` cannot be written, or the disk is full.
    """
    without = _task(task).kinds

    def write(folder: Path) -> None:
        rows: list[tuple[bytes, str]] = []
        for index in itertools.count():
            if len(rows) == images:
                break
            drawn = sample("generic-labelled", index, size=IMAGE_SIZE)
            if drawn.subject.kind not in without:
                rows.append((_jpeg(drawn.image), drawn.subject.name))
        pq.write_table(
            pa.table(
                {
                    "image": pa.array([image for image, _ in rows], pa.binary()),
                    "label": [label for _, label in rows],
                    "split": ["train"] * len(rows),
                }
            ),
            folder / "images.parquet",
            row_group_size=500,
        )

    kinds = "-".join(["labelled", *(f"without-{kind}" for kind in without)])
    return _ensure(Path(root), f"miniverse-v{WORLD_VERSION}-{kinds}-{images}", write) / "images.parquet"


def ensure_task(root: Path, name: str) -> Path:
    """The folder of a built-in task under `root`; it is written if it does not exist.

    It contains ``task.json``: ``name``, ``kind``, ``metric``, ``classes``, ``class_names`` (class -> noun phrase),
    ``prompts`` (templates with ``{}``), ``labels_per_class``, ``image_size``, ``about``, ``counterpart``; and
    the folders ``train/``, ``val/`` and ``test/``. For classification each of them has class folders with PNG files.
    For sets of classes each has PNG files, and ``labels.csv`` is a list with the columns ``path,label,split``.
    For segmentation each has ``images/NAME.png`` and ``masks/NAME.png`` (8-bit grey: the number of the class, or 255
    for ignored pixels), and ``classes.txt`` contains the class names, one per line, in the order of the numbers.

    Args:
        root: any folder; created if needed.
        name: a key of `TASKS`.

    Raises:
        KtrayError: there is no such task, or `root` cannot be written, or the disk is full.
    """
    task = _task(name)

    def write(folder: Path) -> None:
        listed: list[tuple[str, str, str]] = []
        for split, examples in task.splits().items():
            for part in ("images", "masks") if task.masks else [""] if task.sets else task.classes:
                (folder / split / part).mkdir(parents=True)
            for number, example in enumerate(examples):
                image = Image.fromarray(example.image)
                if isinstance(example.label, tuple):
                    image.save(folder / split / f"{number:05d}.png")
                    names = "|".join(task.classes[label] for label in example.label)
                    listed.append((f"{split}/{number:05d}.png", names, split))
                elif example.mask is None:
                    image.save(folder / split / task.classes[example.label] / f"{number:05d}.png")
                else:
                    image.save(folder / split / "images" / f"{number:05d}.png")
                    Image.fromarray(example.mask).save(folder / split / "masks" / f"{number:05d}.png")
        if task.sets:
            with (folder / task.file).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("path", "label", "split"), *listed])
        if task.masks:
            (folder / "classes.txt").write_text("\n".join(task.classes) + "\n", encoding="utf-8")
        about = {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "classes": list(task.classes),
            "class_names": task.class_names,
            "prompts": list(task.prompts),
            "labels_per_class": task.labels_per_class,
            "image_size": task.image_size,
            "about": task.about,
            "counterpart": task.counterpart,
        }
        (folder / "task.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    return _ensure(Path(root), f"miniverse-v{WORLD_VERSION}-task-{name}", write)


def _task(name: str) -> MiniverseTask:
    if name not in TASKS:
        raise KtrayError(f"There is no built-in task {name!r}", f"Set task.name to one of {', '.join(TASKS)}.")
    return TASKS[name]


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()
    # 4:4:4, because chroma subsampling would blur glyphs that differ from their background only by hue.
    Image.fromarray(image).save(encoded, "JPEG", quality=92, subsampling=0)
    return encoded.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time, owner and mode are constants, so that equal content gives equal bytes
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
            f"The miniverse cannot be written to '{final}': {error}",
            "Set store to a folder with write permission and about 100 MB of free space.",
        ) from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return final
