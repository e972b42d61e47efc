"""Images with one class each: a folder, a list, or official split lists become train, val and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ktray.data.filesystem import normalise
from ktray.data.labelled.forms import LabelledRow, count, place, read_rows, three
from ktray.data.labelled.labelled_set import LabelledSet, check_train_list, divide
from ktray.data.labelled.layouts import readable
from ktray.data.labelled.split_lists import read_split_lists
from ktray.errors import KtrayError


def read_labelled(
    data: str,
    *,
    splits: str | None = None,
    seed: int,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    labels_per_class: int | None = None,
    layout: str = "auto",
    train_list: str | None = None,
) -> LabelledSet:
    """Read images with one class each.

    Args:
        data: a folder with ``train/`` and perhaps ``val/`` (or ``valid/``, ``validation/``) and ``test/``, each of
            class folders; a folder of class folders; a CSV or Parquet list with columns path, label and perhaps split
            (paths absolute, ``s3://``, or relative to the list's folder; a Parquet list may hold image bytes in place
            of paths). Local or ``s3://``.
        splits: a folder of lists ``train*.txt``, ``val*.txt``, ``test*.txt`` of lines ``file,class`` for the images
            under ``data``. Images of the other train lists are unlabeled.
        seed, val_fraction, test_fraction: see `ktray.data.labelled.labelled_set.divide`.
        labels_per_class: label budget; a smaller one is a subset of a larger one with the same seed. None takes all of
            train.
        layout: whose folders and lists these are (`layouts.LAYOUTS`); auto recognises it by the lists' names.
        train_list: which train list of ``splits``, with or without its ending; None: by the budget, else the full.

    Returns:
        The set, each part in a fixed order.

    Raises:
        KtrayError: nothing there, a list without the columns, fewer than two classes, classes in val or test
            that train lacks, one image in two splits or with two labels, no image where the list says, a key that
            would have no effect.
    """
    if layout == "ade20k":
        raise KtrayError("task.layout=ade20k has masks", "Set task.kind=segmentation.")
    if layout != "auto" and not splits:
        raise KtrayError(
            f"task.layout={layout} needs its split lists",
            "Set task.splits to the folder with them, or task.layout=auto for train/ val/ test/ of class folders.",
        )
    check_train_list(train_list, splits)
    notes: list[str] = []
    if splits:
        root, file = place(data)
        if file is not None:
            raise KtrayError(
                f"task.splits goes with a folder of images, and '{root}' is a list", "Leave one of them out."
            )
        rows, known = read_split_lists(root, normalise(splits), labels_per_class, train_list, layout, notes)
    else:
        rows = read_rows(data, notes)
    return divide(
        rows,
        classes=lambda rows: _classes(rows, data),
        label=lambda row, number: number[row.label],
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        budget=labels_per_class,
        notes=notes,
        names=lambda classes: readable(known, root, classes) if splits else [],
    )


def _classes(rows: Sequence[LabelledRow], data: str) -> list[str]:
    names = {r.label for r in rows if r.split == "train"}
    unknown = Counter(r.label for r in rows if r.split in ("val", "test") and r.label not in names)
    if unknown:
        raise KtrayError(
            f"{count(unknown, 'class', 'classes')} of val or test has no training image in '{data}': "
            f"{three(sorted(unknown))}",
            "Check the spelling, add training images, or take these classes out.",
        )
    if len(names) < 2:
        only = f"only one class, {three(names)}" if names else "no training images"
        raise KtrayError(
            f"'{data}' has {only}", "Classification needs two classes at least, such as 'it' and 'everything else'."
        )
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
