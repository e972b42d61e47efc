"""Decode images and cut their views: the part of TEACH that runs on CPUs, before the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.data.views import VIEW_LENGTH, View, ViewPolicy, make_view, render
from ktray.errors import BadImage, KtrayError
from ktray.storage.columns import Rows


@dataclass(frozen=True)
class MakeViews:
    """Decodes images and cuts ``views`` views of ``size`` pixels from each. With ``canvas``, the only view is the whole
    image in the geometry of that preprocessing."""

    policy: ViewPolicy
    views: int
    seed: int
    size: int
    max_pixels: int
    canvas: Preprocess | None

    @property
    def per_image(self) -> int:
        """Number of rows (views) per image."""
        return 1 if self.canvas else self.views

    def __call__(self, item: dict[str, Any]) -> Rows:
        """Cut all views of the usable images of an item. The views of an image are consecutive rows.

        Args:
            item: ``uris``, and ``beside``: the name of a column, such as ``text`` or ``label``, to one value per uri.

        Returns:
            ``uri``, ``view_index`` (n,) int32, ``view_id`` (n,) int64, ``view`` (n, `VIEW_LENGTH`) int32, ``pixels``
            (n, 3, H, W) uint8, the columns of ``beside``, and ``bad``: (uri, reason) of each image that cannot be used.
        """
        return self._cut(item, range(len(item["uris"])))

    def some(self, item: dict[str, Any], start: int, step: int) -> Rows:
        """The views of the images ``start::step`` of an item.

        The rows of an image that cannot be used are replaced by copies of those of another image, so that the number of
        rows is as expected.

        Raises:
            KtrayError: none of the images can be used.
        """
        wanted = range(start, len(item["uris"]), step)
        rows = self._cut(item, wanted)
        count, bad = len(rows["pixels"]), rows.pop("bad")
        if count == len(wanted) * self.per_image:
            return {**rows, "bad": bad}
        if not count:
            raise KtrayError(
                f"None of {len(wanted)} images can be used; the first one is '{bad[0][0]}': {bad[0][1]}",
                "CURATE could read these images: check whether they were moved or deleted.",
            )
        full = len(wanted) * self.per_image
        return {**{name: np.resize(v, (full, *v.shape[1:])) for name, v in rows.items()}, "bad": bad}

    def _cut(self, item: dict[str, Any], numbers: Sequence[int]) -> Rows:
        uris: list[str] = []
        indices: list[int] = []
        records: list[View] = []
        height, width = self.canvas.size if self.canvas else (self.size, self.size)
        pixels = np.empty((len(numbers) * self.per_image, 3, height, width), np.uint8)
        bad: list[tuple[str, str]] = []
        image_number: list[int] = []
        images = fetch([item["uris"][number] for number in numbers])
        for number, (uri, data, error) in zip(numbers, images, strict=True):
            try:
                views_of_image = self.views_of(uri, data, error, pixels[len(uris) :])
            except BadImage as reason:
                bad.append((uri, reason.reason))
                continue
            records += views_of_image
            uris += [uri] * len(views_of_image)
            indices += range(len(views_of_image))
            image_number += [number] * len(views_of_image)
        rows = {
            "uri": np.array(uris, dtype=str),
            "view_index": np.array(indices, dtype=np.int32),
            "view_id": np.array([_view_id(*pair) for pair in zip(uris, indices, strict=True)], dtype=np.int64),
            "view": np.array(records, dtype=np.int32) if records else np.zeros((0, VIEW_LENGTH), np.int32),
            "pixels": pixels[: len(uris)],
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }
        for name, values in item["beside"].items():
            values_per_row = np.array(values, dtype=np.int64).reshape(len(values), -1)[
                np.array(image_number, dtype=np.int64)
            ]
            rows[name] = values_per_row.astype(np.int32) if name == "text" else values_per_row[:, 0]
        return rows

    def views_of(self, uri: str, data: bytes | None, error: str | None, out: np.ndarray) -> list[View]:
        """The views of one image. The image is decoded at the lowest sufficient resolution.

        Args:
            uri: where the image is.
            data, error: the encoded image, or why it could not be read.
            out: (at least `per_image`, 3, H, W) uint8. The pixels are written to its first rows. If the image
                cannot be used, the content of these rows is undefined.

        Raises:
            BadImage: the image cannot be used.
        """
        if self.canvas:
            image = decode_image(uri, data, error, max_pixels=self.max_pixels)
            out[0] = self.canvas.eval_transform(image)
            return [View(0, 0, image.shape[1], image.shape[0])]
        whole: tuple[int, int] = (0, 0)
        views: list[View] = []

        def enough(height: int, width: int) -> float:
            nonlocal whole
            whole = height, width
            views[:] = [make_view(self.policy, uri, i, self.seed, height, width) for i in range(self.views)]
            return min(min(view.width, view.height) for view in views) / self.size

        image = decode_image(uri, data, error, max_pixels=self.max_pixels, enough=enough)
        for view, target in zip(views, out, strict=False):
            render(image, view, self.size, whole, target)
        return views


def _view_id(uri: str, index: int) -> int:
    digest = hashlib.blake2b(f"{index}\0{uri}".encode("utf-8", "surrogatepass"), digest_size=8, person=b"ktray.id")
    return int.from_bytes(digest.digest(), "little", signed=True)
