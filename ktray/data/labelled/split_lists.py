"""Split lists: lines ``file,class`` for images that lie in a folder as their host laid them out.

The folder is listed once, without a look at each file: a million images and more are usual here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ktray.data import filesystem
from ktray.data.labelled.forms import SPLITS, LabelledRow, count, nfc, three
from ktray.data.labelled.layouts import LAYOUTS, PLAIN, Layout, Pairs, recognise
from ktray.errors import KtrayError


def read_split_lists(
    root: str, splits: str, budget: int | None, train_list: str | None, layout: str, notes: list[str]
) -> tuple[list[LabelledRow], Layout]:
    """Rows of all images that the lists in ``splits`` name, found below ``root``, and the layout they have.

    Images of the other train lists that the chosen one does not name are rows of split ``pool``.

    Raises:
        KtrayError: lists that are not there or not of the form, images that are missing, or there twice, classes
            that the data does not have. Each says how many and shows three.
    """
    chosen, larger = choose_lists(splits, budget, train_list, "task.labels_per_class")
    pairs = {kind: read_list(file) for kind, file in chosen.items()}
    found = recognise(pairs.values()) if layout == "auto" else LAYOUTS[layout]
    notes.append("Split lists: " + ", ".join(f"{file.rpartition('/')[2]}" for file in chosen.values()) + ".")
    if found is not PLAIN:
        notes.append(f"Layout: {found.name}.")
    if found.val_is_test and "test" not in pairs and "ILSVRC2012_val_" in pairs.get("val", [("", "")])[0][0]:
        pairs["test"] = pairs.pop("val")
        notes.append("ImageNet's val.txt is the test set, as in the paper.")
    named = set(pairs["train"])
    pairs["pool"] = [p for p in dict.fromkeys(p for other in larger for p in read_list(other)) if p not in named]
    files = Files(root, pairs.values())
    _check_classes(found, files, pairs, splits)
    rows = [files.row(name, label, kind) for kind, some in pairs.items() for name, label in some]
    files.check(splits)
    return rows, found


def choose_lists(
    splits: str, budget: int | None, train_list: str | None, budget_key: str
) -> tuple[dict[str, str], list[str]]:
    """Split to the path of its list, and the paths of the other train lists."""
    if not filesystem.is_folder(splits):
        raise KtrayError(f"task.splits '{splits}' is not a folder", "Name a folder with train*.txt, val.txt, test.txt.")
    lists: dict[str, list[str]] = defaultdict(list)
    for name in filesystem.children(splits)[1]:
        kind = SPLITS.get(re.split(r"[_.\-]", name.lower())[0])
        if kind and name.lower().endswith((".txt", ".csv")):
            lists[kind].append(f"{splits}/{name}")
    if not lists["train"]:
        raise KtrayError(f"'{splits}' has no train*.txt", "Split lists are named train*.txt, val*.txt and test*.txt.")
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
            f"task.train_list '{wanted}' is not in task.splits", f"{hint}It has {', '.join(sorted(stems))}."
        )
    return stems[stem]


def _choose(paths: Sequence[str], budget: int | None, budget_key: str) -> str:
    if len(paths) == 1:
        return paths[0]
    full = r"(train_full|train|val|test)\."
    wanted = rf"train_{budget}img" if budget else full
    fits = [p for p in paths if re.match(wanted, p.rpartition("/")[2])]
    if len(fits) != 1 and budget:
        fits = [p for p in paths if re.match(full, p.rpartition("/")[2])]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(p.rpartition("/")[2] for p in paths)
    raise KtrayError(
        f"It is not clear which of these lists is meant: {listed}",
        f"Set task.train_list to a train list's name, or {budget_key} to the number in it.",
    )


def read_list(path: str, classes: bool = True) -> list[tuple[str, str]]:
    """(file, class) of each line; with ``classes=False`` a line is a file's name and the class is empty."""
    pairs = []
    try:
        lines = filesystem.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KtrayError(
            f"Split list '{path}' cannot be read: {filesystem.why(error)}", "It is text in UTF-8."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not classes:
            pairs.append((line.strip(), ""))
            continue
        name, comma, label = (part.strip() for part in line.rpartition(","))
        if not comma or not name or not label:
            raise KtrayError(f"Split list '{path}' has no 'file,class' in line {number}", "Mend the line.")
        pairs.append((name, nfc(label)))
    if not pairs:
        raise KtrayError(f"Split list '{path}' is empty", "Fill it, or remove it: its split is then drawn from train.")
    return pairs


def _check_classes(layout: Layout, files: Files, pairs: Mapping[str, Pairs], splits: str) -> None:
    lines = Counter(label for some in pairs.values() for _, label in some)
    known = set(layout.classes) or (files.classes if layout.class_folders else set())
    if unknown := [label for label in lines if known and label not in known]:
        number = sum(lines[label] for label in unknown)
        raise KtrayError(
            f"{number} lines of the lists in '{splits}' name {count(unknown, 'class', 'classes')} that {layout.name} "
            f"in '{files.root}' does not have: {three(unknown)}",
            "Check the spelling, and that the archive is unpacked whole.",
        )


class Files:
    """Finds the images that lists name: by the list's path, by name and class folder, or by name alone.

    Attributes:
        root: the folder.
        classes: those of the lists' classes that have a folder.
    """

    def __init__(self, root: str, lists: Iterable[Pairs]) -> None:
        self.root = root
        lists = list(lists)
        wanted = {_base(name) for some in lists for name, _ in some}
        # Places365's class "hunting_lodge_outdoor" lies in "h/hunting_lodge/outdoor" or "hunting_lodge-outdoor".
        self._plain = {label: _plain(label) for some in lists for _, label in some}
        labels = set(self._plain.values())
        self._names: dict[str, set[str]] = {}
        self._by_class: dict[str, list[str]] = defaultdict(list)
        self._by_last: dict[str, list[str]] = defaultdict(list)
        self._free: dict[str, list[str]] = defaultdict(list)  # names in folders that are no class's
        self._versions: dict[str, str] = {}
        self._missing: list[str] = []
        self._twice: dict[str, list[str]] = {}
        for folder, names in self._remote() if filesystem.is_remote(root) else _folders(root):
            self._names[folder] = wanted.intersection(names)
            self._by_last[_base(folder)].append(folder)
            if plain := _class_of(folder, labels):
                self._by_class[plain].append(folder)
            else:
                for name in self._names[folder]:
                    self._free[name].append(folder)
        self.classes = {label for label, plain in self._plain.items() if plain in self._by_class}

    def row(self, name: str, label: str, split: str) -> LabelledRow:
        """The image's row; one that is not found is counted for `check`."""
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
        if "/" in name:  # a path says where, whatever the folder is called
            folder = name.rpartition("/")[0].removeprefix("./").strip("/")
            below = [f for f in self._by_last.get(_base(folder), []) if base in self._names[f]]
            return [f for f in below if f == folder] or [f for f in below if f.endswith(f"/{folder}")]
        own = [f for f in self._by_class.get(self._plain[label], []) if base in self._names[f]]
        if len(own) > 1:  # "t-shirt" and "t_shirt" may both be classes
            own = [f for f in own if f"/{nfc(f)}".endswith(f"/{label}")] or own
        return own or self._free.get(base, [])

    def _version(self, path: str) -> str:
        if filesystem.is_remote(path):
            return self._versions[path]
        try:
            found = os.stat(path)
        except OSError:  # a link to nowhere: reading it says so
            return ""
        return f"{found.st_size}:{found.st_mtime_ns}"

    def _remote(self) -> Iterator[tuple[str, list[str]]]:
        folders: dict[str, list[str]] = defaultdict(list)
        for file in filesystem.walk(self.root):
            folder, _, name = file.path[len(self.root) + 1 :].rpartition("/")
            folders[folder].append(name)
            self._versions[file.path] = f"{file.size}:{file.mtime_ns}"
        yield from folders.items()

    def check(self, splits: str) -> None:
        """Raises KtrayError: images of the lists were not found, or are there more than once."""
        if self._missing:
            raise KtrayError(
                f"{count(self._missing, 'image')} of the lists in '{splits}' not found in '{self.root}': "
                f"{three(self._missing)}",
                "Check task.data: files lie in it by the list's path, in a folder of their class, or by a name of "
                "their own outside of class folders.",
            )
        if self._twice:
            where = " and ".join(f"'{folder or '.'}'" for folder in next(iter(self._twice.values()))[:2])
            raise KtrayError(
                f"{count(self._twice, 'image')} of the lists in '{splits}' can be more than one file in "
                f"'{self.root}': {three(self._twice)} (the first is in {where})",
                "Keep one copy below task.data, or write paths in the lists.",
            )


def _folders(root: str) -> Iterator[tuple[str, list[str]]]:
    """(path below the root, names of its files) of each folder; linked folders are entered, none twice."""
    seen: set[str] = set()
    todo = deque([""])
    while todo:
        inside = todo.popleft()
        path = f"{root}/{inside}" if inside else root
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        try:
            folders, names = filesystem.children(path)
        except OSError as error:
            raise KtrayError(
                f"Folder '{path}' cannot be listed: {filesystem.why(error)}", "Check its permissions."
            ) from error
        yield inside, names
        todo.extend(f"{inside}/{name}" if inside else name for name in folders)


def _class_of(folder: str, labels: set[str]) -> str:
    """The class, in `_plain` spelling, whose images a folder holds by its name; empty for others."""
    parts = [_plain(part) for part in nfc(folder).split("/")]
    for start in range(len(parts)):  # the longest name first: "arcade" is not "amusement/arcade"
        name = "_".join(parts[start:])
        # A folder "train" at the top holds the training images, even where a class is called so.
        if name in labels and not (len(parts) == 1 and name.lower() in SPLITS):
            return name
    return ""


def _plain(label: str) -> str:
    return re.sub(r"[/\- ]+", "_", label).strip("_")


def _base(name: str) -> str:
    return name.rpartition("/")[2]
