"""The queries of retrieval: the labelled images, crops of them, and the class names as text.

In the embedding space of CLIP-like teachers, texts and images form separate groups: the images nearest to a text have a
far lower cosine similarity than those nearest to an image. This does not matter for strategies that give each query a
share; ``best_first`` would take only images that the image queries find.

If images have sets of classes, the shares of the queries are balanced over the classes (`balanced_shares`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import fetch_images
from ktray.data.sources.uris import ImageRef
from ktray.distributed.device_work import Item
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.models.teacher.heads import text_head
from ktray.models.teacher.spec import TeacherSpec
from ktray.recipe.schema import TransferConfig
from ktray.retrieval.crops import Crops
from ktray.retrieval.floor import calibrated, leave_one_out, leave_one_out_of_mean
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, Runtime, StageResult
from ktray.stages.curate.heldout import embed_images
from ktray.storage.columns import Rows
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind

TEXT = "text:"
MEAN = "class:"


@dataclass(frozen=True)
class Queries:
    """Queries.

    Attributes:
        embedding: (Q, D) float32, of unit length.
        uris: names of the queries: an image, a crop, ``text:NAME`` for the prompts of a class, or ``class:NAME`` for
            the mean of the queries of a class.
        labels: (Q,) int64, classes of the queries.
        origin: (Q,) int64, number of the labelled image from which a query was made; -1: from none.
        classes: (Q, C) uint8, 1 for each class of a query, if images have sets of classes; then ``labels`` are 0. None:
            queries have one class, or none.
        share: (Q,) float64, relative shares of the queries in the transfer set; None: equal shares.
        floor: (Q,) float32, the calibrated similarity floor of a query (`ktray.retrieval.floor`); NaN where the
            labelled images do not give one. Queries of different kinds (images, texts, means) have different floors.
    """

    embedding: np.ndarray
    uris: list[str]
    labels: np.ndarray
    origin: np.ndarray
    floor: np.ndarray
    classes: np.ndarray | None = None
    share: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        embedding: np.ndarray,
        uris: list[str],
        labels: np.ndarray,
        origin: np.ndarray | None = None,
        classes: np.ndarray | None = None,
        share: np.ndarray | None = None,
    ) -> Queries:
        """Queries without a floor; those without ``origin`` are not made from labelled images."""
        none = np.full(len(uris), -1, dtype=np.int64)
        unknown = np.full(len(uris), np.nan, dtype=np.float32)
        return cls(embedding, uris, labels, none if origin is None else origin, unknown, classes, share)

    @classmethod
    def none(cls) -> Queries:
        return cls.of(np.zeros((0, 0), np.float32), [], np.zeros(0, np.int64))

    @classmethod
    def joined(cls, groups: list[Queries]) -> Queries:
        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(group, name) for group in groups])

        uris = [uri for group in groups for uri in group.uris]
        sets = all(group.classes is not None for group in groups)
        optional = (column(name) if sets else None for name in ("classes", "share"))
        return cls(column("embedding"), uris, column("labels"), column("origin"), column("floor"), *optional)

    def __len__(self) -> int:
        return len(self.uris)

    @property
    def membership(self) -> np.ndarray:
        """``classes``, or ``labels`` where queries have one class."""
        return self.labels if self.classes is None else self.classes


@dataclass(frozen=True)
class QueryInputs:
    """The part of the inputs of CURATE from which the queries are computed.

    Attributes:
        adapt: the ADAPT stage, which holds the embeddings of the labelled images.
        encoder: the frozen teacher.
        kind: the task kind.
        classes, names: the classes of the task, and their names as text.
        crop_count: number of crops of each labelled image; None: no crops.
    """

    transfer: TransferConfig
    adapt: StageResult
    encoder: TeacherSpec
    kind: str
    classes: list[str]
    names: list[str]
    prompts: list[str]
    crop_count: int | None
    max_pixels: int


def queries(inputs: QueryInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> Queries:
    """Compute the queries of the recipe.

    Raises:
        KtrayError: the recipe requests text queries and the teacher has no text tower, or queries per class and the
            images of the task kind have no class.
    """
    part = inputs.transfer
    embedding, uris, labels = adapt_stage.train_embeddings(inputs.adapt)
    sets = adapt_stage.train_classes(inputs.adapt)
    share = None if sets is None else balanced_shares(sets)
    images = Queries.of(embedding, uris, labels, np.arange(len(uris)), sets, share)
    groups = []
    if part.queries != "text":
        crops = [_crops(inputs, runtime, stage, images, reporter)] if part.query_crops != "none" else []
        groups.append(Queries.joined([images, *crops]))
    if part.queries != "images":
        groups.append(_texts(inputs, runtime))
    if part.per == "query":
        return Queries.joined([_with_floor(group, images) for group in groups])
    every = Queries.joined(groups)
    if sets is not None:
        every, images = one_class_each(every, sets), one_class_each(images, sets)
    elif not task_kind(inputs.kind).image_classes and part.queries != "text":
        raise KtrayError(
            f"transfer.per=class needs a class for each image, and images of task.kind={inputs.kind} have none",
            "Set transfer.per=query.",
        )
    present = np.unique(every.labels)
    mean = np.stack([every.embedding[every.labels == label].mean(0) for label in present])
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    means = Queries.of(mean, [MEAN + inputs.classes[label] for label in present.tolist()], present)
    if sets is not None:
        member = np.eye(len(inputs.classes), dtype=np.uint8)[present]
        means = replace(means, labels=np.zeros_like(present), classes=member, share=np.ones(len(present)))
    floor = calibrated(
        leave_one_out_of_mean(images.embedding, images.labels, every.embedding, every.labels, every.origin)
    )
    return _floored(means, floor)


def balanced_shares(classes: np.ndarray) -> np.ndarray:
    """Shares (N,) float64 of labelled images, with a mean of 1, so that the images of each class together have the same
    share: an image gets 1 / n from each of its classes, where n is the number of images of the class. Images with the
    empty set count as a class of their own.

    Args:
        classes: (N, C) uint8, 1 for each class of an image.
    """
    member = np.concatenate([classes > 0, ~(classes > 0).any(1, keepdims=True)], axis=1).astype(np.float64)
    share: np.ndarray = (member / np.maximum(1, member.sum(0))).sum(1)
    return share / share.mean()


def one_class_each(group: Queries, sets: np.ndarray) -> Queries:
    """Each query with several classes as one query for each of them, for means of classes.

    Args:
        sets: (N, C), the classes of the labelled images. ``origin`` of the result is the number of a pair of image and
            class, in the order of the pairs of ``sets``, so that an image is left out of the mean of its classes.
    """
    assert group.classes is not None
    number = np.full(sets.shape, -1, dtype=np.int64)
    number[np.nonzero(sets)] = np.arange(int((sets > 0).sum()))
    query, label = np.nonzero(group.classes)
    origin = np.where(group.origin[query] < 0, -1, number[group.origin[query], label])
    return Queries.of(group.embedding[query], [group.uris[q] for q in query.tolist()], label, origin)


def _with_floor(group: Queries, images: Queries) -> Queries:
    """The queries with the floor that the labelled images give for queries of this kind. For a task without classes of
    images, any other labelled image counts as one of the same class."""
    return _floored(
        group, calibrated(leave_one_out(images.embedding, images.labels, group.embedding, group.labels, group.origin))
    )


def _floored(group: Queries, floor: float | None) -> Queries:
    return replace(group, floor=np.full(len(group), np.nan if floor is None else floor, dtype=np.float32))


def _texts(inputs: QueryInputs, runtime: Runtime) -> Queries:
    spec, plan = inputs.encoder, runtime.plan
    if not spec.has_text:
        raise KtrayError(
            f"transfer.queries={inputs.transfer.queries} needs a text tower, and teacher '{spec.source.name}' has none",
            "Set transfer.queries=images, or set teacher.name to an open_clip model.",
        )
    weight = run_with_retries(
        partial(_text_weight, spec, inputs.names, inputs.prompts),
        "the task that embeds the class names",
        "Choose a smaller teacher, or use machines with more memory.",
        runtime.cluster.max_failures,
        cpus=plan.actor_cpus,
        gpus=plan.actor_gpus,
    )
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    number, uris = np.arange(len(inputs.names)), [TEXT + name for name in inputs.classes]
    if not task_kind(inputs.kind).label_sets:
        return Queries.of(unit, uris, number)
    return Queries.of(
        unit, uris, np.zeros_like(number), None, np.eye(len(number), dtype=np.uint8), np.ones(len(number))
    )


def _text_weight(spec: TeacherSpec, names: list[str], prompts: list[str]) -> np.ndarray:
    return np.asarray(text_head(spec.load(), names, prompts).weight.detach().float().cpu().numpy())


def _crops(inputs: QueryInputs, runtime: Runtime, stage: Stage, images: Queries, reporter: Reporter) -> Queries:
    crops, spec = Crops(inputs.transfer.query_crops, int(inputs.crop_count or 1)), inputs.encoder
    prepare = _Crop(crops, spec.preprocess, inputs.max_pixels)
    rows = embed_images(runtime, Stage(stage.file("query-crops")), images.uris, prepare, spec, reporter)
    number = {uri: i for i, uri in enumerate(images.uris)}
    uris = rows["uri"].astype(str).tolist()
    origin = np.array([number[whole] for whole in rows["whole"].astype(str).tolist()], dtype=np.int64)
    sets = None if images.classes is None else images.classes[origin]
    share = None if images.share is None else images.share[origin]
    return Queries.of(rows["embedding"].astype(np.float32), uris, images.labels[origin], origin, sets, share)


@dataclass(frozen=True)
class _Crop:
    crops: Crops
    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, wholes, pixels = [], [], []
        for uri, image, _ in fetch_images(item["uris"], max_pixels=self.max_pixels):
            if image is None:  # LABELS has quarantined it
                continue
            for left, top, width, height in self.crops.boxes(uri, *image.shape[:2]):
                cut = np.ascontiguousarray(image[top : top + height, left : left + width])
                uris.append(str(ImageRef.parse(uri).crop((left, top, width, height))))
                wholes.append(uri)
                pixels.append(self.preprocess.eval_transform(cut))
        empty = np.zeros((0, 3, *self.preprocess.size), np.uint8)
        return {
            "uri": np.array(uris, dtype=str),
            "whole": np.array(wholes, dtype=str),
            "pixels": np.stack(pixels) if pixels else empty,
        }
