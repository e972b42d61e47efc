"""The paper's data sets as their hosts lay them out: what tells them apart and what their classes are called.

Where the images of a list lie is found by `ktray.data.labelled.split_lists`; ADE20K's masks by
`ktray.data.labelled.masked`.
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
    """One host's way.

    Attributes:
        name: value of ``task.layout``.
        file: regular expression of the names in its official lists.
        mark: what one name at least has, so that nobody else's lists are taken for these.
        classes: class in the lists to a name that reads as text, where the set is small and fixed.
        class_folders: each class has a folder of its own (test images need not lie in it).
        val_is_test: the host's validation images are the test set, and nothing is left for validation.
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
    """The layout whose lists these are, by the first names of each; `PLAIN` when they are nobody's."""
    names = [name.rpartition("/")[2] for pairs in lists for name, _ in pairs[:SAMPLE]]
    for layout in LAYOUTS.values():
        if all(re.fullmatch(layout.file, n) for n in names) and any(re.fullmatch(layout.mark, n) for n in names):
            return layout
    return PLAIN


def readable(layout: Layout, root: str, classes: Sequence[str]) -> list[str]:
    """Names that read as text, one a class, all different; empty where nothing better than the class is known."""
    if layout.name == "imagenet":
        texts = _synsets(root)
        known = {c: texts[c] for c in classes if c in texts}
        return distinct([known[c] for c in classes]) if len(known) == len(classes) else []
    if layout.name == "places365":
        return [c.strip("/").replace("_", " ").replace("/", " ") for c in classes]
    if layout.classes:
        return [layout.classes.get(c, c) for c in classes]
    return []


def distinct(synonyms: Sequence[str]) -> list[str]:
    """The first of each comma-separated list of synonyms, or all of them where two classes share the first."""
    first = [text.partition(",")[0].strip() for text in synonyms]
    often = Counter(first)
    return [name if often[name] == 1 else text for name, text in zip(first, synonyms, strict=True)]


def _synsets(root: str) -> dict[str, str]:
    """WordNet id to words, from the file that Kaggle or the development kit lays beside the images."""
    folder = root
    for _ in range(4):  # task.data may be ILSVRC/Data/CLS-LOC, and the file lies beside ILSVRC
        for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt"):
            file = filesystem.stat(f"{folder}/{name}")
            if file is not None:
                lines = filesystem.read_bytes(file.path).decode("utf-8-sig", "replace").splitlines()
                split = (re.match(r"(n\d{8})\s+(.+)", line) for line in lines)
                return {found[1]: found[2].strip() for found in split if found}
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith("/"):
            break
    return {}
