"""Labelled images at the student's input, prepared twice: by ktray, and by the code that is shipped with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ktray.accounting.device import usable_cpus
from ktray.data.labelled.decode import DecodedExample, LabelReader, NumberReader
from ktray.data.labelled.labelled_set import LabelledExample
from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.errors import BadImage, KtrayError
from ktray.jobs.export import predict
from ktray.reporting.progress import Progress
from ktray.storage.columns import Rows

BATCH = 64


@dataclass(frozen=True)
class Batch:
    """Up to `BATCH` images: pixels (N, 3, height, width) uint8 by ktray and by `predict`, and the columns of the task
    kind's reader."""

    pixels: np.ndarray
    shipped: np.ndarray
    columns: Rows

    @property
    def labels(self) -> np.ndarray:
        """The column ``label``."""
        return self.columns["label"]


@dataclass(frozen=True)
class HeldImages:
    """All images of a split: pixels (N, 3, height, width) uint8 from `predict`, memory-mapped, and the columns of the
    reader for each `BATCH` of them."""

    pixels: np.ndarray
    columns: list[Rows]

    def batches(self) -> Iterator[tuple[np.ndarray, Rows]]:
        """Yield pixels and columns of each batch."""
        at = 0
        for columns in self.columns:
            count = len(columns["label"])
            yield self.pixels[at : at + count], columns
            at += count


@dataclass
class Split:
    """The images of one split. They are read again for each call.

    Attributes:
        name: name of the split, for progress lines and errors.
        reader: reads the labels.
        unusable: number of images that cannot be used, after the images were read.
    """

    name: str
    examples: Sequence[LabelledExample]
    preprocess: Preprocess
    max_pixels: int
    reader: LabelReader = field(default_factory=NumberReader)
    unusable: int = field(default=0, init=False)

    def batches(self) -> Iterator[Batch]:
        """Yield all usable images, in order.

        Raises:
            KtrayError: no image can be used.
        """
        self.unusable = 0
        done = 0
        facts = self.preprocess.to_dict()

        def prepare(
            item: tuple[LabelledExample, tuple[str, bytes | None, str | None]],
        ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
            example, (uri, data, error) = item
            try:
                image = decode_image(uri, data, error, max_pixels=self.max_pixels)
            except BadImage:
                return None
            assert data is not None
            decoded = DecodedExample(uri, example.label, image)
            if example.mask:
                # The reader knows how masks are read, and checks them against the image.
                (decoded,) = self.reader.read([(uri, example.label, example.mask)], self.max_pixels)
                if decoded.image is None:
                    return None
            ours, shipped = self.preprocess.eval_transform(image), predict.geometry(predict.decode(data), facts)
            return ours, shipped, self.reader.label(decoded, {})

        with ThreadPoolExecutor(usable_cpus()) as pool, Progress(f"export {self.name}", len(self.examples)) as progress:
            for at in range(0, len(self.examples), BATCH):
                part = self.examples[at : at + BATCH]
                prepared = list(pool.map(prepare, zip(part, fetch([e.uri for e in part]), strict=True)))
                usable = [row for row in prepared if row is not None]
                self.unusable += len(prepared) - len(usable)
                progress.update(at + len(part))
                if usable:
                    done += len(usable)
                    ours, shipped, labels = zip(*usable, strict=True)
                    yield Batch(np.stack(ours), np.stack(shipped), self.reader.columns(labels, {}))
        if not done:
            raise KtrayError(
                f"No image of the {self.name} split can be used",
                "If the images have moved, set task.data to their new location.",
            )

    def held(self, place: Path) -> HeldImages:
        """Return all images at once, with pixels in a file at ``place``."""
        pixels = np.lib.format.open_memmap(place, "w+", np.uint8, (len(self.examples), 3, *self.preprocess.size))
        columns: list[Rows] = []
        count = 0
        for batch in self.batches():
            pixels[count : count + len(batch.labels)] = batch.shipped
            columns.append(batch.columns)
            count += len(batch.labels)
        return HeldImages(pixels[:count], columns)
