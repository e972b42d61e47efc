"""Images that are compared with the gallery: held-out images, whose copies must stay out, and crops of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ktray.data.fingerprints import fingerprint_heldout
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Ample, Preprocess
from ktray.data.sources.fetch import fetch_images
from ktray.distributed.device_work import DeviceWork, Item
from ktray.distributed.ray_data import cpu_shards, map_shards
from ktray.models.teacher.spec import TeacherSpec
from ktray.stages.base import Reporter, Runtime
from ktray.stages.index.stage import EmbedPixels
from ktray.stages.labels import SHARD
from ktray.stages.shard_summary import ShardSummary, finish_shard, finished_shards
from ktray.storage.columns import Rows, read_shards, write_rows
from ktray.storage.store import Stage


def heldout(
    task: LabelledSet, spec: TeacherSpec | None, max_pixels: int, runtime: Runtime, stage: Stage, reporter: Reporter
) -> Rows:
    """``uri``, ``hash`` (several for each image), ``digest`` and, with a teacher, ``embedding`` of the validation and
    test images. Nothing else is computed from these images.

    With a teacher, each image has two rows, for the image and for its mirror image, because few encoders find the two
    similar.
    """
    uris = [e.uri for e in [*task.val, *task.test]]
    return recognisable(uris, spec, max_pixels, runtime, Stage(stage.file("heldout")), reporter)


def recognisable(
    uris: list[str], spec: TeacherSpec | None, max_pixels: int, runtime: Runtime, folder: Stage, reporter: Reporter
) -> Rows:
    """What finds copies of images in a gallery: the columns of `heldout`, for any images, at least one."""
    prepare = _Heldout(spec.preprocess if spec else None, max_pixels)
    return embed_images(runtime, folder, uris, prepare, spec, reporter)


def embed_images(
    runtime: Runtime,
    folder: Stage,
    uris: list[str],
    prepare: Callable[[Item], Rows],
    spec: TeacherSpec | None,
    reporter: Reporter,
) -> Rows:
    """The columns that ``prepare`` computes from the images, with ``embedding`` instead of ``pixels``. The shards are
    stored in ``folder``."""
    return compute_images(runtime, folder, uris, prepare, embedding(spec, folder), reporter)


def embedding(spec: TeacherSpec | None, folder: Stage) -> DeviceWork | None:
    """The work of `image_shards` that replaces ``pixels`` by ``embedding``; None without a teacher."""
    return _Embed(spec, folder) if spec else None


def compute_images(
    runtime: Runtime,
    folder: Stage,
    uris: list[str],
    prepare: Callable[[Item], Rows],
    work: DeviceWork | None,
    reporter: Reporter,
) -> Rows:
    """The columns that ``prepare`` and ``work`` compute from images, in the order of the images that can be used; see
    `image_shards`."""
    return stored_columns(folder, image_shards(runtime, folder, uris, prepare, work, reporter))


def stored_columns(folder: Stage, names: list[str], columns: Sequence[str] | None = None) -> Rows:
    """The columns of shards, one after the other; None: all columns."""
    shards = list(read_shards(folder, names, columns))
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}


def image_shards(
    runtime: Runtime,
    folder: Stage,
    uris: list[str],
    prepare: Callable[[Item], Rows],
    work: DeviceWork | None,
    reporter: Reporter,
) -> list[str]:
    """Compute columns of images, and return the names of the shards with them, in the order of the images.

    A repeated attempt computes only the shards that ``folder`` does not have.

    Args:
        folder: where the shards are stored, with `finish_images`.
        uris: at least one image.
        prepare: takes the item of a shard, whose ``uris`` are those of its images; returns columns, among them ``uri``.
        work: what a device computes from the columns; None: nothing.
    """
    items = [
        {"name": f"images-{i // SHARD:05d}.parquet", "uris": uris[i : i + SHARD]} for i in range(0, len(uris), SHARD)
    ]
    finished = finished_shards(folder)
    reporter.done = 0  # counts these images only; the stage may have counted others before
    reporter.expect(len(uris))
    reporter.shards(replace(s.resumed(), bad=()) for s in finished.values())
    todo = [i for i in items if i["name"] not in finished]
    summaries = (
        map_shards(todo, prepare, work, runtime.plan)
        if work
        else cpu_shards(todo, _Write(folder, prepare), runtime.plan)
    )
    reporter.shards(ShardSummary.each(summaries))
    reporter.read = 0  # these images are counted by the stages that use them
    return [str(item["name"]) for item in items]


@dataclass(frozen=True)
class _Heldout:
    preprocess: Preprocess | None
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, images, wholes, enough = [], [], [], Ample()
        for uri, image, _ in fetch_images(item["uris"], max_pixels=self.max_pixels, enough=enough):
            # An image that cannot be decoded cannot leak into the transfer set; EVALUATE quarantines it.
            if image is not None:
                images.append(image)
                wholes.append(enough.whole)
                uris.append(uri)
        prints = fingerprint_heldout(images)
        columns = {"uri": np.array(uris, dtype=str), "hash": prints.hash, "digest": prints.digest}
        if not self.preprocess:
            return columns
        mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]
        pixels = [
            self.preprocess.eval_transform(image, whole)
            for image, whole in zip([*images, *mirrored], [*wholes, *wholes], strict=True)
        ]
        both = {name: np.concatenate([column, column]) for name, column in columns.items()}
        both["pixels"] = np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8)
        return both


@dataclass(frozen=True)
class _Write:
    folder: Stage
    prepare: Callable[[Item], Rows]

    def __call__(self, item: Item) -> dict[str, Any]:
        return finish_images(self.folder, item, self.prepare(item), 0.0)


@dataclass(frozen=True)
class _Embed(EmbedPixels):
    folder: Stage

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        kept = {name: values for name, values in columns.items() if name not in self.reads}
        rows = {**kept, "embedding": computed["embedding"]}
        return finish_images(self.folder, item, rows, float(computed["flops"][0]))


def finish_images(folder: Stage, item: Item, columns: Rows, flops: float) -> dict[str, Any]:
    """Store the columns of a shard with its summary, which is returned.

    Args:
        flops: the work on the whole shard.
    """
    write_rows(folder, item["name"], columns)
    rows = len(columns["uri"])
    return finish_shard(folder, ShardSummary(item["name"], rows, len(item["uris"]), images=rows, flops=flops))
