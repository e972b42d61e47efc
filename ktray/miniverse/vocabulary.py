"""The content of the miniverse: subjects, colours, backgrounds, and streams.

This module contains only data. A *subject* is what a caption names ("capital letter K", "five-pointed star"); each
subject has a *kind* (capital, small, digit, sign, text, shape, texture). A *stream* is a named, endless sequence of
images with its own random numbers and its own shares of kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

WORLD_VERSION = "1"
"""Changes if any image of any stream changes; it is a part of the names of generated folders."""

CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
# Small letters that are not a smaller copy of their capital: at 32 px and any scale "c" is "C".
SMALL = "abdefghmnqrt"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIGNS = {
    "&": "ampersand",
    "?": "question mark",
    "!": "exclamation mark",
    "#": "hash sign",
    "%": "percent sign",
    "@": "at sign",
    "+": "plus sign",
    "=": "equals sign",
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "pentagon",
    "hexagon",
    "cross",
    "ring",
    "arrow",
    "crescent",
    "heart",
)
TEXTURES = ("stripes", "checks", "dots", "waves", "ripples", "grid", "speckles", "clouds")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 50),
    "green": (50, 160, 70),
    "cyan": (60, 195, 205),
    "blue": (45, 85, 205),
    "purple": (130, 60, 175),
    "pink": (240, 130, 180),
    "brown": (125, 80, 45),
    "black": (22, 22, 26),
    "white": (242, 242, 240),
    "grey": (128, 130, 134),
}

BACKGROUNDS = ("plain", "shaded", "noisy", "striped", "checked", "cluttered")
BACKGROUND_SHARES = (0.28, 0.22, 0.16, 0.10, 0.08, 0.16)

# Shares of plain, heavy and outlined styles.
STYLE_SHARES = (0.80, 0.12, 0.08)

# The text fonts that matplotlib includes: those whose ASCII glyphs are letters, digits and signs.
# (cmmi10, cmsy10, cmex10, STIXSiz*, STIXNonUni* and *Display have other symbols, or none, for these characters.)
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)


@dataclass(frozen=True)
class Subject:
    """One subject that an image can show.

    Attributes:
        kind: ``capital``, ``small``, ``digit``, ``sign``, ``text``, ``shape`` or ``texture``.
        token: the glyph, or the name of the shape or texture; empty for ``text``.
        name: the noun phrase that captions and prompts use.
    """

    kind: str
    token: str
    name: str


SUBJECTS: dict[str, tuple[Subject, ...]] = {
    "capital": tuple(Subject("capital", c, f"capital letter {c}") for c in CAPITALS),
    "small": tuple(Subject("small", c, f"small letter {c}") for c in SMALL),
    "digit": tuple(Subject("digit", c, f"digit {n}") for c, n in zip(DIGITS, DIGIT_NAMES, strict=True)),
    "sign": tuple(Subject("sign", c, n) for c, n in SIGNS.items()),
    "text": (Subject("text", "", "line of text"),),
    "shape": tuple(Subject("shape", s, s) for s in SHAPES),
    "texture": tuple(Subject("texture", t, t) for t in TEXTURES),
}


@dataclass(frozen=True)
class Stream:
    """A named sequence of images.

    Attributes:
        mix: kind to share; the sum of the shares is 1.
        balanced: the subjects alternate (index modulo their number) instead of being drawn, so that every prefix of a
            labelled split is balanced. Only for streams with a single kind.
        tokens: use only subjects with these tokens; empty: all subjects.
        styles: shares of `masks.STYLES`.
        colours: the colours of subjects alternate (index modulo their number) instead of being drawn.
    """

    mix: dict[str, float]
    balanced: bool = False
    tokens: tuple[str, ...] = ()
    styles: tuple[float, float, float] = STYLE_SHARES
    colours: bool = False


# The textures that the included teacher distinguishes (zero-shot accuracy 0.76; with all eight textures 0.50).
KNOWN_TEXTURES = ("stripes", "checks", "ripples", "speckles", "clouds")
_THINGS = {"capital": 0.2, "small": 0.2, "digit": 0.15, "sign": 0.15, "shape": 0.3}
# At 32 px an outline is one pixel wide: almost all of its pixels would be edges, which have no label.
SOLID = (0.85, 0.15, 0.0)

# The shapes that the included teacher distinguishes in a scene.
SCENE_SHAPES = ("arrow", "circle", "crescent", "cross", "heart", "ring", "star", "triangle")

# Capitals are rare in the gallery, as any single task is rare on the web. They are common in the teacher's training
# data, because the data of a foundation model include the content of most tasks.
STREAMS: dict[str, Stream] = {
    "pretrain": Stream(
        {
            "capital": 0.42,
            "small": 0.15,
            "digit": 0.13,
            "sign": 0.07,
            "text": 0.03,
            "shape": 0.12,
            "texture": 0.08,
        }
    ),
    "gallery": Stream(
        {
            "capital": 0.12,
            "small": 0.22,
            "digit": 0.12,
            "sign": 0.10,
            "text": 0.08,
            "shape": 0.22,
            "texture": 0.14,
        }
    ),
    "letters-train": Stream({"capital": 1.0}, balanced=True),
    "letters-val": Stream({"capital": 1.0}, balanced=True),
    "letters-test": Stream({"capital": 1.0}, balanced=True),
    "marks-train": Stream({"sign": 1.0}, balanced=True),
    "marks-val": Stream({"sign": 1.0}, balanced=True),
    "marks-test": Stream({"sign": 1.0}, balanced=True),
    "textures-train": Stream({"texture": 1.0}, balanced=True, tokens=KNOWN_TEXTURES),
    "textures-val": Stream({"texture": 1.0}, balanced=True, tokens=KNOWN_TEXTURES),
    "textures-test": Stream({"texture": 1.0}, balanced=True, tokens=KNOWN_TEXTURES),
    "colours-train": Stream(_THINGS, colours=True),
    "colours-val": Stream(_THINGS, colours=True),
    "colours-test": Stream(_THINGS, colours=True),
    "shapes-train": Stream({"shape": 1.0}, balanced=True, styles=SOLID),
    "shapes-val": Stream({"shape": 1.0}, balanced=True, styles=SOLID),
    "shapes-test": Stream({"shape": 1.0}, balanced=True, styles=SOLID),
    "generic-labelled": Stream(
        {
            "capital": 0.12,
            "small": 0.24,
            "digit": 0.14,
            "sign": 0.11,
            "shape": 0.24,
            "texture": 0.15,
        }
    ),
}
