"""The comparisons of HYGIENE: of each two splits, and of the labels. They can run side by side, each in a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ktray.data.labelled.hygiene import COPIES, Checked, Finding, copies_between, doubtful, two_labels
from ktray.data.labelled.hygiene_copies import Looks
from ktray.data.labelled.hygiene_labels import doubts
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.models.teacher.leave_one_out import leave_one_out
from ktray.reporting.heartbeat import beat, heard_by
from ktray.retrieval.heldout_duplicates import SIMILARITY
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import StageResult
from ktray.stages.curate.heldout import stored_columns
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Stage

OTHERS, TEST = "others", "test"  # folders with the looks of images; the test images have one of their own if embedded
# Nearest training or validation images of each held-out image, by the teacher, that are compared by their pixels.
NEAREST = 3
LABELS = "labels"
# Multiplications up to which embeddings are compared: a minute on a few cores.
_MULTIPLICATIONS = 2e12
_VALUES_AT_ONCE = 16_000_000  # cosine similarities in memory: 64 MB
_DIGESTS = ("uri", "file", "pixels_digest")
_JSON = "json"


@dataclass(frozen=True)
class Compared:
    """What one comparison found.

    Attributes:
        checked: number of images whose labels were compared.
        flops: FLOPs of products of embeddings.
        notes: what was left out, one sentence each.
    """

    findings: list[Finding]
    checked: int = 0
    flops: float = 0.0
    notes: Sequence[str] = ()

    def pack(self) -> Rows:
        """The same as a column, as `ktray.distributed.ray_data.map_numbered` takes it."""
        return {_JSON: np.frombuffer(json.dumps(asdict(self)).encode(), dtype=np.uint8)}

    @classmethod
    def unpack(cls, columns: Rows) -> Compared:
        facts = json.loads(columns[_JSON].tobytes())
        return cls(**{**facts, "findings": [Finding(**row) for row in facts["findings"]]})


@dataclass(frozen=True)
class Compare:
    """Runs comparisons of images whose looks are stored.

    Attributes:
        classed: whether each image has one class, so that labels can be compared.
        adapt: the ADAPT stage, with the embeddings of training and validation images; None without a teacher.
        stage: where the looks are stored.
        stored: by folder, the names of the shards there.
        mailbox: handle of the mailbox for heartbeats; None: they are not heard.
    """

    task: LabelledSet
    classed: bool
    adapt: StageResult | None
    stage: Stage
    stored: dict[str, list[str]]
    mailbox: Any = None

    @property
    def parts(self) -> list[str]:
        """The names of all comparisons, in the order of their findings."""
        pairs = (("train", "val"), ("train", "test"), ("val", "test"))
        splits = splits_of(self.task)
        return [" ".join(pair) for pair in pairs if all(splits[name] for name in pair)] + [LABELS]

    def __call__(self, part: str) -> Rows:
        """Run one comparison; see `Compared.pack`."""
        if self.mailbox is None:
            return self._run(part).pack()
        with heard_by(self.mailbox.post.remote):
            return self._run(part).pack()

    def _run(self, part: str) -> Compared:
        if part == LABELS:
            return self._labels()
        first, second = part.split()
        return self._between(first, second)

    def _between(self, first: str, second: str) -> Compared:
        rows = self._rows([first, second])
        parts = [self._checked(name, rows[name]) for name in (first, second)]
        similar: dict[tuple[str, str], list[tuple[int, int]]] = {}
        flops: float = 0.0
        notes: list[str] = []
        a, b = (self._embedded(part, rows[part.split]) for part in parts)
        if a is not None and b is not None and len(a) and len(b):
            similar[first, second], flops, notes = _similar((first, second), a, b)
        found = copies_between(parts, similar, notes)
        return Compared(found, flops=flops, notes=notes)

    def _labels(self) -> Compared:
        rows = self._rows(list(splits_of(self.task)), _DIGESTS)
        checked = sum(len(columns["uri"]) for columns in rows.values())
        if not self.classed:
            return Compared([], checked)
        found = two_labels([self._checked(name, columns) for name, columns in rows.items()])
        if self.adapt:
            unit, uris, labels = adapt_stage.train_embeddings(self.adapt)
            beat("doubtful labels are searched")
            doubted = doubts(leave_one_out(unit, labels, len(self.task.classes)), labels)
            found += doubtful(doubted, uris, labels.tolist(), self.task.classes)
        return Compared(found, checked)

    def _rows(self, names: Sequence[str], columns: Sequence[str] | None = None) -> dict[str, Rows]:
        """By split, the stored columns of its usable images."""
        out: dict[str, Rows] = {}
        splits = splits_of(self.task)
        for folder, shards in self.stored.items():
            own_folder = TEST in self.stored
            inside = [name for name in names if (name == "test" and own_folder) == (folder == TEST)]
            if not inside:
                continue
            table = stored_columns(Stage(self.stage.file(folder)), shards, columns)
            beat("the looks of the images are read")
            place = {str(uri): i for i, uri in enumerate(table["uri"])}
            for name in inside:
                own = np.array([place[e.uri] for e in splits[name] if e.uri in place], dtype=np.int64)
                whole = np.array_equal(own, np.arange(len(place)))  # then a copy would only take memory
                out[name] = {column: values if whole else values[own] for column, values in table.items()}
        return {name: out[name] for name in names if name in out}

    def _checked(self, split: str, rows: Rows) -> Checked:
        classes = self.task.classes if self.classed else []
        label = {e.uri: classes[e.label] if classes else "" for e in splits_of(self.task)[split]}
        uris = [str(uri) for uri in rows["uri"]]
        n = len(uris)
        seen = Looks(rows.get("hash", np.zeros((n, 0), np.uint64)), rows.get("thumb", np.zeros((n, 0), np.uint8)))
        return Checked(split, uris, [label[uri] for uri in uris], rows["file"], rows["pixels_digest"], seen)

    def _embedded(self, part: Checked, rows: Rows) -> np.ndarray | None:
        """(n, D) float32 unit embeddings of the images of a part; None without a teacher."""
        if "embedding" in rows:
            return np.asarray(rows["embedding"], dtype=np.float32)
        return _stored(self.adapt, part) if self.adapt and part.split != "test" else None


def splits_of(task: LabelledSet) -> dict[str, list[LabelledExample]]:
    """The splits by their names."""
    return {"train": task.train, "val": task.val, "test": task.test}


def together(compared: Sequence[Compared]) -> list[Finding]:
    """The findings of all comparisons: copies first, those whose details agree best, then the labels."""
    found = [f for one in compared for f in one.findings]
    copies = sorted((f for f in found if f.kind in COPIES), key=lambda f: (COPIES.index(f.kind), -f.value))
    return copies + [f for f in found if f.kind not in COPIES]


def _stored(adapt: StageResult, part: Checked) -> np.ndarray:
    """(n, D) float32 unit embeddings of the images of a part, which ADAPT has stored; 0 where it has none."""
    rows = read_rows(adapt.stage, f"embedding-{part.split}.parquet")
    place = {str(uri): i for i, uri in enumerate(rows["uri"])}
    vectors = rows["embedding"].astype(np.float32)
    vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
    return np.asarray(vectors[[place.get(uri, -1) for uri in part.uris]])


def _similar(names: tuple[str, str], a: np.ndarray, b: np.ndarray) -> tuple[list[tuple[int, int]], float, list[str]]:
    """For each image of the second split, the most similar images of the first; the FLOPs of that; and notes."""
    first, second = names
    if float(len(a)) * b.size > _MULTIPLICATIONS:
        note = (
            f"{first} and {second} have too many images ({len(a):,} x {len(b):,}) to compare all embeddings: "
            "copies are found by their hashes only"
        )
        return [], 0.0, [note]
    pairs: list[tuple[int, int]] = []
    step = max(1, _VALUES_AT_ONCE // len(a))
    for start in range(0, len(b), step):
        cosine = b[start : start + step] @ a.T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEAREST]
        j, k = np.nonzero(np.take_along_axis(cosine, nearest, 1) >= SIMILARITY)
        pairs += zip(nearest[j, k].tolist(), (j + start).tolist(), strict=True)
        beat(f"{first} and {second} are compared")
    return pairs, 2.0 * len(a) * b.size, []
