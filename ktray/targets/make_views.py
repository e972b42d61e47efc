"""Images to the pixels of their views, with what goes along with each: the reading half of TEACH."""

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
    """Decode images and cut ``views`` views of ``size`` pixels of each; with ``canvas`` one whole image in its
    geometry."""

    policy: ViewPolicy
    views: int
    seed: int
    size: int
    max_pixels: int
    canvas: Preprocess | None

    @property
    def per_image(self) -> int:
        """Rows that an image has."""
        return 1 if self.canvas else self.views

    def __call__(self, item: dict[str, Any]) -> Rows:
        """Views of all usable images of an item, the views of an image one after the other.

        Args:
            item: ``uris``, and ``beside``: name -> a value for each of them, such as ``text`` or ``label``.

        Returns:
            ``uri``, ``view_index`` (n,) int32, ``view_id`` (n,) int64, ``view`` (n, `VIEW_LENGTH`) int32, ``pixels``
            (n, 3, H, W) uint8, the columns of ``beside``, and ``bad``: (uri, reason) of what cannot be used.
        """
        return self._cut(item, [(number, range(self.per_image)) for number in range(len(item["uris"]))])

    def some(self, item: dict[str, Any], start: int, step: int) -> Rows:
        """Rows ``start::step`` of what an item of whole images gives, and only these are cut. A row of an image that
        cannot be used holds another row's content, so that there are as many as were asked for.

        Raises:
            KtrayError: none of the images can be used.
        """
        wanted = range(start, len(item["uris"]) * self.per_image, step)
        by_image: dict[int, list[int]] = {}
        for row in wanted:
            by_image.setdefault(row // self.per_image, []).append(row % self.per_image)
        found = self._cut(item, list(by_image.items()))
        got, bad = len(found["pixels"]), found.pop("bad")
        if got == len(wanted):
            return {**found, "bad": bad}
        if not got:
            raise KtrayError(
                f"None of {len(by_image)} images can be used; '{bad[0][0]}': {bad[0][1]}",
                "They could when they were chosen: check whether they have moved.",
            )
        return {**{name: np.resize(v, (len(wanted), *v.shape[1:])) for name, v in found.items()}, "bad": bad}

    def _cut(self, item: dict[str, Any], wanted: list[tuple[int, Any]]) -> Rows:
        uris: list[str] = []
        indices: list[int] = []
        records: list[View] = []
        height, width = self.canvas.size if self.canvas else (self.size, self.size)
        pixels = np.empty((sum(len(views) for _, views in wanted), 3, height, width), np.uint8)
        bad: list[tuple[str, str]] = []
        beside: list[int] = []
        images = fetch([item["uris"][number] for number, _ in wanted])
        for (number, views), (uri, data, error) in zip(wanted, images, strict=True):
            try:
                made = self.views_of(uri, data, error, views, pixels[len(uris) :])
            except BadImage as reason:
                bad.append((uri, reason.reason))
                continue
            records += made
            uris += [uri] * len(made)
            indices += views
            beside += [number] * len(made)
        found = {
            "uri": np.array(uris, dtype=str),
            "view_index": np.array(indices, dtype=np.int32),
            "view_id": np.array([_view_id(*pair) for pair in zip(uris, indices, strict=True)], dtype=np.int64),
            "view": np.array(records, dtype=np.int32) if records else np.zeros((0, VIEW_LENGTH), np.int32),
            "pixels": pixels[: len(uris)],
            "bad": np.array(bad, dtype=str).reshape(-1, 2),
        }
        for name, values in item["beside"].items():
            column = np.array(values, dtype=np.int64).reshape(len(values), -1)[np.array(beside, dtype=np.int64)]
            found[name] = column.astype(np.int32) if name == "text" else column[:, 0]
        return found

    def views_of(
        self, uri: str, data: bytes | None, error: str | None, wanted: Sequence[int], out: np.ndarray
    ) -> list[View]:
        """The wanted views of one image, from an image decoded no larger than they need.

        Args:
            out: (at least as many as wanted, 3, H, W) uint8: their pixels are written to its first rows. What an image
                that cannot be used leaves there is of no meaning.
        """
        if self.canvas:
            image = decode_image(uri, data, error, max_pixels=self.max_pixels)
            out[0] = self.canvas.eval_transform(image)
            return [View(0, 0, image.shape[1], image.shape[0])]
        whole: tuple[int, int] = (0, 0)
        # All views of an image, not the wanted ones alone, decide how small it is decoded: so each has the same
        # pixels whichever others are asked for.
        views: list[View] = []

        def enough(height: int, width: int) -> float:
            nonlocal whole
            whole = height, width
            views[:] = [make_view(self.policy, uri, i, self.seed, height, width) for i in range(self.views)]
            return min(min(view.width, view.height) for view in views) / self.size

        image = decode_image(uri, data, error, max_pixels=self.max_pixels, enough=enough)
        chosen = [views[i] for i in wanted]
        for view, place in zip(chosen, out, strict=False):
            render(image, view, self.size, whole, place)
        return chosen


def _view_id(uri: str, index: int) -> int:
    digest = hashlib.blake2b(f"{index}\0{uri}".encode("utf-8", "surrogatepass"), digest_size=8, person=b"ktray.id")
    return int.from_bytes(digest.digest(), "little", signed=True)
