"""The miniverse's pictures are a pure function of (seed, stream, index), and captions tell the truth."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ktray.miniverse.captions import DETAIL_SHARES, Facts, caption, prompt_templates
from ktray.miniverse.masks import STYLES, glyph_mask, shape_mask
from ktray.miniverse.vocabulary import BACKGROUND_SHARES, FONTS, SHAPES, STREAMS, SUBJECTS, TEXTURES, WORLD_VERSION
from ktray.miniverse.world import sample

INDICES = (0, 7, 19_999, 123_456)
# Of pictures of version 1: stream, index, caption, mean colours of the four quarters.
PINNED = (
    (
        "pretrain",
        0,
        "the capital letter X in black on a checked background",
        [234, 117, 22, 202, 105, 25, 227, 114, 22, 199, 103, 24],
    ),
    ("pretrain", 777, "the small letter m in yellow", [137, 135, 117, 130, 131, 124, 146, 146, 132, 140, 142, 138]),
    ("gallery", 1, "the grid in brown", [178, 109, 93, 183, 110, 95, 181, 110, 94, 174, 107, 91]),
    ("gallery", 2, "the line of text", [41, 59, 206, 43, 48, 188, 64, 80, 220, 50, 76, 224]),
    ("gallery", 29999, "the percent sign", [136, 105, 68, 137, 89, 56, 143, 100, 69, 150, 97, 74]),
    ("letters-train", 3, "the capital letter D", [80, 94, 149, 75, 91, 155, 82, 91, 150, 79, 89, 151]),
    (
        "letters-train",
        259,
        "the capital letter Z in orange on a cluttered background",
        [160, 73, 58, 135, 75, 51, 147, 75, 58, 139, 79, 50],
    ),
    ("letters-val", 5, "the capital letter F", [71, 82, 213, 72, 80, 210, 77, 77, 208, 62, 88, 214]),
    ("letters-test", 8, "the capital letter I", [29, 39, 36, 32, 40, 41, 17, 31, 30, 35, 39, 47]),
    (
        "letters-test",
        2599,
        "the capital letter Z in purple on a shaded background",
        [191, 161, 161, 184, 150, 158, 167, 138, 139, 166, 139, 131],
    ),
)


def _digest(stream: str) -> str:
    parts = [sample(stream, i) for i in INDICES]
    return hashlib.sha256(b"".join(p.image.tobytes() + p.caption.encode() for p in parts)).hexdigest()


def test_same_in_another_order_and_in_another_process() -> None:
    here = _digest("gallery")
    for index in reversed(range(60)):  # other samples in between, other cache contents
        sample("pretrain", index)
    assert _digest("gallery") == here
    code = (
        "import hashlib\nfrom ktray.miniverse.world import sample\n"
        f"parts=[sample('gallery', i) for i in reversed({INDICES!r})][::-1]\n"
        "print(hashlib.sha256(b''.join(p.image.tobytes()+p.caption.encode() for p in parts)).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize(("stream", "index", "words", "quarters"), PINNED)
def test_pictures_of_this_version_never_change(stream: str, index: int, words: str, quarters: list[int]) -> None:
    """Another draw anywhere would change colours by tens; what another processor rounds otherwise, by less than one."""
    assert WORLD_VERSION == "1"
    drawn = sample(stream, index)
    assert drawn.caption == words
    means = drawn.image.reshape(2, 16, 2, 16, 3).mean((1, 3)).ravel()
    assert means.tolist() == pytest.approx(quarters, abs=1.2)


def test_streams_seeds_and_indices_differ() -> None:
    images = [sample(stream, index).image.tobytes() for stream in STREAMS for index in range(150)]
    images += [sample("gallery", index, seed=1).image.tobytes() for index in range(150)]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_size_changes_the_resolution_only(size: int) -> None:
    big, small = sample("pretrain", 5, size=size), sample("pretrain", 5)
    assert big.image.shape == (size, size, 3)
    assert big.image.dtype == np.uint8
    assert (big.caption, big.facts) == (small.caption, small.facts)


def test_mixes_are_whole_and_kept() -> None:
    assert sum(DETAIL_SHARES.values()) == pytest.approx(1)
    assert sum(BACKGROUND_SHARES) == pytest.approx(1)
    for stream in STREAMS.values():
        assert sum(stream.mix.values()) == pytest.approx(1)
        assert not stream.balanced or len(stream.mix) == 1
    assert 0.08 <= STREAMS["gallery"].mix["capital"] <= 0.12
    drawn = Counter(sample("gallery", i).subject.kind for i in range(1500))
    for kind, share in STREAMS["gallery"].mix.items():
        assert drawn[kind] / 1500 == pytest.approx(share, abs=0.035)


def test_labelled_streams_are_balanced() -> None:
    drawn = Counter(sample("letters-val", i).subject.token for i in range(52))
    assert set(drawn.values()) == {2}
    assert len(drawn) == 26


def test_subject_stands_out_and_shows() -> None:
    """No blank pictures: every one has contrast, most of them a lot."""
    spread = np.array([np.ptp(sample("letters-test", i).image.astype(int), axis=(0, 1)).max() for i in range(200)])
    assert spread.min() > 20
    assert np.median(spread) > 100


def test_every_font_has_every_glyph() -> None:
    for font in range(len(FONTS)):
        seen = set()
        for kind in ("capital", "digit", "small", "sign"):
            for subject in SUBJECTS[kind]:
                mask = np.asarray(glyph_mask(subject.token, font, "plain", 48))
                assert mask.max() > 200
                seen.add(mask.tobytes())
        assert len(seen) == 26 + 10 + 12 + 8  # a missing glyph is drawn as the same box as another one


def test_styles_and_shapes_differ() -> None:
    masks = {shape_mask(shape, style, 48).tobytes() for shape in SHAPES for style in STYLES}
    assert len(masks) == len(SHAPES) * len(STYLES)
    assert len({subject.name for kind in SUBJECTS.values() for subject in kind}) == sum(map(len, SUBJECTS.values()))
    assert len(TEXTURES) == len(SUBJECTS["texture"])


def test_captions_tell_the_truth() -> None:
    facts = Facts("star", "red", "plain")
    assert caption(facts) == "the star in red on a plain background"
    assert caption(facts.told("colour")) == "the star in red"
    assert caption(facts.told("name")) == "the star"
    for index in range(100):
        drawn = sample("pretrain", index)
        assert drawn.told.name == drawn.facts.name
        assert drawn.told.colour in (None, drawn.facts.colour)
        assert drawn.told.background in (None, drawn.facts.background)
        assert drawn.caption == caption(drawn.told)


def test_prompts_have_one_slot() -> None:
    templates = prompt_templates()
    assert len(set(templates)) == len(templates) > 10
    assert all(template.count("{}") == 1 for template in templates)
