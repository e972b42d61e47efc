"""Layouts in which the paper's data sets are published: how they are recognised, and the names of their classes.

`ktray.data.labelled.split_lists` finds the images of a list; `ktray.data.labelled.masked` finds the masks of ADE20K.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ktray.data import filesystem

Pairs = Sequence[tuple[str, str]]
SAMPLE = 50


@dataclass(frozen=True)
class Layout:
    """The layout of one published data set.

    Attributes:
        name: value of ``task.layout``.
        file: regular expression that matches every file name in its official lists.
        mark: regular expression that matches at least one file name, so that other lists are not mistaken for these.
        classes: class in the lists to a readable class name, if the set of classes is small and fixed.
        class_folders: each class has its own folder (test images may be elsewhere).
        val_is_test: the published validation images are the test set, and there is no other validation set.
    """

    name: str
    file: str
    mark: str
    classes: Mapping[str, str] = field(default_factory=dict)
    class_folders: bool = False
    val_is_test: bool = False


HAM10K = {
    "AKIEC": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "VASC": "vascular lesion",
}
EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "herbaceous vegetation",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "sea or lake",
}
PLAIN = Layout("auto", r".*", r".*")
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "imagenet",
            r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})\.JPEG",
            r"n\d{8}_\d+\.JPEG",
            class_folders=True,
            val_is_test=True,
        ),
        Layout("places365", r"(Places365_val_)?\d{8}\.jpg", r"Places365_val_\d{8}\.jpg", class_folders=True),
        Layout("ham10k", r"ISIC_\d{7}\.jpg", r"ISIC_\d{7}\.jpg", HAM10K),
        Layout("eurosat", rf"({'|'.join(EUROSAT)})_\d+\.\w+", r".*", EUROSAT, class_folders=True),
        Layout("ade20k", r"ADE_(train|val)_\d{8}\.jpg", r"ADE_train_\d{8}\.jpg"),
    )
}


def recognise(lists: Iterable[Pairs]) -> Layout:
    """The layout of these lists, recognised by the first file names of each list; `PLAIN` if none matches."""
    names = [name.rpartition("/")[2] for pairs in lists for name, _ in pairs[:SAMPLE]]
    for layout in LAYOUTS.values():
        if all(re.fullmatch(layout.file, n) for n in names) and any(re.fullmatch(layout.mark, n) for n in names):
            return layout
    return PLAIN


def readable(layout: Layout, root: str, classes: Sequence[str]) -> list[str]:
    """Readable class names, all different, one for each class; empty if nothing better than the class is known."""
    if layout.name == "imagenet":
        texts = _synsets(root)
        words = {c: texts[c] for c in classes if c in texts}
        return distinct([words[c] for c in classes]) if len(words) == len(classes) else []
    if layout.name == "places365":
        return [c.strip("/").replace("_", " ").replace("/", " ") for c in classes]
    if layout.classes:
        return [layout.classes.get(c, c) for c in classes]
    return []


def distinct(synonyms: Sequence[str]) -> list[str]:
    """The first of each comma-separated list of synonyms, or the whole list if two classes have the same first one."""
    first = [text.partition(",")[0].strip() for text in synonyms]
    frequency = Counter(first)
    return [name if frequency[name] == 1 else text for name, text in zip(first, synonyms, strict=True)]


def _synsets(root: str) -> dict[str, str]:
    """WordNet id to words, from the file that Kaggle or the development kit stores next to the images."""
    folder = root
    for _ in range(4):  # task.data may be ILSVRC/Data/CLS-LOC, and the file is in the same folder as ILSVRC
        for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt"):
            file = filesystem.stat(f"{folder}/{name}")
            if file is not None:
                lines = filesystem.read_bytes(file.path).decode("utf-8-sig", "replace").splitlines()
                split = (re.match(r"(n\d{8})\s+(.+)", line) for line in lines)
                return {match[1]: match[2].strip() for match in split if match}
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith("/"):
            break
    return {}
