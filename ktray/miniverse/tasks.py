"""The built-in tasks: real digits, and miniature counterparts of the five tasks of the paper.

Each has the main characteristic of its counterpart: many classes and a rich gallery (letters), few labels and images
without an object (textures), classes that are not objects (colours), a long-tailed distribution (marks), label maps
instead of labels (shapes). In scenes, an image has a set of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktray.miniverse.captions import prompt_templates
from ktray.miniverse.scenes import SIDE, scene
from ktray.miniverse.vocabulary import COLOURS, KNOWN_TEXTURES, SCENE_SHAPES, SHAPES, SUBJECTS
from ktray.miniverse.world import IGNORE, sample

IMAGE_SIZE = 32
# Number of images of the most common and of the rarest class of `marks`.
TAILS = {"train": (60, 3), "val": (40, 3), "test": (500, 35)}


@dataclass(frozen=True)
class DrawnExample:
    """An image and its label.

    Attributes:
        image: uint8 [size, size, 3], RGB.
        label: index into `MiniverseTask.classes`; for an image with a set of classes a tuple of such indices, in order.
        mask: for segmentation, uint8 [size, size] of such indices; 255 for ignored pixels.
    """

    image: NDArray[np.uint8]
    label: int | tuple[int, ...]
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class MiniverseTask:
    """A built-in task.

    Attributes:
        name: name of the task in recipes (``task.name``).
        classes: folder names (segmentation: names of the values of label maps), in the order of the labels.
        class_names: class to noun phrase for prompts.
        labels_per_class: images per class in ``train``; if classes differ, those of the most common class.
        splits: returns the splits ``train``, ``val`` and ``test``.
        about: a short description of the images.
        kinds: kinds of subjects that are classes; a generic labelled set for this task excludes them.
        counterpart: the corresponding task of the paper and its characteristic; empty if there is none.
        kind: kind of the task.
        metric: metric of the task.
        masks: whether images have label maps instead of class folders.
        sets: whether images have sets of classes, in a list, instead of class folders.
        gallery: key of `ktray.miniverse.generate.GALLERIES`: the gallery that has images of this type.
        image_size: side of the images, pixels.
        prompts: templates with one ``{}`` for the noun phrase of a class.
    """

    name: str
    classes: tuple[str, ...]
    class_names: dict[str, str]
    labels_per_class: int
    splits: Callable[[], dict[str, list[DrawnExample]]]
    about: str
    kinds: tuple[str, ...]
    counterpart: str = ""
    kind: str = "classification"
    metric: str = "top1"
    masks: bool = False
    sets: bool = False
    gallery: str = "gallery"
    image_size: int = IMAGE_SIZE
    prompts: tuple[str, ...] = tuple(prompt_templates())

    @property
    def file(self) -> str:
        """The list of the labelled images in the task's folder; empty: the folder itself has them."""
        return "labels.csv" if self.sets else ""


def tail(most: int, least: int, classes: int) -> list[int]:
    """Counts that decrease geometrically from `most` to `least`, rounded."""
    return [round(most * (least / most) ** (rank / (classes - 1))) for rank in range(classes)]


def _in_turn(name: str, classes: Sequence[str], counts: dict[str, list[int]]) -> dict[str, list[DrawnExample]]:
    """Splits from the streams ``{name}-{split}``, in which the classes alternate.

    Args:
        name: name of the task.
        classes: classes in the order of the stream. Labels are in the order of the sorted names, as for class folders.
        counts: split to number of images of each class, in the order of the stream.
    """
    labels = [sorted(classes).index(class_name) for class_name in classes]
    return {
        split: [
            DrawnExample(sample(f"{name}-{split}", index, size=IMAGE_SIZE).image, labels[index % len(classes)])
            for index in range(len(classes) * max(each))
            if index // len(classes) < each[index % len(classes)]
        ]
        for split, each in counts.items()
    }


def _even(name: str, classes: Sequence[str], **counts: int) -> Callable[[], dict[str, list[DrawnExample]]]:
    return lambda: _in_turn(name, classes, {split: [each] * len(classes) for split, each in counts.items()})


def _marks() -> dict[str, list[DrawnExample]]:
    counts = {split: tail(most, least, len(_SIGNS)) for split, (most, least) in TAILS.items()}
    return _in_turn("marks", tuple(_SIGNS), counts)


def _shapes() -> dict[str, list[DrawnExample]]:
    splits: dict[str, list[DrawnExample]] = {}
    for split, each in {"train": 10, "val": 5, "test": 50}.items():
        splits[split] = []
        for index in range(len(SHAPES) * each):
            drawn = sample(f"shapes-{split}", index, size=IMAGE_SIZE)
            label = 1 + index % len(SHAPES)
            mask = np.where(drawn.mask == 1, np.uint8(label), drawn.mask)
            splits[split].append(DrawnExample(drawn.image, label, mask))
    return splits


def _scenes() -> dict[str, list[DrawnExample]]:
    number = {shape: i for i, shape in enumerate(SCENE_SHAPES)}
    splits: dict[str, list[DrawnExample]] = {}
    for split, count in {"train": 320, "val": 160, "test": 1000}.items():
        drawn = [scene(f"scenes-{split}", index) for index in range(count)]
        splits[split] = [
            DrawnExample(d.image, tuple(sorted({number[s.token] for s in d.subjects if s.token in number})))
            for d in drawn
        ]
    return splits


def _digits() -> dict[str, list[DrawnExample]]:
    from sklearn.datasets import load_digits

    scans = load_digits()
    ink = np.asarray(scans.images, dtype=np.float32) / 16.0
    labels = np.asarray(scans.target)
    order = np.random.default_rng(0).permutation(len(labels))
    splits: dict[str, list[DrawnExample]] = {"train": [], "val": [], "test": []}
    seen = [0] * 10
    for row in order.tolist():
        label = int(labels[row])
        split = "train" if seen[label] < 10 else "val" if seen[label] < 20 else "test"
        seen[label] += 1
        # Dark ink on light paper, as before the scan.
        paper = Image.fromarray(np.round(255 * (1 - ink[row])).astype(np.uint8))
        grown = paper.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")
        splits[split].append(DrawnExample(np.asarray(grown), label))
    return splits


# Folder to noun phrase, most common first. The signs themselves cannot be folder names.
_SIGNS = {subject.name.replace(" ", "_"): subject.name for subject in SUBJECTS["sign"]}
_LETTERS = tuple(subject.token for subject in SUBJECTS["capital"])

_ALL = (
    MiniverseTask(
        name="letters",
        classes=_LETTERS,
        class_names={subject.token: subject.name for subject in SUBJECTS["capital"]},
        labels_per_class=10,
        splits=_even("letters", _LETTERS, train=10, val=10, test=100),
        about="capital letters of the miniverse, drawn separately from the gallery and the teacher's training data",
        kinds=("capital",),
        counterpart="ImageNet: the most classes, and a teacher that is accurate on them",
    ),
    MiniverseTask(
        name="digits",
        classes=tuple(subject.token for subject in SUBJECTS["digit"]),
        class_names={subject.token: subject.name for subject in SUBJECTS["digit"]},
        labels_per_class=10,
        splits=_digits,
        about="handwritten digits, real scans of 8 x 8 points, from scikit-learn's load_digits",
        kinds=("digit",),
    ),
    MiniverseTask(
        name="textures",
        classes=tuple(sorted(KNOWN_TEXTURES)),
        class_names={name: name for name in KNOWN_TEXTURES},
        labels_per_class=5,
        splits=_even("textures", KNOWN_TEXTURES, train=5, val=5, test=120),
        about="textures that fill the frame, in two colours that are independent of the class",
        kinds=("texture",),
        counterpart="EuroSAT: few classes, very few labels, and images without an object",
        # Captions of textures mention no background.
        prompts=("the {}", *(f"the {{}} in {colour}" for colour in COLOURS)),
    ),
    MiniverseTask(
        name="colours",
        classes=tuple(sorted(COLOURS)),
        class_names={name: name for name in COLOURS},
        labels_per_class=10,
        splits=_even("colours", tuple(COLOURS), train=10, val=5, test=80),
        about="subjects of every kind; the class is the colour of the subject, not its kind or its background",
        kinds=(),
        counterpart="Places365: the class is not the object, and it occurs in the whole gallery",
        prompts=tuple(f"the {s.name} in {{}}" for kind in ("capital", "digit", "shape") for s in SUBJECTS[kind][:10]),
    ),
    MiniverseTask(
        name="marks",
        classes=tuple(sorted(_SIGNS)),
        class_names=_SIGNS,
        labels_per_class=TAILS["train"][0],
        splits=_marks,
        about="signs with a long-tailed distribution: in each split, image counts decrease geometrically by class",
        kinds=("sign",),
        counterpart="HAM10K: few classes, and the most common class has twenty times as many images as the rarest",
        metric="mean_class_accuracy",
    ),
    MiniverseTask(
        name="shapes",
        classes=("background", *SHAPES),
        class_names={name: name for name in ("background", *SHAPES)},
        labels_per_class=10,
        splits=_shapes,
        about=f"one shape per image with its label map; pixels at the edge of the shape are {IGNORE}",
        kinds=("shape",),
        counterpart="ADE20K: a class for every pixel, and few labelled images",
        kind="segmentation",
        metric="miou",
        masks=True,
    ),
    MiniverseTask(
        name="scenes",
        classes=SCENE_SHAPES,
        class_names={name: name for name in SCENE_SHAPES},
        labels_per_class=40,
        splits=_scenes,
        about="scenes with up to three subjects; the classes of an image are the shapes that it shows, or none",
        kinds=("shape",),
        kind="multilabel",
        metric="map",
        sets=True,
        gallery="scenes-gallery",
        image_size=SIDE,
    ),
)
TASKS: dict[str, MiniverseTask] = {task.name: task for task in _ALL}
