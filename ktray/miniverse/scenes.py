"""Scenes: images of the miniverse with several subjects, each in a cell of its own.

As in `ktray.miniverse.world`, a scene is a pure function of (seed, stream, index).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktray.miniverse.vocabulary import BACKGROUND_SHARES, BACKGROUNDS, COLOURS, SCENE_SHAPES, SOLID, SUBJECTS, Subject
from ktray.miniverse.world import (
    EYE,
    MIN_CONTRAST,
    Pixels,
    Uniform,
    background,
    camera,
    in_frame,
    pick,
    shade_of,
    subject_mask,
    two_colours,
)

SIDE = 64
# A scene has two by two cells, so that a subject has the size that it has in the other images of the miniverse.
CELL = 32
# Share of each kind of subject. In the labelled streams, the shapes are those of `SCENE_SHAPES`, and one of seven
# scenes has no shape, so that its set of classes is empty.
_LABELLED = {"shape": 0.70, "capital": 0.10, "digit": 0.10, "sign": 0.10}
STREAMS: dict[str, dict[str, float]] = {
    "scenes-train": _LABELLED,
    "scenes-val": _LABELLED,
    "scenes-test": _LABELLED,
    "scenes-gallery": {"capital": 0.18, "small": 0.18, "digit": 0.14, "sign": 0.14, "text": 0.06, "shape": 0.30},
}
# Shares of scenes with one, two and three subjects.
_NUMBERS = {"1": 0.35, "2": 0.45, "3": 0.20}
_ATTEMPTS = 12


@dataclass(frozen=True)
class Scene:
    """One image with several subjects.

    Attributes:
        image: uint8 array [64, 64, 3], RGB.
        subjects: what is in the cells; a subject may occur twice.
        caption: names the subjects.
    """

    image: NDArray[np.uint8]
    subjects: tuple[Subject, ...]
    caption: str


def scene(stream: str, index: int, *, seed: int = 0) -> Scene:
    """Draw scene number `index` of a stream.

    Args:
        stream: a key of `STREAMS`.
        index: 0 or more.
        seed: seed of the whole world.
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(stream.encode()), index]))
    uniform: Uniform = iter(rng.random(256).tolist()).__next__
    _, _, paper = two_colours(uniform, None)
    canvas = background(pick(BACKGROUNDS, BACKGROUND_SHARES, uniform()), paper, SIDE, uniform, rng)
    number = int(pick(tuple(_NUMBERS), tuple(_NUMBERS.values()), uniform()))
    order = sorted(range((SIDE // CELL) ** 2), key=lambda _: uniform())
    subjects = []
    for cell in order[:number]:
        subject = _subject(stream, uniform)
        rows, columns = (slice(at * CELL, (at + 1) * CELL) for at in divmod(cell, SIDE // CELL))
        cover = in_frame(subject_mask(subject, SOLID, CELL, uniform), subject, CELL, uniform)
        canvas[rows, columns] += cover * (_ink(paper, uniform) - canvas[rows, columns])
        subjects.append(subject)
    names = sorted({subject.name for subject in subjects})
    return Scene(camera(canvas, uniform, rng), tuple(subjects), " and ".join(f"the {name}" for name in names))


def _subject(stream: str, uniform: Uniform) -> Subject:
    mix = STREAMS[stream]
    kind = pick(tuple(mix), tuple(mix.values()), uniform())
    choices = SUBJECTS[kind]
    if kind == "shape" and mix is _LABELLED:
        choices = tuple(shape for shape in choices if shape.token in SCENE_SHAPES)
    return choices[int(uniform() * len(choices))]


def _ink(paper: Pixels, uniform: Uniform) -> Pixels:
    """A colour that can be seen on the paper."""
    for _ in range(_ATTEMPTS):
        ink = shade_of(int(uniform() * len(COLOURS)), uniform)
        if float(np.linalg.norm((ink - paper) * EYE)) >= MIN_CONTRAST:
            return ink
    return np.full(3, 0.0 if float(paper.mean()) > 127 else 255.0, dtype=np.float32)
