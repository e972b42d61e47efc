"""What is looked for in the gallery: the labelled images, parts of them, and the classes' names.

Text and images lie apart in the space of CLIP-like teachers: a name's nearest images have a far lower cosine than a
picture's. Strategies that give each query its share do not mind; ``best_first`` would take what the images
find and nothing of the texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.data.sources.uris import ImageRef
from ktray.distributed.ray_data import Item
from ktray.errors import BadImage, KtrayError
from ktray.models.teacher.heads import text_head
from ktray.models.teacher.spec import TeacherSpec
from ktray.recipe.schema import TransferConfig
from ktray.retrieval.crops import Crops
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
    """``embedding`` (Q, D) float32 of unit length; ``uris`` name them: an image, a crop, ``text:NAME`` for a class's
    prompts, ``class:NAME`` for the mean of a class's queries; ``labels`` (Q,) their classes."""

    embedding: np.ndarray
    uris: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.uris)


@dataclass(frozen=True)
class QueryInputs:
    """What the queries are made of; a part of CURATE's inputs.

    Attributes:
        adapt: holds the embeddings of the labelled images.
        encoder: the frozen teacher.
        kind: of the task.
        classes, names: of the task; ``names`` as text.
        crop_count: crops of a labelled image; None where there are none.
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


def queries(asked: QueryInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> Queries:
    """The queries of the recipe.

    Raises:
        KtrayError: text queries for a teacher without a text tower, or classes of images that have none.
    """
    part = asked.transfer
    found = []
    if part.queries != "text":
        images = Queries(*adapt_stage.train_embeddings(asked.adapt))
        found.append(images)
        if part.query_crops != "none":
            found.append(_crops(asked, runtime, stage, images, reporter))
    if part.queries != "images":
        found.append(_texts(asked))
    every = Queries(
        np.concatenate([q.embedding for q in found]),
        [uri for q in found for uri in q.uris],
        np.concatenate([q.labels for q in found]),
    )
    if part.per == "query":
        return every
    if not task_kind(asked.kind).image_classes and part.queries != "text":
        raise KtrayError(
            f"transfer.per=class, and an image of task.kind={asked.kind} has no one class", "Set transfer.per=query."
        )
    present = np.unique(every.labels)
    mean = np.stack([every.embedding[every.labels == label].mean(0) for label in present])
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return Queries(mean, [MEAN + asked.classes[label] for label in present.tolist()], present)


def _texts(asked: QueryInputs) -> Queries:
    spec = asked.encoder
    if not spec.has_text:
        raise KtrayError(
            f"transfer.queries={asked.transfer.queries}, and teacher '{spec.source.name}' has no text tower",
            "Set transfer.queries=images, or name an open_clip teacher.",
        )
    weight = text_head(spec.load(), asked.names, asked.prompts).weight.detach().float().cpu().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return Queries(unit, [TEXT + name for name in asked.classes], np.arange(len(asked.names)))


def _crops(asked: QueryInputs, runtime: Runtime, stage: Stage, images: Queries, reporter: Reporter) -> Queries:
    crops, spec = Crops(asked.transfer.query_crops, int(asked.crop_count or 1)), asked.encoder
    prepare = _Crop(crops, spec.preprocess, asked.max_pixels)
    rows = embed_images(runtime, Stage(stage.file("query-crops")), images.uris, prepare, spec, reporter)
    label = dict(zip(images.uris, images.labels.tolist(), strict=True))
    uris = rows["uri"].astype(str).tolist()
    labels = np.array([label[whole] for whole in rows["whole"].astype(str).tolist()], dtype=np.int64)
    return Queries(rows["embedding"].astype(np.float32), uris, labels)


@dataclass(frozen=True)
class _Crop:
    crops: Crops
    preprocess: Preprocess
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, wholes, pixels = [], [], []
        for uri, data, error in fetch(item["uris"]):
            try:
                image = decode_image(uri, data, error, max_pixels=self.max_pixels)
            except BadImage:  # LABELS has quarantined it
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
