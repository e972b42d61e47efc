"""The drawing of the miniverse: sample number `index` of a stream.

Every sample is a pure function of (seed, stream, index): its random numbers come from a generator that is seeded with
these three values. Therefore the order and the number of processes have no influence, and two streams never share a
sample.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ktray.miniverse.captions import DETAIL_SHARES, Facts, caption
from ktray.miniverse.masks import STYLES, glyph_mask, mask_size, shape_mask, text_mask
from ktray.miniverse.textures import texture_field
from ktray.miniverse.vocabulary import (
    BACKGROUND_SHARES,
    BACKGROUNDS,
    CAPITALS,
    COLOURS,
    DIGITS,
    FONTS,
    SMALL,
    STREAMS,
    SUBJECTS,
    Stream,
    Subject,
)

Pixels = NDArray[np.float32]
Uniform = Callable[[], float]

# Pixels with a coverage between these values are neither subject nor background in a mask.
UNCERTAIN = (0.25, 0.75)
IGNORE = 255
# A subject must differ from its background by this much in luminance or hue (0..255, Euclidean in RGB with the weights
# of the eye). Otherwise it would be unreadable.
MIN_CONTRAST = 62.0
EYE = np.array([0.55, 1.0, 0.40], dtype=np.float32)
_NAMES = tuple(COLOURS)
_RGB = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)


@dataclass(frozen=True)
class Sample:
    """One image of the miniverse.

    Attributes:
        image: uint8 array [size, size, 3], RGB.
        subject: the subject of the image.
        facts: all facts about the image; `told` contains those that its caption mentions.
        caption: the caption.
        index: its number in its stream.
        mask: uint8 array [size, size]: 1 for pixels of the subject, 0 for the background, 255 for pixels at the edge,
            which the subject covers partly. All 1 for a texture, which fills the frame.
    """

    image: NDArray[np.uint8]
    subject: Subject
    facts: Facts
    told: Facts
    caption: str
    index: int
    mask: NDArray[np.uint8]


def sample(stream: str, index: int, *, size: int = 32, seed: int = 0) -> Sample:
    """Draw sample number `index` of a stream.

    Args:
        stream: a key of `vocabulary.STREAMS`.
        index: 0 or more.
        size: side of the image in pixels, 32 to 64.
        seed: seed of the whole world; other seeds give other worlds of the same type.
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(stream.encode()), index]))
    # One call for all the scalars of an image, because the cost depends on the number of calls.
    uniform: Uniform = iter(rng.random(96).tolist()).__next__
    plan = STREAMS[stream]
    subject = _subject(plan, index, uniform)
    detail = pick(tuple(DETAIL_SHARES), tuple(DETAIL_SHARES.values()), uniform())
    pixels, cover, facts = _picture(subject, plan, index, size, uniform, rng)
    image = camera(pixels, uniform, rng)
    told = facts.told(detail)
    return Sample(image, subject, facts, told, caption(told), index, _labelled(cover))


def _labelled(cover: Pixels) -> NDArray[np.uint8]:
    """A mask from the coverage [size, size, 1]. The blur of the camera is not included, because it moves no edges."""
    least, most = UNCERTAIN
    share = cover[..., 0]
    return np.where(share > most, 1, np.where(share < least, 0, IGNORE)).astype(np.uint8)


def pick(values: tuple[str, ...], shares: tuple[float, ...], u: float) -> str:
    for value, share in zip(values, shares, strict=True):
        u -= share
        if u < 0:
            return value
    return values[-1]


def _subject(plan: Stream, index: int, uniform: Uniform) -> Subject:
    kind = pick(tuple(plan.mix), tuple(plan.mix.values()), uniform())
    choices = SUBJECTS[kind]
    if plan.tokens:
        choices = tuple(subject for subject in choices if subject.token in plan.tokens)
    drawn = int(uniform() * len(choices))
    return choices[index % len(choices) if plan.balanced else drawn]


def shade_of(number: int, uniform: Uniform) -> Pixels:
    """A shade of a named colour: all channels are shifted together, and each channel separately."""
    brightness = 40 * (uniform() - 0.5)
    shifts = [brightness + 28 * (uniform() - 0.5) for _ in range(3)]
    return np.clip(_RGB[number] + np.array(shifts, dtype=np.float32), 0, 255)


def two_colours(uniform: Uniform, requested: int | None) -> tuple[int, Pixels, Pixels]:
    """Number and shade of the subject's colour (the requested one, if any), and a different background colour."""
    drawn = int(uniform() * len(_NAMES))
    number = drawn if requested is None else requested
    ink = shade_of(number, uniform)
    paper = shade_of((number + 1 + int(uniform() * (len(_NAMES) - 1))) % len(_NAMES), uniform)
    gap = float(np.linalg.norm((ink - paper) * EYE))
    if gap < MIN_CONTRAST:
        # Shift the background along the grey axis, in the direction with more room.
        target = 0.0 if float(ink.mean()) > 127 else 255.0
        paper = paper + (target - paper) * min(1.0, (MIN_CONTRAST - gap) / 110 + 0.35)
    return number, ink, paper.astype(np.float32)


def background(kind: str, paper: Pixels, size: int, uniform: Uniform, rng: np.random.Generator) -> Pixels:
    """A float32 image [size, size, 3] with the main colour `paper`."""
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = paper
    if kind == "plain":
        return canvas
    if kind == "noisy":
        grain = 8 + 14 * uniform()
        return canvas + rng.standard_normal((size, size, 1), dtype=np.float32) * grain
    if kind == "cluttered":
        return _clutter(paper, size, uniform)
    field = {"shaded": "shade", "striped": "stripes", "checked": "checks"}[kind]
    depth = (50 if kind == "shaded" else 26) * (0.6 + 0.8 * uniform())
    tint = np.array([uniform() + 0.4 for _ in range(3)], dtype=np.float32) * depth
    return canvas + (texture_field(field, size, uniform, rng) - 0.5)[..., None] * tint


def _clutter(paper: Pixels, size: int, uniform: Uniform) -> Pixels:
    """Faint ellipses, boxes and lines behind the subject."""
    image = Image.new("RGB", (size, size), _rgb(paper))
    draw = ImageDraw.Draw(image)
    for _ in range(2 + int(3 * uniform())):
        move = [44 * (uniform() - 0.5) for _ in range(3)]
        fill = _rgb(np.clip(paper + np.array(move, dtype=np.float32), 0, 255))
        x, y = uniform() * size, uniform() * size
        dx, dy = (0.15 + 0.35 * uniform()) * size, (0.15 + 0.35 * uniform()) * size
        form = uniform()
        if form < 0.4:
            draw.ellipse((x - dx, y - dy, x + dx, y + dy), fill=fill)
        elif form < 0.7:
            draw.rectangle((x - dx, y - dy, x + dx, y + dy), fill=fill)
        else:
            draw.line((x - 2 * dx, y - 2 * dy, x + 2 * dx, y + 2 * dy), fill=fill, width=max(1, size // 16))
    return np.asarray(image, dtype=np.float32)


def _rgb(colour: Pixels) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in np.clip(colour, 0, 255))
    return red, green, blue


def subject_mask(subject: Subject, styles: tuple[float, ...], size: int, uniform: Uniform) -> Image.Image:
    side = mask_size(size)
    style = pick(STYLES, styles, uniform())
    font = int(uniform() * len(FONTS))
    if subject.kind == "shape":
        return shape_mask(subject.token, style, side)
    if subject.kind == "text":
        letters = CAPITALS + DIGITS + SMALL
        length = 3 + int(3 * uniform())
        return text_mask("".join(letters[int(uniform() * len(letters))] for _ in range(length)), font, side)
    return glyph_mask(subject.token, font, style, side)


def in_frame(mask: Image.Image, subject: Subject, size: int, uniform: Uniform) -> Pixels:
    """Rotate, shear, scale and shift a mask into the frame: float32 [size, size, 1], 0..1."""
    side = mask.size[0]
    turn = math.radians(50 * (uniform() - 0.5))
    shear = 0.5 * (uniform() - 0.5)
    # 0.58 to 1.02 of the frame; a line of text needs the width.
    scale = (0.9 if subject.kind == "text" else 0.58 + 0.44 * uniform()) * size / side
    wide = 0.82 + 0.36 * uniform()
    slack = max(0.0, 1.0 - scale * side / size) * size * 0.9 + 0.06 * size
    to_x = size / 2 + slack * (uniform() - 0.5)
    to_y = size / 2 + slack * (uniform() - 0.5)
    cos, sin = math.cos(turn), math.sin(turn)
    # PIL needs the map from output to input: the inverse of rotate(shear(scale(.))).
    a, b = scale * wide * cos, scale * (shear * cos - sin)
    c, d = scale * wide * sin, scale * (shear * sin + cos)
    det = a * d - b * c
    ia, ib, ic, id_ = d / det, -b / det, -c / det, a / det
    data = (
        ia,
        ib,
        side / 2 - ia * to_x - ib * to_y,
        ic,
        id_,
        side / 2 - ic * to_x - id_ * to_y,
    )
    placed = mask.transform((size, size), Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR)
    return np.asarray(placed, dtype=np.float32)[..., None] * np.float32(1 / 255)


def _picture(
    subject: Subject, plan: Stream, index: int, size: int, uniform: Uniform, rng: np.random.Generator
) -> tuple[Pixels, Pixels, Facts]:
    """The image [size, size, 3], the coverage of the subject [size, size, 1] in 0..1, and the facts of the image."""
    number, ink, paper = two_colours(uniform, index % len(_NAMES) if plan.colours else None)
    if subject.kind == "texture":
        field = texture_field(subject.token, size, uniform, rng)[..., None]
        return paper + field * (ink - paper), np.ones_like(field), Facts(subject.name, _NAMES[number])
    kind = pick(BACKGROUNDS, BACKGROUND_SHARES, uniform())
    canvas = background(kind, paper, size, uniform, rng)
    ink_map: Pixels = ink
    if uniform() < 0.2:  # the colour changes across the subject
        ramp = (texture_field("shade", size, uniform, rng) - 0.5)[..., None]
        ink_map = ink + ramp * np.float32(70)
    cover = in_frame(subject_mask(subject, plan.styles, size, uniform), subject, size, uniform)
    return canvas + cover * (ink_map - canvas), cover, Facts(subject.name, _NAMES[number], kind)


def camera(pixels: Pixels, uniform: Uniform, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Simulate a cheap camera: a scratch, exposure, blur and sensor noise."""
    size = pixels.shape[0]
    exposure = 1 + 0.3 * (uniform() - 0.5)
    scratched, blurred, noisy = uniform() < 0.12, uniform() < 0.45, uniform() < 0.5
    radius, sigma = 0.3 + 0.7 * uniform(), 3 + 13 * uniform()
    pixels = 127 + (pixels - 127) * np.float32(exposure)
    if noisy:
        pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(sigma)
    image = np.clip(pixels, 0, 255).astype(np.uint8)
    if not (scratched or blurred):
        return image
    picture = Image.fromarray(image)
    if scratched:
        ends = [uniform() * size for _ in range(4)]
        fill = _rgb(255 * np.array([uniform(), uniform(), uniform()], dtype=np.float32))
        ImageDraw.Draw(picture).line(ends, fill=fill, width=max(1, size // 32))
    if blurred:
        picture = picture.filter(ImageFilter.GaussianBlur(radius * size / 32))
    return np.array(picture)
