"""Labelled images in memory: fetched, decoded and transformed for the models, with their labels as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ktray.data.labelled.masks import check_mask, decode_mask, eval_mask
from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import decode_image, fetch, fetch_images
from ktray.errors import BadImage

Rows = dict[str, np.ndarray]
Example = tuple[str, Any, str]  # uri, label, mask, as in `ktray.data.labelled.labelled_set.LabelledExample`
Transforms = Mapping[str, Preprocess]


@dataclass(frozen=True)
class DecodedExample:
    """A labelled image.

    Attributes:
        uri: where the image is.
        label: as in `ktray.data.labelled.labelled_set.LabelledExample`.
        image: (H, W, 3) uint8; None if the image cannot be used.
        mask: label map (H, W) uint8, if it has one.
        reason: why the image cannot be used, or empty.
    """

    uri: str
    label: Any
    image: np.ndarray | None
    mask: np.ndarray | None = None
    reason: str = ""


class LabelReader(Protocol):
    """Reads the labels of a task and stores them as columns. It is picklable."""

    def read(self, examples: Sequence[Example], max_pixels: int) -> Iterator[DecodedExample]:
        """Read every example, in order."""
        ...

    def label(self, example: DecodedExample, transforms: Transforms) -> dict[str, Any]:
        """The label of one usable image as values by column; `columns` makes arrays of them."""
        ...

    def columns(self, labels: Sequence[dict[str, Any]], transforms: Transforms) -> Rows:
        """The results of `label` for N images as arrays; N may be 0."""
        ...


@dataclass(frozen=True)
class NumberReader:
    """Labels that are one number per image, in the column ``label``: the index of a class, or a quantity.

    Attributes:
        dtype: dtype of the column.
    """

    dtype: str = "int64"

    def read(self, examples: Sequence[Example], max_pixels: int) -> Iterator[DecodedExample]:
        images = fetch_images([uri for uri, _, _ in examples], max_pixels=max_pixels)
        for (uri, label, _), (_, image, reason) in zip(examples, images, strict=True):
            yield DecodedExample(uri, label, image, reason=reason)

    def label(self, example: DecodedExample, transforms: Transforms) -> dict[str, Any]:
        return {"label": example.label}

    def columns(self, labels: Sequence[dict[str, Any]], transforms: Transforms) -> Rows:
        return {"label": np.array([row["label"] for row in labels], dtype=self.dtype)}


@dataclass(frozen=True)
class SetReader(NumberReader):
    """Labels that are a set of classes per image: the column ``label`` (N, C) uint8, 1 for each class of the set.

    Attributes:
        num_classes: C.
    """

    dtype: str = "uint8"
    num_classes: int = 0

    def columns(self, labels: Sequence[dict[str, Any]], transforms: Transforms) -> Rows:
        label = np.zeros((len(labels), self.num_classes), dtype=self.dtype)
        for row, values in zip(label, labels, strict=True):
            row[list(values["label"])] = 1
        return {"label": label}


@dataclass(frozen=True)
class MaskReader:
    """Labels that are a class for every pixel: ``<transform>_mask`` (N, H, W) uint8 in the geometry of each transform,
    and ``label`` (N,) int64, which is 0.

    Attributes:
        num_classes: number of classes of the task.
        offset: value of class 0 in the file; see `ktray.data.labelled.masks.decode_mask`.
        whole: masks keep their own size instead of the transforms': ``mask`` contains the flattened masks of all
            images in sequence, and ``shape`` (N, 2) their sizes.
    """

    num_classes: int
    offset: int
    whole: bool = False

    def read(self, examples: Sequence[Example], max_pixels: int) -> Iterator[DecodedExample]:
        images = fetch([uri for uri, _, _ in examples])
        masks = fetch([mask for _, _, mask in examples])
        for (uri, label, _), (_, data, error), (_, map_data, map_error) in zip(examples, images, masks, strict=True):
            try:
                image = decode_image(uri, data, error, max_pixels=max_pixels)
                if map_data is None:
                    raise BadImage(f"the mask cannot be used: {map_error or 'it cannot be read'}")
                mask = decode_mask(map_data, self.num_classes, offset=self.offset, max_pixels=max_pixels)
                check_mask(image, mask)
            except BadImage as reason:
                yield DecodedExample(uri, label, None, reason=reason.reason)
                continue
            yield DecodedExample(uri, label, image, mask)

    def label(self, example: DecodedExample, transforms: Transforms) -> dict[str, Any]:
        assert example.mask is not None  # the image is usable
        if self.whole:
            return {"label": example.label, "mask": example.mask.ravel(), "shape": example.mask.shape}
        masks = {f"{name}_mask": eval_mask(transform, example.mask) for name, transform in transforms.items()}
        return {"label": example.label, **masks}

    def columns(self, labels: Sequence[dict[str, Any]], transforms: Transforms) -> Rows:
        arrays: Rows = {"label": np.array([row["label"] for row in labels], dtype=np.int64)}
        if self.whole:
            flat = [row["mask"] for row in labels]
            arrays["mask"] = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
            arrays["shape"] = np.array([row["shape"] for row in labels], dtype=np.int64).reshape(-1, 2)
            return arrays
        for name, transform in transforms.items():
            masks = [row[f"{name}_mask"] for row in labels]
            arrays[f"{name}_mask"] = np.stack(masks) if masks else np.zeros((0, *transform.size), np.uint8)
        return arrays


def decode_examples(
    examples: Sequence[Example], max_pixels: int, transforms: Transforms, reader: LabelReader
) -> tuple[Rows, list[tuple[str, str]]]:
    """Fetch, decode and transform labelled images.

    Returns:
        For the usable images the columns ``uri``, one (N, 3, H, W) uint8 column per transform, and the columns of the
        reader; for the other images (uri, reason).
    """
    uris: list[str] = []
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in transforms}
    labels: list[dict[str, Any]] = []
    bad: list[tuple[str, str]] = []
    for example in reader.read(examples, max_pixels):
        if example.image is None:
            bad.append((example.uri, example.reason))
            continue
        uris.append(example.uri)
        labels.append(reader.label(example, transforms))
        for name, transform in transforms.items():
            pixels[name].append(transform.eval_transform(example.image))
    columns: Rows = {"uri": np.array(uris, dtype=str), **reader.columns(labels, transforms)}
    for name, transform in transforms.items():
        images = pixels[name]
        columns[name] = np.stack(images) if images else np.zeros((0, 3, *transform.size), np.uint8)
    return columns, bad
