"""HYGIENE: look for copies of images in two splits, for torn groups, and for labels that are probably wrong.

The splits and the labels are not changed: what is found is counted, listed and shown. Test images are read here only to
compare them with the others.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ktray.data.fingerprints import pixel_digest
from ktray.data.labelled.hygiene import (
    Checked,
    Finding,
    copies_between,
    counts,
    doubtful,
    two_labels,
)
from ktray.data.labelled.hygiene_copies import Looks, looks
from ktray.data.labelled.hygiene_labels import doubts
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.data.preprocess import Ample, Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.distributed import watchdog
from ktray.distributed.device_work import Item
from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import BadImage
from ktray.models.teacher.leave_one_out import leave_one_out
from ktray.models.teacher.spec import TeacherSpec
from ktray.reporting.heartbeat import beat
from ktray.reporting.hygiene import clauses
from ktray.retrieval.heldout_duplicates import SIMILARITY
from ktray.stages.adapt import stage as adapt_stage
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.curate.heldout import embedding, image_shards, stored_columns
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import HygieneManifest
from ktray.storage.columns import Rows, read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind

logger = logging.getLogger("ktray")

LIST = "findings.parquet"
OTHERS, TEST = "others", "test"  # folders with the looks of images; the test images have one of their own if embedded
# Images up to which the driver itself compares, in a few seconds. For more, a task does, with the looks of all of them.
FEW = 5_000
# Nearest training or validation images of each held-out image, by the teacher, that are compared by their pixels.
NEAREST = 3
# Multiplications up to which embeddings are compared: a minute on a few cores.
_MULTIPLICATIONS = 2e12
_VALUES_AT_ONCE = 16_000_000  # cosine similarities in memory: 64 MB


@dataclass(frozen=True)
class HygieneInputs(StageInputs):
    """The inputs of HYGIENE.

    Attributes:
        kind: the task kind; only one whose images have classes has doubtful labels.
        adapt: the ADAPT stage, which has the embeddings of training and validation images; None without a teacher.
        encoder: the frozen teacher, for the embeddings of the test images; None without a teacher.
    """

    stage = "hygiene"
    version = 2  # 2: large JPEGs are reduced, at most 100,000 candidates of two splits

    task: LabelledSet
    kind: str
    adapt: StageResult | None
    encoder: TeacherSpec | None
    max_pixels: int

    @property
    def speed(self) -> dict[str, Any]:
        return {
            "model": self.encoder.source.name if self.encoder else None,
            "size": self.encoder.preprocess.size[0] if self.encoder else 0,
            "kind": self.kind,
        }


def run(context: RunContext, adapt: StageResult | None, encoder: TeacherSpec | None) -> StageResult:
    """Store ``findings.parquet``: the rows of `ktray.data.labelled.hygiene.Finding`.

    Args:
        adapt, encoder: the ADAPT stage and its frozen teacher; None without a teacher.
    """
    inputs = HygieneInputs(
        task=context.task,
        kind=context.recipe.task.kind,
        adapt=adapt,
        encoder=encoder if adapt else None,
        max_pixels=context.recipe.data.max_pixels,
    )
    done = run_stage(context.runtime, inputs, work)
    for text in clauses(done.manifest.get("counts", {})):
        logger.warning(f"hygiene   WARNING: {text}")
    return done


def work(inputs: HygieneInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> HygieneManifest:
    task, plan = inputs.task, runtime.plan
    compare = partial(_compare, inputs, stage, _look(inputs, runtime, stage, reporter))
    if len(task.train) + len(task.val) + len(task.test) <= FEW:
        found = compare()
    else:
        watchdog.waiting_for("the comparison of the labelled images", f"{plan.actor_cpus:g} CPUs")
        with open_mailbox(reporter.post) as mailbox:
            found = run_with_retries(
                compare,
                "the task that compares labelled images",
                "Use machines with more memory.",
                runtime.cluster.max_failures,
                cpus=plan.actor_cpus,
                mailbox=mailbox,
            )
    reporter.meter.add(flops=found.flops)
    for note in found.notes:
        logger.info(f"hygiene   {note}")
    _write(stage, found.findings)
    return {"counts": counts(found.findings, task.torn), "torn": task.torn, "checked": found.checked}


@dataclass(frozen=True)
class _Compared:
    findings: list[Finding]
    checked: int
    flops: float
    notes: list[str]


def _compare(inputs: HygieneInputs, stage: Stage, stored: dict[str, list[str]]) -> _Compared:
    """Compare the looks of all images, which are stored in shards."""
    task, adapt, classed = inputs.task, inputs.adapt, task_kind(inputs.kind).image_classes
    splits = _splits(task)
    rows = _rows(splits, stage, stored)
    parts = [_checked(name, rows[name], splits[name], task.classes if classed else []) for name in splits]
    embedded = {name: r["embedding"].astype(np.float32) for name, r in rows.items() if "embedding" in r}
    if adapt:
        for part in parts[:2]:
            embedded[part.split] = _stored(adapt, part)
    similar, flops, notes = _similar(embedded)
    found = copies_between(parts, similar, notes)
    if classed:
        found += two_labels(parts)
    if classed and adapt:
        unit, uris, labels = adapt_stage.train_embeddings(adapt)
        beat("doubtful labels are searched")
        found += doubtful(
            doubts(leave_one_out(unit, labels, len(task.classes)), labels), uris, labels.tolist(), task.classes
        )
    return _Compared(found, sum(len(part.uris) for part in parts), flops, notes)


def _splits(task: LabelledSet) -> dict[str, list[LabelledExample]]:
    return {"train": task.train, "val": task.val, "test": task.test}


def findings(done: StageResult) -> list[Finding]:
    """The findings of a HYGIENE stage."""
    rows = {name: values.tolist() for name, values in read_rows(done.stage, LIST).items()}
    return [Finding(**dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]


def _write(stage: Stage, found: list[Finding]) -> None:
    table = [asdict(f) for f in found]
    columns = {
        name: np.array([row[name] for row in table], dtype=np.float64 if kind == "float" else str)
        for name, kind in Finding.__annotations__.items()
    }
    write_rows(stage, LIST, columns)


def _look(inputs: HygieneInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> dict[str, list[str]]:
    """Store ``uri``, ``file``, ``pixels_digest``, ``hash`` and ``thumb`` of the usable images, and with a teacher
    ``embedding`` of test images. ADAPT has embedded the others. Returns by folder the names of the shards."""
    splits = _splits(inputs.task)
    apart = ["test"] if inputs.encoder and splits["test"] else []
    together = [name for name in splits if name not in apart]
    stored = {}
    for folder, names, encoder in ((OTHERS, together, None), (TEST, apart, inputs.encoder)):
        uris = [e.uri for name in names for e in splits[name]]
        if uris:
            prepare = _Look(encoder.preprocess if encoder else None, inputs.max_pixels)
            place = Stage(stage.file(folder))
            stored[folder] = image_shards(runtime, place, uris, prepare, embedding(encoder, place), reporter)
    return stored


def _rows(splits: dict[str, list[LabelledExample]], stage: Stage, stored: dict[str, list[str]]) -> dict[str, Rows]:
    """By split, the columns that `_look` has stored of its usable images."""
    out: dict[str, Rows] = {}
    for folder, shards in stored.items():
        table = stored_columns(Stage(stage.file(folder)), shards)
        beat("the looks of the images are read")
        place = {str(uri): i for i, uri in enumerate(table["uri"])}
        apart = TEST in stored
        for name in splits:
            if (name == "test" and apart) == (folder == TEST):
                own = np.array([place[e.uri] for e in splits[name] if e.uri in place], dtype=np.int64)
                out[name] = {column: values[own] for column, values in table.items()}
    return out


@dataclass(frozen=True)
class _Look:
    preprocess: Preprocess | None
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        uris, images, wholes, files, enough = [], [], [], [], Ample()
        for uri, data, error in fetch(item["uris"]):
            try:
                image = decode_image(uri, data, error, max_pixels=self.max_pixels, enough=enough)
            except BadImage:  # LABELS or EVALUATE quarantines it
                continue
            uris.append(uri)
            images.append(image)
            wholes.append(enough.whole)
            files.append(int.from_bytes(hashlib.blake2b(data or b"", digest_size=8).digest(), "big"))
        seen = looks(images)
        columns: Rows = {
            "uri": np.array(uris, dtype=str),
            "file": np.array(files, dtype=np.uint64),
            "pixels_digest": np.array([pixel_digest(image) for image in images], dtype=np.uint64),
            "hash": seen.hash,
            "thumb": seen.thumb,
        }
        if self.preprocess:
            pixels = [self.preprocess.eval_transform(*pair) for pair in zip(images, wholes, strict=True)]
            columns["pixels"] = np.stack(pixels) if pixels else np.zeros((0, 3, *self.preprocess.size), np.uint8)
        return columns


def _checked(split: str, rows: Rows, examples: list[LabelledExample], classes: list[str]) -> Checked:
    label = {e.uri: classes[e.label] if classes else "" for e in examples}
    uris = [str(uri) for uri in rows["uri"]]
    seen = Looks(rows["hash"], rows["thumb"])
    return Checked(split, uris, [label[uri] for uri in uris], rows["file"], rows["pixels_digest"], seen)


def _stored(adapt: StageResult, part: Checked) -> np.ndarray:
    """(n, D) float32 unit embeddings of the images of a part, which ADAPT has stored; 0 where it has none."""
    rows = read_rows(adapt.stage, f"embedding-{part.split}.parquet")
    place = {str(uri): i for i, uri in enumerate(rows["uri"])}
    vectors = rows["embedding"].astype(np.float32)
    vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
    return vectors[[place.get(uri, -1) for uri in part.uris]]


def _similar(
    embedded: dict[str, np.ndarray],
) -> tuple[dict[tuple[str, str], list[tuple[int, int]]], float, list[str]]:
    """By the names of two splits, for each image of the second the most similar images of the first; the FLOPs of that;
    and notes."""
    found, flops, notes = {}, 0.0, []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        a, b = embedded.get(first), embedded.get(second)
        if a is None or b is None or not len(a) or not len(b):
            continue
        if float(len(a)) * b.size > _MULTIPLICATIONS:
            notes.append(
                f"{first} and {second} have too many images ({len(a):,} x {len(b):,}) to compare all embeddings: "
                "copies are found by their hashes only"
            )
            continue
        flops += 2.0 * len(a) * b.size
        pairs: list[tuple[int, int]] = []
        step = max(1, _VALUES_AT_ONCE // len(a))
        for start in range(0, len(b), step):
            cosine = b[start : start + step] @ a.T
            nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEAREST]
            j, k = np.nonzero(np.take_along_axis(cosine, nearest, 1) >= SIMILARITY)
            pairs += zip(nearest[j, k].tolist(), (j + start).tolist(), strict=True)
            beat(f"{first} and {second} are compared")
        found[first, second] = pairs
    return found, flops, notes
