"""Read images with one class each, from a folder, a list or official split lists, as train, val and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ktray.data.filesystem import normalise
from ktray.data.labelled.forms import place, read_rows
from ktray.data.labelled.labelled_set import LabelledSet, check_train_list, divide
from ktray.data.labelled.layouts import readable
from ktray.data.labelled.list_columns import USUAL, ListColumns
from ktray.data.labelled.rows import LabelledRow, count, three
from ktray.data.labelled.split_lists import read_split_lists
from ktray.errors import KtrayError

FOLDERS = ("classes", "splits")  # layouts of folders


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
    columns: ListColumns = USUAL,
) -> LabelledSet:
    """Read images with one class each.

    Args:
        data: local path or ``s3://`` of one of: a folder with ``train/`` and optionally ``val/`` (or ``valid/``,
            ``validation/``) and ``test/``, each with class folders; a folder of class folders; a CSV or Parquet list
            with columns path, label and optionally split and group. Paths in a list are absolute, ``s3://``, or
            relative to the list's folder; a Parquet list may contain image bytes in place of paths.
        splits: a folder with the lists ``train*.txt``, ``val*.txt``, ``test*.txt``, whose lines are ``file,class`` for
            the images under ``data``. Images that are only in other train lists are unlabeled.
        seed, val_fraction, test_fraction: see `ktray.data.labelled.labelled_set.divide`.
        labels_per_class: label budget; a smaller budget is a subset of a larger one with the same seed. None keeps all
            of train.
        layout: the layout of folders and lists: ``classes`` or ``splits`` (see `forms.read_rows`), or one of
            `layouts.LAYOUTS`; auto recognises it by the file names in the lists and by the folders.
        train_list: name of the train list in ``splits``, with or without suffix; None: the list for the budget if there
            is one, otherwise the full list.
        columns: the columns of a list that the recipe names.

    Returns:
        The set, each part in a fixed order.

    Raises:
        KtrayError: the data does not exist, a list lacks a column, there are fewer than two classes, val or test has a
            class that train lacks, an image is in two splits or has two labels, images of a list do not exist, or a
            key would have no effect.
    """
    if layout == "ade20k":
        raise KtrayError("task.layout=ade20k is a layout with masks", "Set task.kind=segmentation.")
    if layout in FOLDERS and splits:
        raise KtrayError(
            f"task.layout={layout} is a layout of folders, and task.splits is set", "Remove one of the two keys."
        )
    if layout not in ("auto", *FOLDERS) and not splits:
        raise KtrayError(
            f"task.layout={layout} needs its split lists",
            "Set task.splits to their folder, or task.layout=auto for train/, val/ and test/ with class folders.",
        )
    check_train_list(train_list, splits)
    notes: list[str] = []
    if splits:
        root, file = place(data)
        if file is not None:
            raise KtrayError(
                f"task.splits needs a folder of images, but '{root}' is a list",
                "Remove task.splits, or set task.data to a folder.",
            )
        columns.refuse(root, "a folder")
        rows, recognised = read_split_lists(root, normalise(splits), labels_per_class, train_list, layout, notes)
    else:
        rows = read_rows(data, notes, columns, layout)
    return divide(
        rows,
        classes=lambda rows: _classes(rows, data),
        label=lambda row, number: number[row.label],
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        budget=labels_per_class,
        notes=notes,
        names=lambda classes: readable(recognised, root, classes) if splits else [],
    )


def _deeper(rows: Sequence[LabelledRow], data: str) -> str:
    """A remedy for class folders that are a level too low for ``data``; empty if there are none."""
    parts = [row.key.split("/") for row in rows]
    below = {part[1] for part in parts if len(part) > 2}
    if len(below) < 2 or len({part[0] for part in parts}) > 1:
        return ""
    return f"If {three(sorted(below))} are the classes, set task.data={normalise(data)}/{parts[0][0]}."


def _classes(rows: Sequence[LabelledRow], data: str) -> list[str]:
    names = {r.label for r in rows if r.split == "train"}
    unknown = Counter(r.label for r in rows if r.split in ("val", "test") and r.label not in names)
    if unknown:
        raise KtrayError(
            f"{count(unknown, 'class', 'classes')} of val or test has no training image in '{data}': "
            f"{three(sorted(unknown))}",
            "Check the spelling, add training images, or remove these classes.",
        )
    if len(names) < 2:
        present = f"only one class, {three(names)}" if names else "no training images"
        raise KtrayError(
            f"'{data}' has {present}",
            _deeper(rows, data) or "Classification needs at least two classes. Add a class, for example 'other'.",
        )
    return in_order(names)


def in_order(names: set[str]) -> list[str]:
    """Class names in the order of the model's outputs: numbers by value, others by their code points."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
