"""LABELS: decode the labelled images once, in the input geometry of a model.

Training images are stored twice: as canvases somewhat larger than the model's input, from which finetuning cuts views
on the device, and in the evaluation view. Validation images are stored in the evaluation view. Test images are not read
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ktray.data.labelled.decode import LabelReader, decode_examples
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.data.preprocess import Preprocess
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import cpu_shards
from ktray.errors import KtrayError
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import LabelsManifest
from ktray.stages.shard_summary import ShardSummary, pairs
from ktray.storage.columns import write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import task_kind
from ktray.training.inputs import Labels

SHARD = 256


def labels_of(done: StageResult, kind: str) -> Labels:
    """The complete LABELS stage as training reads it; ``kind`` is the task kind."""
    return Labels(done.stage, task_kind(kind), done.version)


def canvas_preprocess(preprocess: Preprocess, factor: float) -> Preprocess:
    """The geometry of canvases: ``factor`` times the size of the model's input, without the margin of the centre
    crop."""
    height, width = preprocess.size
    return replace(preprocess, size=(round(height * factor), round(width * factor)), crop_pct=1.0)


class _Decode:
    def __init__(
        self, stage: Stage, preprocess: Preprocess, canvas: Preprocess, max_pixels: int, reader: LabelReader
    ) -> None:
        self.stage, self.preprocess, self.canvas, self.max_pixels = stage, preprocess, canvas, max_pixels
        self.reader = reader

    def __call__(self, item: Item) -> dict[str, Any]:
        transforms = {"pixels": self.preprocess}
        if item["split"] == "train":
            transforms["canvas"] = self.canvas
        examples = [tuple(e) for e in item["examples"]]
        columns, bad = decode_examples(examples, self.max_pixels, transforms, self.reader)
        write_rows(self.stage, item["name"], columns)
        return ShardSummary(item["name"], len(columns["uri"]), len(item["examples"]), pairs(bad)).to_json()


@dataclass(frozen=True)
class LabelsInputs(StageInputs):
    """The inputs of LABELS.

    Attributes:
        preprocess: preprocessing of the model that reads the images.
        canvas: geometry of the images from which finetuning cuts its views.
        kind: the task kind.
        reader: how labels are read and stored.
    """

    stage = "labels"
    version = 3  # 2: declared inputs; 3: training images in random order

    task: LabelledSet
    preprocess: Preprocess
    canvas: Preprocess
    max_pixels: int
    kind: str
    reader: LabelReader

    @property
    def speed(self) -> dict[str, Any]:
        return {"size": self.canvas.size[0], "kind": self.kind}

    def images_worked(self, counted: int, manifest: Mapping[str, Any]) -> int:
        """The images that were read; the ledger counts images only where a model works."""
        return int(manifest["read"])


def run(context: RunContext, preprocess: Preprocess) -> StageResult:
    """Decode the labelled images and store them with their labels, for a model with this preprocessing."""
    inputs = LabelsInputs(
        task=context.task,
        preprocess=preprocess,
        canvas=canvas_preprocess(preprocess, context.canvas),
        max_pixels=context.recipe.data.max_pixels,
        kind=context.recipe.task.kind,
        reader=context.kind.reader(context.task),
    )
    return run_stage(context.runtime, inputs, work)


def work(inputs: LabelsInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> LabelsManifest:
    # The task's images are sorted by class. Each shard should be a random sample of them.
    order = np.random.default_rng(0).permutation(len(inputs.task.train)).tolist()
    items = shard_items("train", [inputs.task.train[i] for i in order]) + shard_items("val", inputs.task.val)
    reporter.expect(sum(len(i["examples"]) for i in items))
    decode = _Decode(stage, inputs.preprocess, inputs.canvas, inputs.max_pixels, inputs.reader)
    kept = reporter.shards(ShardSummary.each(cpu_shards(items, decode, runtime.plan)))
    for split in ("train", "val"):
        if not any(s.rows for s in kept if s.name.startswith(split)):
            raise KtrayError(
                f"No image of the {split} split can be used", "Check the files that the quarantine list names."
            )
    return {
        "canvas": inputs.canvas.size,
        "size": inputs.preprocess.size,
        "shards": sorted(stage.names(".parquet")),
    }


def shard_items(split: str, examples: list[LabelledExample]) -> list[Item]:
    """The shards of a split, as `cpu_shards` and `map_shards` take them."""
    return [
        {
            "name": f"{split}-{i // SHARD:05d}.parquet",
            "split": split,
            "examples": [[e.uri, e.label, e.mask] for e in examples[i : i + SHARD]],
        }
        for i in range(0, len(examples), SHARD)
    ]
