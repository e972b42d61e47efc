"""The queries of retrieval: the labelled images, crops of them, and the class names as text.

In the embedding space of CLIP-like teachers, texts and images form separate groups: the images nearest to a text have a
far lower cosine similarity than those nearest to an image. This does not matter for strategies that give each query a
share; ``best_first`` would take only images that the image queries find.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import fetch_images
from ktray.data.sources.uris import ImageRef
from ktray.distributed.ray_data import Item
from ktray.errors import KtrayError
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
    """Queries.

    Attributes:
        embedding: (Q, D) float32, of unit length.
        uris: names of the queries: an image, a crop, ``text:NAME`` for the prompts of a class, or ``class:NAME`` for
            the mean of the queries of a class.
        labels: (Q,) int64, classes of the queries.
    """

    embedding: np.ndarray
    uris: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.uris)


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
    groups = []
    if part.queries != "text":
        images = Queries(*adapt_stage.train_embeddings(inputs.adapt))
        groups.append(images)
        if part.query_crops != "none":
            groups.append(_crops(inputs, runtime, stage, images, reporter))
    if part.queries != "images":
        groups.append(_texts(inputs))
    every = Queries(
        np.concatenate([q.embedding for q in groups]),
        [uri for q in groups for uri in q.uris],
        np.concatenate([q.labels for q in groups]),
    )
    if part.per == "query":
        return every
    if not task_kind(inputs.kind).image_classes and part.queries != "text":
        raise KtrayError(
            f"transfer.per=class needs a class for each image, and images of task.kind={inputs.kind} have none",
            "Set transfer.per=query.",
        )
    present = np.unique(every.labels)
    mean = np.stack([every.embedding[every.labels == label].mean(0) for label in present])
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return Queries(mean, [MEAN + inputs.classes[label] for label in present.tolist()], present)


def _texts(inputs: QueryInputs) -> Queries:
    spec = inputs.encoder
    if not spec.has_text:
        raise KtrayError(
            f"transfer.queries={inputs.transfer.queries} needs a text tower, and teacher '{spec.source.name}' has none",
            "Set transfer.queries=images, or set teacher.name to an open_clip model.",
        )
    weight = text_head(spec.load(), inputs.names, inputs.prompts).weight.detach().float().cpu().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return Queries(unit, [TEXT + name for name in inputs.classes], np.arange(len(inputs.names)))


def _crops(inputs: QueryInputs, runtime: Runtime, stage: Stage, images: Queries, reporter: Reporter) -> Queries:
    crops, spec = Crops(inputs.transfer.query_crops, int(inputs.crop_count or 1)), inputs.encoder
    prepare = _Crop(crops, spec.preprocess, inputs.max_pixels)
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
