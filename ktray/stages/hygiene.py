"""HYGIENE: look for copies of images in two splits, for torn groups, and for labels that are probably wrong.

The splits and the labels are not changed: what is found is counted, listed and shown. Test images are read here only to
compare them with the others.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ktray.data.fingerprints import pixel_digest
from ktray.data.labelled.hygiene import Finding, counts
from ktray.data.labelled.hygiene_copies import looks
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.preprocess import Ample, Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.distributed.device_work import Item
from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.ray_data import map_numbered
from ktray.errors import BadImage
from ktray.models.teacher.spec import TeacherSpec
from ktray.reporting.hygiene import clauses
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.curate.heldout import embedding, image_shards
from ktray.stages.hygiene_comparisons import OTHERS, TEST, Compare, Compared, splits_of, together
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import HygieneManifest
from ktray.storage.columns import Rows, read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind

logger = logging.getLogger("ktray")

LIST = "findings.parquet"
# Images up to which the driver itself compares, in a few seconds. For more, tasks do.
FEW = 5_000


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
    task = inputs.task
    compare = Compare(
        replace(task, unlabeled=()),  # up to a million names, which would travel to each task
        task_kind(inputs.kind).image_classes,
        inputs.adapt,
        stage,
        _look(inputs, runtime, stage, reporter),
    )
    found = _compared(compare, runtime, reporter)
    reporter.meter.add(flops=sum(one.flops for one in found))
    for note in dict.fromkeys(note for one in found for note in one.notes):
        logger.info(f"hygiene   {note}")
    listed = together(found)
    _write(stage, listed)
    checked = sum(one.checked for one in found)
    return {"counts": counts(listed, task.torn), "torn": task.torn, "checked": checked}


def _compared(compare: Compare, runtime: Runtime, reporter: Reporter) -> list[Compared]:
    """The results of all comparisons, in order. Those of many images run in tasks, side by side."""
    splits = splits_of(compare.task)
    if sum(map(len, splits.values())) <= FEW:
        return [Compared.unpack(compare(part)) for part in compare.parts]
    with open_mailbox(reporter.post) as mailbox:
        heard = replace(compare, mailbox=mailbox)
        results = map_numbered(compare.parts, heard, runtime.plan)
        return [Compared.unpack(columns) for _, columns in sorted(results, key=lambda result: result[0])]


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
    splits = splits_of(inputs.task)
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
