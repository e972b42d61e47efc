"""Split lists: lines ``file,class`` for the images of a published data set in its own folder layout.

The folder is listed once, without accessing each file, because such data sets often have more than a million images.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ktray.data import filesystem
from ktray.data.labelled.layouts import LAYOUTS, PLAIN, Layout, Pairs, recognise
from ktray.data.labelled.rows import SPLITS, LabelledRow, count, nfc, three
from ktray.errors import KtrayError


def read_split_lists(
    root: str, splits: str, budget: int | None, train_list: str | None, layout: str, notes: list[str]
) -> tuple[list[LabelledRow], Layout]:
    """Rows of all images of the lists in ``splits``, whose files are below ``root``, and the layout of the data.

    Images that are in other train lists but not in the chosen one are rows of the split ``pool``.

    Raises:
        KtrayError: lists are missing or malformed, images are missing or ambiguous, or the data lacks a class of the
            lists. Messages contain the number of cases and three examples.
    """
    chosen, larger = choose_lists(splits, budget, train_list, "task.labels_per_class")
    pairs = {kind: read_list(file) for kind, file in chosen.items()}
    recognised = recognise(pairs.values()) if layout == "auto" else LAYOUTS[layout]
    notes.append("Split lists: " + ", ".join(f"{file.rpartition('/')[2]}" for file in chosen.values()) + ".")
    if recognised is not PLAIN:
        notes.append(f"Layout: {recognised.name}.")
    if recognised.val_is_test and "test" not in pairs and "ILSVRC2012_val_" in pairs.get("val", [("", "")])[0][0]:
        pairs["test"] = pairs.pop("val")
        notes.append("ImageNet's val.txt is the test set, as in the paper.")
    train = set(pairs["train"])
    pairs["pool"] = [p for p in dict.fromkeys(p for path in larger for p in read_list(path)) if p not in train]
    files = Files(root, pairs.values())
    _check_classes(recognised, files, pairs, splits)
    rows = [files.row(name, label, kind) for kind, listed in pairs.items() for name, label in listed]
    files.check(splits)
    return rows, recognised


def choose_lists(
    splits: str, budget: int | None, train_list: str | None, budget_key: str
) -> tuple[dict[str, str], list[str]]:
    """The path of the list of each split, and the paths of the other train lists."""
    if not filesystem.is_folder(splits):
        hint = "" if filesystem.stat(splits) else f"{filesystem.missing(filesystem.normalise(splits))} "
        raise KtrayError(
            f"task.splits '{splits}' is not a folder",
            f"{hint}Set it to a folder with train*.txt, val.txt and test.txt.",
        )
    lists: dict[str, list[str]] = defaultdict(list)
    for name in filesystem.children(splits)[1]:
        kind = SPLITS.get(re.split(r"[_.\-]", name.lower())[0])
        if kind and name.lower().endswith((".txt", ".csv")):
            lists[kind].append(f"{splits}/{name}")
    if not lists["train"]:
        raise KtrayError(f"'{splits}' has no train*.txt", "Name the lists train*.txt, val*.txt and test*.txt.")
    chosen = {kind: _choose(paths, budget if kind == "train" else None, budget_key)
              for kind, paths in lists.items() if paths and not (kind == "train" and train_list)}  # fmt: skip
    if train_list:
        chosen = {"train": _named(lists["train"], train_list), **chosen}
    return chosen, [path for path in lists["train"] if path != chosen["train"]]


def _named(paths: Sequence[str], wanted: str) -> str:
    stems = {re.sub(r"\.(txt|csv)$", "", path.rpartition("/")[2]): path for path in paths}
    stem = re.sub(r"\.(txt|csv)$", "", wanted)
    if stem not in stems:
        near = difflib.get_close_matches(stem, stems, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise KtrayError(
            f"task.train_list '{wanted}' is not in the folder task.splits",
            f"{hint}The folder has {', '.join(sorted(stems))}.",
        )
    return stems[stem]


def _choose(paths: Sequence[str], budget: int | None, budget_key: str) -> str:
    if len(paths) == 1:
        return paths[0]
    full = r"(train_full|train|val|test)\."
    pattern = rf"train_{budget}img" if budget else full
    matching = [p for p in paths if re.match(pattern, p.rpartition("/")[2])]
    if len(matching) != 1 and budget:
        matching = [p for p in paths if re.match(full, p.rpartition("/")[2])]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(p.rpartition("/")[2] for p in paths)
    raise KtrayError(
        f"There are several lists for one split, and none of them is the default: {listed}",
        f"Set task.train_list to the name of a train list, or {budget_key} to the number in its name.",
    )


def read_list(path: str, classes: bool = True) -> list[tuple[str, str]]:
    """(file, class) of each line. With ``classes=False`` a line is a file name, and the class is empty."""
    pairs = []
    try:
        lines = filesystem.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KtrayError(
            f"Split list '{path}' cannot be read: {filesystem.why(error)}", "Save it as text in UTF-8."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not classes:
            pairs.append((line.strip(), ""))
            continue
        name, comma, label = (part.strip() for part in line.rpartition(","))
        if not comma or not name or not label:
            raise KtrayError(f"Split list '{path}' has no 'file,class' in line {number}", "Correct the line.")
        pairs.append((name, nfc(label)))
    if not pairs:
        raise KtrayError(
            f"Split list '{path}' is empty", "Add images, or remove the list: its split is then drawn from train."
        )
    return pairs


def _check_classes(layout: Layout, files: Files, pairs: Mapping[str, Pairs], splits: str) -> None:
    lines = Counter(label for listed in pairs.values() for _, label in listed)
    valid = set(layout.classes) or (files.classes if layout.class_folders else set())
    if unknown := [label for label in lines if valid and label not in valid]:
        number = sum(lines[label] for label in unknown)
        raise KtrayError(
            f"{number} lines of the lists in '{splits}' have {count(unknown, 'class', 'classes')} that {layout.name} "
            f"in '{files.root}' does not have: {three(unknown)}",
            "Check the spelling, and whether the archive was unpacked completely.",
        )


class Files:
    """Finds the images of lists by path, by file name and class folder, or by file name alone.

    Attributes:
        root: the folder with the images.
        classes: the classes of the lists that have a folder.
    """

    def __init__(self, root: str, lists: Iterable[Pairs]) -> None:
        self.root = root
        lists = list(lists)
        listed_names = {_base(name) for listed in lists for name, _ in listed}
        # The class "hunting_lodge_outdoor" of Places365 has the folder "h/hunting_lodge/outdoor" or
        # "hunting_lodge-outdoor".
        self._plain = {label: _plain(label) for listed in lists for _, label in listed}
        labels = set(self._plain.values())
        self._names: dict[str, set[str]] = {}
        self._by_class: dict[str, list[str]] = defaultdict(list)
        self._by_last: dict[str, list[str]] = defaultdict(list)
        self._free: dict[str, list[str]] = defaultdict(list)  # file names in folders that do not belong to a class
        self._versions: dict[str, str] = {}
        self._missing: list[str] = []
        self._twice: dict[str, list[str]] = {}
        for folder, names in self._remote() if filesystem.is_remote(root) else _folders(root):
            self._names[folder] = listed_names.intersection(names)
            self._by_last[_base(folder)].append(folder)
            if plain := _class_of(folder, labels):
                self._by_class[plain].append(folder)
            else:
                for name in self._names[folder]:
                    self._free[name].append(folder)
        self.classes = {label for label, plain in self._plain.items() if plain in self._by_class}

    def row(self, name: str, label: str, split: str) -> LabelledRow:
        """The row of an image. If its file is missing or ambiguous, `check` reports it."""
        candidates = self._candidates(name, label)
        key = nfc(f"{label}/{name}")
        if len(candidates) != 1:
            if candidates:
                self._twice[f"{name},{label}"] = candidates
            else:
                self._missing.append(f"{name},{label}")
            return LabelledRow(name, key, label, split)
        inside = f"{candidates[0]}/{_base(name)}" if candidates[0] else _base(name)
        path = f"{self.root}/{inside}"
        return LabelledRow(path, key, label, split, self._version(path))

    def _candidates(self, name: str, label: str) -> list[str]:
        base = _base(name)
        if "/" in name:  # a path is unambiguous, independent of class folders
            folder = name.rpartition("/")[0].removeprefix("./").strip("/")
            below = [f for f in self._by_last.get(_base(folder), []) if base in self._names[f]]
            return [f for f in below if f == folder] or [f for f in below if f.endswith(f"/{folder}")]
        in_class_folder = [f for f in self._by_class.get(self._plain[label], []) if base in self._names[f]]
        if len(in_class_folder) > 1:  # "t-shirt" and "t_shirt" may both be classes
            in_class_folder = [f for f in in_class_folder if f"/{nfc(f)}".endswith(f"/{label}")] or in_class_folder
        return in_class_folder or self._free.get(base, [])

    def _version(self, path: str) -> str:
        if filesystem.is_remote(path):
            return self._versions[path]
        try:
            status = os.stat(path)
        except OSError:  # a broken link is reported when it is read
            return ""
        return f"{status.st_size}:{status.st_mtime_ns}"

    def _remote(self) -> Iterator[tuple[str, list[str]]]:
        folders: dict[str, list[str]] = defaultdict(list)
        for file in filesystem.walk(self.root):
            folder, _, name = file.path[len(self.root) + 1 :].rpartition("/")
            folders[folder].append(name)
            self._versions[file.path] = f"{file.size}:{file.mtime_ns}"
        yield from folders.items()

    def check(self, splits: str) -> None:
        """Raises KtrayError if images of the lists are missing or ambiguous."""
        if self._missing:
            raise KtrayError(
                f"{count(self._missing, 'image')} of the lists in '{splits}' cannot be found in '{self.root}': "
                f"{three(self._missing)}",
                "Check task.data: an image must have the path of the list, or be in the folder of its class, or have a "
                "unique file name outside of class folders.",
            )
        if self._twice:
            folders = " and ".join(f"'{folder or '.'}'" for folder in next(iter(self._twice.values()))[:2])
            raise KtrayError(
                f"{count(self._twice, 'image')} of the lists in '{splits}' can be one of several files in "
                f"'{self.root}': {three(self._twice)} (the first one is in {folders})",
                "Keep only one copy below task.data, or use paths in the lists.",
            )


def _folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """(path below the root, file names) of each folder. Linked folders are followed, and no folder is visited twice."""
    visited: set[str] = set()
    queue = deque([""])
    while queue:
        inside = queue.popleft()
        path = f"{root}/{inside}" if inside else root
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        try:
            folders, names = filesystem.children(path)
        except OSError as error:
            raise KtrayError(
                f"Folder '{path}' cannot be listed: {filesystem.why(error)}", "Check its permissions."
            ) from error
        yield inside, names
        queue.extend(f"{inside}/{name}" if inside else name for name in folders)


def _class_of(folder: str, labels: set[str]) -> str:
    """The class, in the spelling of `_plain`, to which a folder belongs by its name; empty for other folders."""
    parts = [_plain(part) for part in nfc(folder).split("/")]
    for start in range(len(parts)):  # the longest name first: "arcade" is different from "amusement/arcade"
        name = "_".join(parts[start:])
        # A top-level folder "train" contains the training images, even if there is a class of that name.
        if name in labels and not (len(parts) == 1 and name.lower() in SPLITS):
            return name
    return ""


def _plain(label: str) -> str:
    return re.sub(r"[/\- ]+", "_", label).strip("_")


def _base(name: str) -> str:
    return name.rpartition("/")[2]
