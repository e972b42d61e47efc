"""Read images with a set of classes each, as train, val and test."""

from __future__ import annotations

from collections.abc import Sequence

from ktray.data.labelled import coco, label_lists
from ktray.data.labelled.draw_sets import SetDrawing
from ktray.data.labelled.forms import place
from ktray.data.labelled.label_lists import decode
from ktray.data.labelled.labelled_set import LabelledSet, divide
from ktray.data.labelled.list_columns import USUAL, ListColumns
from ktray.data.labelled.read import in_order
from ktray.data.labelled.rows import LabelledRow, count, three
from ktray.errors import KtrayError

# Each form has a function ``fits`` of path and `FileStat` (None for a folder), and ``read``.
FORMS = (label_lists, coco)
_FORMS = (
    "Name a CSV or Parquet list with the columns path,label[,split], whose labels are names separated by '|', or a "
    "file or folder with COCO annotations (JSON)."
)


def read_label_sets(
    data: str,
    *,
    seed: int,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    labels: int | None = None,
    labels_per_class: int | None = None,
    columns: ListColumns = USUAL,
) -> LabelledSet:
    """Read images with a set of classes each; the set may be empty.

    Args:
        data: local path or ``s3://`` of a list (`ktray.data.labelled.label_lists`), or of a file or a folder with COCO
            annotations (`ktray.data.labelled.coco`).
        seed, val_fraction, test_fraction: see `ktray.data.labelled.draw_sets`.
        labels: label budget: number of training images in all. None keeps all.
        labels_per_class: label budget: number of training images of each class, as far as there are as many.
        columns: the columns of a list that the recipe names.

    Returns:
        The set; the labels of its examples are tuples of class numbers.

    Raises:
        KtrayError: the data is in none of the forms or damaged, there are no classes, val or test has a class that
            train lacks, the budget leaves a class without images, or both budgets are set.
    """
    if labels is not None and labels_per_class is not None:
        raise KtrayError("task.labels and task.labels_per_class are both set", "Remove one of them.")
    path, file = place(data)
    form = next((form for form in FORMS if form.fits(path, file)), None)
    if form is None:
        raise KtrayError(f"'{path}' is not in a format of images with sets of classes", _FORMS)
    notes: list[str] = []
    found = divide(
        form.read(path, file, notes, columns),
        classes=lambda rows: _class_names(rows, path),
        label=lambda row, number: tuple(sorted(number[name] for name in decode(row.label))),
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        budget=labels if labels_per_class is None else labels_per_class,
        notes=notes,
        drawing=SetDrawing(per_class=labels_per_class is not None),
    )
    learned = {number for example in found.train for number in example.label}
    unlearned = [name for number, name in enumerate(found.classes) if number not in learned]
    if unlearned:
        raise KtrayError(
            f"The label budget leaves {count(unlearned, 'class', 'classes')} without a training image: "
            f"{three(unlearned)}",
            "Set task.labels to a larger number.",
        )
    tested = {number for example in found.val for number in example.label}
    unjudged = [name for number, name in enumerate(found.classes) if number not in tested]
    if found.val and unjudged:
        notes.append(
            f"WARNING: {count(unjudged, 'class', 'classes')} without a validation image: {three(unjudged)}. Validation "
            "cannot judge them, and their thresholds stay at 0.5."
        )
    return found


def _class_names(rows: Sequence[LabelledRow], path: str) -> list[str]:
    names = {name for row in rows if row.split == "train" for name in decode(row.label)}
    heldout = {name for row in rows if row.split in ("val", "test") for name in decode(row.label)}
    if unknown := sorted(heldout - names):
        raise KtrayError(
            f"{count(unknown, 'class', 'classes')} of val or test has no training image in '{path}': {three(unknown)}",
            "Check the spelling, add training images, or remove these classes.",
        )
    if not names:
        raise KtrayError(f"No training image in '{path}' has a class", "Check the column label, or the annotations.")
    return in_order(names)
