"""The work of TEACH on one shard of the transfer set: store its views with their targets, store a list of its images,
or compare stored targets with those that the teacher computes now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ktray.distributed.device_work import Item
from ktray.errors import KtrayError
from ktray.models.teacher.teacher import float32_products, rounds
from ktray.stages.shard_summary import ShardSummary, finish_shard, pairs
from ktray.storage.columns import Rows, read_rows, write_rows
from ktray.storage.concurrent import in_order
from ktray.storage.store import Stage
from ktray.targets.jpeg import encode_views
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Loaded, Predict
from ktray.targets.top_k import dense_rows
from ktray.training.read_windows import listed

# Lowest accepted cosine similarity between a stored target and the live teacher's. Half precision and another batch
# change the cosine by far less.
SAME = 0.999
CHECKED_IMAGES = 4, 32
_EXACT = "float32 "  # begins the names of the columns of a teacher in float32


def _write(stage: Stage, item: Item, columns: Rows, flops: float, jpeg: int | None) -> dict[str, Any]:
    bad, rows = pairs(columns.pop("bad").tolist()), len(columns["pixels"])
    write_rows(stage, item["name"], encode_views(columns, jpeg))
    summary = ShardSummary(item["name"], rows, read=len(item["uris"]), bad=bad, images=rows, flops=flops * rows)
    return finish_shard(stage, summary)


@dataclass(frozen=True)
class WithoutTeacher:
    """Stores views without teacher targets; ``jpeg`` as in `encode_views`."""

    stage: Stage
    cut: MakeViews
    jpeg: int | None = None

    def __call__(self, item: Item) -> dict[str, Any]:
        return _write(self.stage, item, self.cut(item), 0.0, self.jpeg)


@dataclass(frozen=True)
class WithTeacher:
    """Stores views with the teacher's outputs; ``jpeg`` as in `encode_views`."""

    stage: Stage
    predict: Predict
    jpeg: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> Predict:
        return self.predict

    def compute(self, model: Loaded, columns: Rows) -> Rows:
        return {**model.targets(columns["pixels"]), "flops": np.array([model.flops])}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        flops = float(computed.pop("flops")[0])
        return _write(self.stage, item, {**columns, **self.predict.resized(columns), **computed}, flops, self.jpeg)


@dataclass(frozen=True)
class ListImages:
    """Stores only the list of the images, for rows that are computed during training; returns the number of rows."""

    stage: Stage
    per_image: int

    def __call__(self, item: Item) -> int:
        self.stage.write_json(listed(item["name"]), {"uris": item["uris"], "beside": item["beside"]})
        return len(item["uris"]) * self.per_image


def list_images(stage: Stage, items: Sequence[Item], per_image: int) -> dict[str, int]:
    """`ListImages` for each shard; returns the number of rows of each, by name."""
    store = ListImages(stage, per_image)
    rows = in_order((partial(store, item) for item in items), stage.at_once)
    return {item["name"]: count for item, count in zip(items, rows, strict=True)}


def checked_images(images: int) -> int:
    """The number of images of a transfer set that are compared with the live teacher: one in twenty, between 4 and
    32."""
    return min(images, CHECKED_IMAGES[1], max(CHECKED_IMAGES[0], images // 20))


def sample(items: list[Item], rows: dict[str, int]) -> list[Item]:
    """Choose `checked_images` images, spread evenly over the shards that have rows."""
    places = [(number, i) for number, item in enumerate(items) if rows[item["name"]] for i in range(len(item["uris"]))]
    chosen: dict[int, list[str]] = {}
    for at in np.linspace(0, len(places) - 1, checked_images(len(places))).astype(int):
        number, i = places[at]
        chosen.setdefault(number, []).append(items[number]["uris"][i])
    return [{"name": items[number]["name"], "uris": uris, "beside": {}} for number, uris in chosen.items()]


@dataclass(frozen=True)
class CheckedShard(ShardSummary):
    """The summary of a comparison.

    Attributes:
        checked: number of views whose stored targets were compared.
        cosine: their lowest cosine similarity with the live teacher's targets.
        to_float32: the same with those of a teacher in float32; None where the live one is.
    """

    checked: int = 0
    cosine: float = 1.0
    to_float32: float | None = None


@dataclass(frozen=True)
class CheckTargets:
    """Compares stored targets with the live teacher's, on views that are cut again."""

    stage: Stage
    predict: Predict

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> Predict:
        return self.predict

    def compute(self, model: Loaded, columns: Rows) -> Rows:
        facts = {"flops": np.array([model.flops]), "classes": np.array([len(model.teacher.classes)])}
        found = {**model.targets(columns["pixels"]), **facts}
        if rounds(model.device):
            with float32_products():
                found |= {f"{_EXACT}{name}": value for name, value in model.targets(columns["pixels"]).items()}
            found["flops"] = 2 * found["flops"]
        return found

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        flops, classes = float(computed.pop("flops")[0]), int(computed.pop("classes")[0])
        exact = {name[len(_EXACT) :]: computed.pop(name) for name in list(computed) if name.startswith(_EXACT)}
        fresh = computed
        stored = read_rows(self.stage, item["name"], ["view_id", *self.predict.columns])
        stored_rows, fresh_rows, *exact_rows = (
            dense_rows(rows, self.predict.columns, classes) for rows in (stored, fresh, *([exact] if exact else []))
        )
        row_of = {int(view): row for row, view in enumerate(stored["view_id"])}
        worst, to_float32 = 1.0, 1.0
        for here, view in enumerate(columns["view_id"].tolist()):
            where = f"view {columns['view_index'][here]} of '{columns['uri'][here]}' in {item['name']}"
            if view not in row_of:
                raise KtrayError(
                    f"{where} is missing in the stored targets", f"Delete {self.stage.uri} and run the job again."
                )
            for name in self.predict.targets:
                cosine = _cosine(stored_rows[name][row_of[view]], fresh_rows[name][here])
                worst = min(worst, cosine)
                for rows in exact_rows:
                    to_float32 = min(to_float32, _cosine(stored_rows[name][row_of[view]], rows[name][here]))
                if not cosine >= SAME:
                    raise KtrayError(
                        f"The stored targets are wrong: the stored {name} of {where} has a cosine similarity of "
                        f"{cosine:.4f} with the live teacher's output; at least {SAME} is required",
                        f"Delete {self.stage.uri} and run the job again. If the error occurs again, the teacher's "
                        "outputs differ between machines or batches; check whether all machines use the same "
                        "precision.",
                    )
        views = len(columns["view_id"])
        more = to_float32 if exact else None
        return CheckedShard(item["name"], flops=flops * views, checked=views, cosine=worst, to_float32=more).to_json()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    left, right = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    size = float(np.linalg.norm(left) * np.linalg.norm(right))
    # Two zero vectors count as equal; a NaN equals nothing.
    return float(left @ right) / size if size else float(np.array_equal(left, right))
