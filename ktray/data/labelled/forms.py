"""The forms of labelled images: folders of class folders, lists, and tables are read as rows of one type."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ktray.data import filesystem
from ktray.data.filesystem import FileStat
from ktray.data.labelled.annotations import annotated
from ktray.data.labelled.list_columns import USUAL, ListColumns
from ktray.data.labelled.rows import SPLITS, LabelledRow, count, nfc, three
from ktray.data.labelled.tables import is_table, read_folder_tables, read_table, read_tables, tables_of_folder
from ktray.data.magic import HEAD_BYTES, decodable, image_kind
from ktray.data.sources.base import in_order
from ktray.data.sources.missing_shards import missing_shards
from ktray.data.sources.records import is_image, may_be_image
from ktray.errors import KtrayError

# Names of folders that hold images of any class.
_NO_CLASSES = ("images", "image", "imgs", "img", "photos", "unlabeled", "unlabelled", "unknown", "test_images")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
FORMS = (
    "Name a folder with train/, val/ and test/ that contain class folders, a folder of class folders, or a CSV or "
    "Parquet list with the columns path,label[,split]."
)


def read_rows(data: str, notes: list[str], asked: ListColumns = USUAL, layout: str = "auto") -> list[LabelledRow]:
    """All labelled images of a folder of class folders, of a list, or of the tables that a folder or pattern names.
    Ignored files are reported in ``notes``.

    Args:
        asked: the columns of a list that the recipe names.
        layout: ``classes``: every folder is a class, whatever its name; ``splits``: train, val and test are splits, and
            other folders beside them are ignored; auto: recognised.

    Raises:
        KtrayError: there is nothing that can be read, or no such column.
    """
    normal = filesystem.normalise(data)
    if filesystem.has_glob(normal) and filesystem.stat(normal) is None and not filesystem.is_folder(normal):
        return _pattern(normal, notes, asked)
    path, file = place(data)
    if file is None:
        if tables := tables_of_folder(path):
            return read_folder_tables(tables, notes, asked)
        before = len(notes)
        rows = _folder(path, notes, layout)
        if not rows:
            seen = notes[before:]
            del notes[before:]  # they would say that the tables are ignored
            rows = _tables_below(path, notes, asked)
            if not rows:
                notes[before:] = seen
        else:
            asked.refuse(path, "a folder")
        if not rows:
            raise _nothing(path, notes)
        return rows
    if is_table(path):
        return read_table(file, notes, asked)
    if path.lower().endswith(_ARCHIVES):
        raise KtrayError(f"'{path}' is an archive", "Unpack it, and set task.data to the folder.")
    raise KtrayError(f"'{path}' is not in a format of labelled data", FORMS)


def place(data: str) -> tuple[str, FileStat | None]:
    """The absolute path, and its `FileStat` if it is a file, or None if it is a folder.

    Raises:
        KtrayError: it is neither a file nor a folder, or cannot be read.
    """
    path = filesystem.normalise(data)
    try:
        if filesystem.is_folder(path):
            return path, None
        file = filesystem.stat(path)
    except OSError as error:
        raise KtrayError(f"'{path}' cannot be read: {filesystem.why(error)}", "Check its permissions.") from error
    if file is None:
        raise KtrayError(f"'{path}' does not exist", f"{filesystem.missing(path)} The path comes from task.data.")
    return path, file


def _nothing(path: str, notes: Sequence[str]) -> KtrayError:
    """The error for a folder without labelled images, with what was seen instead."""
    return KtrayError(f"'{path}' has no images in class folders", " ".join([*notes, FORMS]))


def _folder(path: str, notes: list[str], layout: str) -> list[LabelledRow]:
    folders, _ = filesystem.children(path)
    parts: dict[str, list[str]] = defaultdict(list)
    for name in folders:
        if split := SPLITS.get(name.lower()):
            parts[split].append(name)
    if layout == "classes" or "train" not in parts:
        if layout == "splits":
            raise KtrayError(f"'{path}' has no train folder (task.layout=splits)", FORMS)
        if layout == "auto" and parts and set(folders) == {name for names in parts.values() for name in names}:
            raise KtrayError(f"'{path}' has {' and '.join(sorted(parts))} but no train folder", FORMS)
        return _classes(path, "", "train", notes)
    twice = [names for names in parts.values() if len(names) > 1]
    if twice:
        raise KtrayError(
            f"'{path}' has two folders for one split: {' and '.join(twice[0])}", "Merge the folders, or remove one."
        )
    others = [name for name in folders if name.lower() not in SPLITS]
    if layout == "auto" and others and _are_classes(path, parts, others):
        return _classes(path, "", "train", notes)
    if others:
        notes.append(f"Folders other than train, val and test are ignored: {', '.join(others[:5])}.")
    rows: list[LabelledRow] = []
    for split, (name,) in sorted(parts.items(), key=lambda item: item[0] != "train"):
        listed = annotated(path, name, split)
        rows += _classes(path, name, split, notes) if listed is None else listed
    return _without_unlabelled(rows, notes)


def _are_classes(path: str, parts: dict[str, list[str]], others: Sequence[str]) -> bool:
    """Whether folders called train, val or test are classes like the others beside them: they hold images themselves.

    Raises:
        KtrayError: both are possible, because train has class folders and others beside it have images.
    """
    with_images = [name for name in others if _has_images(f"{path}/{name}")]
    names = [name for names in parts.values() for name in names]
    if not with_images:
        return False
    if not any(filesystem.children(f"{path}/{name}")[0] for name in names):
        return True
    if len(names) > 1:  # two folders that are called like splits, with class folders in them, are splits
        return False
    raise KtrayError(
        f"'{path}' has a folder '{names[0]}' with class folders, and beside it folders with images: "
        f"{three(with_images)}",
        "Set task.layout=splits if the others are to be ignored, or task.layout=classes if "
        f"'{names[0]}' is a class as well.",
    )


def _has_images(folder: str) -> bool:
    return any(is_image(name) for name in filesystem.children(folder)[1])


def _without_unlabelled(rows: list[LabelledRow], notes: list[str]) -> list[LabelledRow]:
    """Leave out a test folder without class folders, as in published sets whose test labels are secret."""
    classes = {row.label for row in rows if row.split == "train"}
    labels = {row.label for row in rows if row.split == "test"}
    if len(labels) != 1 or labels <= classes or next(iter(labels)).lower() not in _NO_CLASSES:
        return rows
    dropped = sum(row.split == "test" for row in rows)
    notes.append(
        f"The test folder has no class folders, only '{labels.pop()}' with {dropped} images without labels: it is "
        "ignored."
    )
    return [row for row in rows if row.split != "test"]


def _classes(root: str, inside: str, split: str, notes: list[str]) -> list[LabelledRow]:
    """Rows of a folder of class folders. Images in subfolders of a class folder belong to its class."""
    folder = f"{root}/{inside}" if inside else root
    prefix = f"{inside}/" if inside else ""
    names, files = filesystem.children(folder)
    rows: list[LabelledRow] = []
    empty: list[str] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    for name in names:
        before = len(rows)
        for file in filesystem.walk(f"{folder}/{name}"):
            key = prefix + name + file.path[len(folder) + 1 + len(name) :]
            reason = _unusable(file)
            if reason:
                ignored[reason].append(key[len(prefix) :])
            else:
                rows.append(LabelledRow(file.path, nfc(key), nfc(name), split, f"{file.size}:{file.mtime_ns}"))
        if len(rows) == before:
            empty.append(filesystem.printable(name))
    here = prefix or f"{filesystem.printable(folder)}/"
    for reason, several in sorted(ignored.items()):
        notes.append(f"Files in '{here}' are ignored because {reason}: {three(several)}.")
    loose = sum(map(is_image, files))
    if loose:
        notes.append(f"{loose} images directly in '{here}' are ignored: they are not in a class folder.")
    if empty:
        notes.append(f"Class folders in '{here}' without images are ignored: {three(empty)}.")
    return rows


def _unusable(file: FileStat) -> str:
    """Why a file in a class folder is not one of its images; "" if it is."""
    if filesystem.printable(file.path) != file.path:
        return "their names are not UTF-8"
    if file.size < 0:
        return "they are in linked or unreadable folders"
    if is_image(file.path):
        return ""
    if not may_be_image(file.path):
        return "they are not images"
    # The name says nothing, or something that it need not be: phones and tools write JPEGs called .HEIC or .img.
    try:
        head = filesystem.read_head(file.path, HEAD_BYTES)
    except OSError:
        return "they are not images"
    if decodable(head):
        return ""
    kind = image_kind(head)
    if not kind:
        return "they are not images"
    remedy = "install 'ktray[heic]', or convert them: docs/guide/data.md, Phone photos"
    return f"they are {kind} images, which this installation cannot decode ({remedy})"


def _pattern(pattern: str, notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    matches = filesystem.expand_files(pattern)
    files = [file for path, file in matches if file is not None and is_table(path)]
    if not files:
        raise KtrayError(f"No list of labelled images matches '{pattern}'", f"Check task.data. {FORMS}")
    return read_tables(files, notes, asked)


def _tables_below(path: str, notes: list[str], asked: ListColumns) -> list[LabelledRow]:
    """The rows of tables (Parquet files, tar shards, ...) in a folder, in its folder ``data``, or in its only folder
    that has some; none if there are no such files. CSV lists must be named themselves."""
    found: dict[str, list[FileStat]] = defaultdict(list)
    tables = _one_kind(path, [file for file in filesystem.walk(path) if file.size >= 0])
    for file, _ in tables:
        found[file.path.rpartition("/")[0]].append(file)
    for folder in (path, f"{path}/data"):
        if folder in found:
            return read_tables(found[folder], notes, asked)
    if all(folder.rpartition("/")[0] == path and folder.rpartition("/")[2].lower() in SPLITS for folder in found):
        rows: list[LabelledRow] = []
        for folder, files in sorted(found.items()):
            for file in sorted(files, key=lambda f: f.path):
                rows += read_table(file, notes, asked, SPLITS[folder.rpartition("/")[2].lower()])
        notes += missing_shards(file.path for files in found.values() for file in files)
        return rows
    if len(found) > 1:
        names = [folder.removeprefix(f"{path}/") for folder in sorted(found)]
        raise KtrayError(
            f"'{path}' has {tables[0][1]} in {count(names, 'folder')}: {three(names)}", "Set task.data to one of them."
        )
    return read_tables(next(iter(found.values())), notes, asked) if found else []


def _one_kind(path: str, files: Sequence[FileStat]) -> list[tuple[FileStat, str]]:
    """The files that sources with labels read, each with their plural name. Raises KtrayError if these differ."""
    sources = [source for _, source in in_order() if source.labelled and source.in_folders]
    kinds = ((file, next((s.noun for s in sources if s.fits(file.path)), "")) for file in files)
    found = [(file, noun) for file, noun in kinds if noun]
    counts = Counter(noun for _, noun in found)
    if len(counts) > 1:
        listed = " and ".join(f"{number} {noun}" for noun, number in sorted(counts.items()))
        raise KtrayError(f"'{path}' contains {listed}", "Select one type with a pattern, such as 'DIR/*.parquet'.")
    return found
