"""Labels that come back from people (``task.more_labels``), as further training images of a task.

The lists are those of ``suggestions.csv`` (`ktray.pipeline.results_suggestions`), or any CSV or Parquet list with a
path and a label. A row with an empty label is not labelled yet and is ignored, so that a half-finished list can be
used. The labels are added to the label budget and are never drawn into another split.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ktray.data import filesystem
from ktray.data.labelled.contents import content_versions
from ktray.data.labelled.label_lists import split_names
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.data.labelled.list_columns import USUAL
from ktray.data.labelled.names import Names
from ktray.data.labelled.rows import LabelledRow, count, three
from ktray.data.labelled.tables import is_table, read_table
from ktray.data.sources.uris import ImageRef
from ktray.errors import KtrayError
from ktray.recipe.schema import TaskConfig

_KEY = "task.more_labels"
_FORM = "It names a CSV or Parquet list with the columns path (or uri) and label, or a folder of such lists."


def with_more_labels(task: LabelledSet, part: TaskConfig, image_classes: bool, sets: bool) -> LabelledSet:
    """The task with the images of ``task.more_labels`` as further training images.

    Args:
        task: the labelled images of ``task.data``.
        part: the recipe section.
        image_classes: whether an image has one class.
        sets: whether an image has a set of classes. Their names are separated by ``|`` or ``;``; a lone ``|`` is the
            empty set.

    Returns:
        A set with more training images and another fingerprint; images of ``unlabeled`` that are labelled now are not
        in it any more. If no row has a new label, the same set with a note.

    Raises:
        KtrayError: images of this task kind have no classes; a list cannot be read; or it has an unknown class, an
            image that does not exist, an image of the validation or test split, or an image with two labels.
    """
    if part.more_labels is None:
        return task
    if not (image_classes or sets):
        raise KtrayError(
            f"{_KEY} has class names, and images of task.kind={part.kind} have none",
            "Add the labelled images to task.data.",
        )
    places = [part.more_labels] if isinstance(part.more_labels, str) else part.more_labels
    rows, waiting = _rows(places)
    _check_images(rows, task)
    labels = _labels(rows, task, sets)
    known = {example.uri for example in task.train}
    new = {uri: label for uri, label in labels.items() if uri not in known}
    notes = [f"{waiting} rows of {_KEY} have no label yet."] if waiting else []
    if len(labels) > len(new):
        notes.append(f"{len(labels) - len(new)} images of {_KEY} are training images of task.data with the same label.")
    if not new:
        return replace(task, notes=[*task.notes, *notes, f"{_KEY} adds no training image."])
    # Equal labels stay together, as in every set; within a label, added images follow in the order of their uris.
    added = [LabelledExample(uri, label) for uri, label in sorted(new.items())]
    notes.append(f"{_KEY} adds {count(added, 'training image')}{_by_class(added, task.classes, sets)}.")
    return replace(
        task,
        train=sorted([*task.train, *added], key=lambda example: example.label),
        unlabeled=Names(uri for uri in task.unlabeled if uri not in new),
        notes=[*task.notes, *notes],
        fingerprint=_fingerprint(task, added, {row.uri: row for row in rows}),
    )


def _rows(places: Sequence[str]) -> tuple[list[LabelledRow], int]:
    """The rows with a label, and the number of those without."""
    rows = [row for place in places for row in _read(filesystem.normalise(place))]
    labelled = [row for row in rows if row.label]
    return labelled, len(rows) - len(labelled)


def _read(path: str) -> list[LabelledRow]:
    try:
        if filesystem.is_folder(path):
            return [row for file in filesystem.walk(path) if is_table(file.path) for row in _read(file.path)]
        file = filesystem.stat(path)
    except OSError as error:
        raise KtrayError(f"{_KEY}={path} cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    if file is None:
        raise KtrayError(f"{_KEY}={path} does not exist", filesystem.missing(path))
    if not is_table(path):
        raise KtrayError(f"{_KEY}={path} is not a list", _FORM)
    rows = read_table(file, [], USUAL, unlabelled=True)
    heldout = [row.uri for row in rows if row.split != "train"]
    if heldout:
        raise KtrayError(
            f"List '{path}' ({_KEY}) has {count(heldout, 'row')} with another split than train: {three(heldout)}",
            "Add validation and test images to task.data; labels that come back only train.",
        )
    return rows


def _check_images(rows: Sequence[LabelledRow], task: LabelledSet) -> None:
    heldout = {e.uri: name for name, split in (("val", task.val), ("test", task.test)) for e in split}
    refused = [row.uri for row in rows if row.uri in heldout]
    if refused:
        splits = " and ".join(sorted({heldout[uri] for uri in refused}))
        raise KtrayError(
            f"{count(refused, 'image')} of {_KEY} {'is' if len(refused) == 1 else 'are'} in the {splits} split: "
            f"{three(refused)}",
            "Remove these rows: an image that judges a model must not train it.",
        )
    found: dict[str, bool] = {}
    for row in rows:
        place = ImageRef.parse(row.uri).path
        if place not in found:
            # What is remote is checked when it is read, because a request for each image takes long.
            found[place] = filesystem.is_remote(place) or filesystem.stat(place) is not None
    missing = [row.uri for row in rows if not found[ImageRef.parse(row.uri).path]]
    if missing:
        raise KtrayError(
            f"{count(missing, 'image')} of {_KEY} {'does' if len(missing) == 1 else 'do'} not exist: {three(missing)}",
            "Check the paths: they are absolute, s3://, or relative to the folder of the list.",
        )


def _labels(rows: Sequence[LabelledRow], task: LabelledSet, sets: bool) -> dict[str, Any]:
    """By uri, the value of `LabelledExample.label`. Raises KtrayError for an image with two labels."""
    found: dict[str, Any] = {}
    known = {example.uri: example.label for example in task.train}
    two: dict[str, str] = {}  # with what contradicts the list
    for row in rows:
        label = _label(row.label, task.classes, sets)
        if found.setdefault(row.uri, label) != label:
            two.setdefault(row.uri, _KEY)
        if known.get(row.uri, label) != label:
            two.setdefault(row.uri, "task.data")
    if two:
        raise KtrayError(
            f"{count(two, 'image')} of {_KEY} {'has' if len(two) == 1 else 'have'} two labels: {three(two)} "
            f"(the other one is in {' or '.join(sorted(set(two.values())))})",
            "Keep one label for each image.",
        )
    return found


def _label(text: str, classes: Sequence[str], sets: bool) -> Any:
    """The value of `LabelledExample.label` for the text of a cell."""
    names = split_names(text) if sets else [text]
    unknown = [name for name in names if name not in classes]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"The classes are {three(classes)}."
        raise KtrayError(f"{_KEY} has the class '{unknown[0]}', which task.data does not have", hint)
    return tuple(sorted(classes.index(name) for name in names)) if sets else classes.index(names[0])


def _by_class(added: Sequence[LabelledExample], classes: Sequence[str], sets: bool) -> str:
    counts = Counter(number for e in added for number in (e.label if sets else [e.label]))
    listed = [f"{counts[number]} {filesystem.printable(classes[number])}" for number in sorted(counts)]
    return f" ({', '.join(listed[:8])}{', ...' if len(listed) > 8 else ''})" if listed else ""


def _fingerprint(task: LabelledSet, added: Sequence[LabelledExample], rows: Mapping[str, LabelledRow]) -> str:
    """A hash of the task's fingerprint, and of the added uris, labels and contents (of remote files, of the version of
    their list)."""
    contents = content_versions([rows[example.uri] for example in added])
    digest = hashlib.blake2b(task.fingerprint.encode(), digest_size=16)
    for example in added:
        version = contents.get(example.uri, rows[example.uri].version)
        digest.update(repr((example.uri, example.label, version)).encode())
    return digest.hexdigest()
