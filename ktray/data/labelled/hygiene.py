"""What is wrong with the labelled images: copies in two splits, torn groups, and labels that contradict each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ktray.data.labelled.hygiene_copies import Looks, copies
from ktray.data.labelled.hygiene_labels import Doubts

SPLITS = ("train", "val", "test")
MOST_PAIRS = 100_000  # candidates of two splits that are compared by their pixels, about 1 ms each

# Kinds of findings.
SAME_FILE = "same_file"  # the bytes of two images in different splits are equal
SAME_PIXELS = "same_pixels"  # their pixels are equal
NEAR_COPY = "near_copy"  # they show the same
TWO_LABELS = "two_labels"  # two images have equal bytes or pixels and different labels
DOUBTFUL_LABEL = "doubtful_label"  # the teacher contradicts the label
COPIES = (SAME_FILE, SAME_PIXELS, NEAR_COPY)


@dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        kind: one of the kinds of this module.
        uri, split, label: the image; the label is the name of its class, or empty.
        other_uri, other_split, other_label: the other image of a pair. For a doubtful label, only ``other_label``: the
            class that the teacher predicts.
        value: for copies, how well the details agree (0..1); for a doubtful label, its margin (-1..0); else 0.
    """

    kind: str
    uri: str
    split: str
    label: str
    other_uri: str = ""
    other_split: str = ""
    other_label: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class Checked:
    """The usable images of a split: uris, labels (names, or empty), and what is compared.

    Attributes:
        file, pixels: (n,) uint64 digests of the encoded bytes and of the pixels.
        looks: their hashes and thumbnails.
    """

    split: str
    uris: list[str]
    labels: list[str]
    file: np.ndarray
    pixels: np.ndarray
    looks: Looks


def copies_between(
    parts: Sequence[Checked],
    similar: Mapping[tuple[str, str], Iterable[tuple[int, int]]] | None = None,
    notes: list[str] | None = None,
) -> list[Finding]:
    """Images of different splits that show the same.

    Args:
        similar: by the names of two splits, further candidates as rows of their images, such as those that an encoder
            finds similar.
        notes: gets a sentence for two splits with more candidates than are compared.
    """
    found = []
    for at, a in enumerate(parts):
        for b in parts[at + 1 :]:
            extra = [*_equal(a, b), *(similar or {}).get((a.split, b.split), ())]
            told: list[str] = []
            for pair in copies(a.looks, b.looks, extra, MOST_PAIRS, told):
                i, j = pair.a, pair.b
                same_pixels, same_file = a.pixels[i] == b.pixels[j], a.file[i] == b.file[j]
                kind = SAME_FILE if same_file else SAME_PIXELS if same_pixels else NEAR_COPY
                found.append(_pair(kind, a, i, b, j, pair.structure))
            if notes is not None:
                notes += [f"{a.split} and {b.split}: {text}" for text in told]
    return sorted(found, key=lambda f: (COPIES.index(f.kind), -f.value))


def _equal(a: Checked, b: Checked) -> Iterable[tuple[int, int]]:
    """Each image of one part with the first image of the other part that has the same pixels."""
    first = {digest: i for i, digest in reversed(list(enumerate(a.pixels.tolist())))}
    back = {digest: j for j, digest in reversed(list(enumerate(b.pixels.tolist())))}
    yield from ((first[digest], j) for j, digest in enumerate(b.pixels.tolist()) if digest in first)
    yield from ((i, back[digest]) for i, digest in enumerate(a.pixels.tolist()) if digest in back)


def two_labels(parts: Sequence[Checked]) -> list[Finding]:
    """Images with equal bytes or pixels and different labels, of the same split or of two: for each label that occurs,
    the first image with it, compared with the first image of all."""
    groups: dict[int, dict[str, tuple[Checked, int]]] = defaultdict(dict)
    for part in parts:
        for i, digest in enumerate(part.pixels.tolist()):
            groups[digest].setdefault(part.labels[i], (part, i))
    found = []
    for images in groups.values():
        (a, i), *others = images.values()
        found += [_pair(TWO_LABELS, a, i, b, j, 0.0) for b, j in others]
    return found


def doubtful(doubts: Doubts, uris: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> list[Finding]:
    """The findings of `hygiene_labels.doubts` on training images."""
    rows = zip(doubts.row.tolist(), doubts.suggested.tolist(), doubts.margin.tolist(), strict=True)
    return [
        Finding(DOUBTFUL_LABEL, uris[i], "train", classes[labels[i]], other_label=classes[other], value=margin)
        for i, other, margin in rows
    ]


def _pair(kind: str, a: Checked, i: int, b: Checked, j: int, value: float) -> Finding:
    return Finding(kind, a.uris[i], a.split, a.labels[i], b.uris[j], b.split, b.labels[j], value)


def counts(findings: Sequence[Finding], torn: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Numbers of problems: of images of the second split that are copies of one in the first, as ``train_test`` and so
    on; ``torn_groups``, ``two_labels`` and ``doubtful_labels``."""
    pairs = [f for f in findings if f.kind in COPIES]
    between = {
        f"{a}_{b}": len({f.other_uri for f in pairs if (f.split, f.other_split) == (a, b)})
        for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
    }
    return {
        **between,
        "torn_groups": len(torn),
        "two_labels": sum(f.kind == TWO_LABELS for f in findings),
        "doubtful_labels": sum(f.kind == DOUBTFUL_LABEL for f in findings),
    }
