"""Decode the labelled images once, in the geometry of the model that will see them.

Train images are kept as square canvases somewhat larger than the model's input (finetuning crops from them on
the device) and in the evaluation view; validation images in the evaluation view. Test images are never read here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ktray.data.labelled.decode import LabelReader, decode_examples
from ktray.data.labelled.labelled_set import LabelledExample
from ktray.data.preprocess import Preprocess
from ktray.distributed.ray_data import Item, cpu_shards
from ktray.errors import KtrayError
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.storage.columns import write_rows
from ktray.storage.store import Stage
from ktray.training.inputs import Labels

VERSION = 1
SHARD = 256


def labels_of(context: RunContext, done: StageResult) -> Labels:
    """What training needs to know of a whole directory."""
    return Labels(done.stage, context.kind)


def canvas_preprocess(preprocess: Preprocess, factor: float) -> Preprocess:
    """The geometry of canvases: as the model's own, ``factor`` times its size, without the centre crop's margin."""
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
        return {"name": item["name"], "read": len(item["examples"]), "bad": bad, "rows": len(columns["uri"])}


def run(context: RunContext, preprocess: Preprocess) -> StageResult:
    """The labelled images and their labels, for a model with this preprocessing."""
    reader = context.kind.reader(context.task)
    canvas = canvas_preprocess(preprocess, context.canvas)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        items = shard_items("train", context.task.train) + shard_items("val", context.task.val)
        reporter.expect(sum(len(i["examples"]) for i in items))
        decode = _Decode(stage, preprocess, canvas, context.recipe.data.max_pixels, reader)
        kept = reporter.shards(cpu_shards(items, decode, context.plan))
        for split in ("train", "val"):
            if not any(s["rows"] for s in kept if s["name"].startswith(split)):
                raise KtrayError(
                    f"No image of the {split} split can be used", "Check the files named in the quarantine list."
                )
        return {"canvas": canvas.size, "size": preprocess.size, "shards": sorted(stage.names(".parquet"))}

    parts = [
        VERSION,
        context.fingerprint,
        preprocess.to_dict(),
        canvas.to_dict(),
        context.recipe.data.max_pixels,
        reader.key,
    ]
    return run_stage(context, "labels", parts, work)


def shard_items(split: str, examples: list[LabelledExample]) -> list[Item]:
    """Shards of a split for `cpu_shards` and `map_shards`."""
    return [
        {
            "name": f"{split}-{i // SHARD:05d}.parquet",
            "split": split,
            "examples": [[e.uri, e.label, e.mask] for e in examples[i : i + SHARD]],
        }
        for i in range(0, len(examples), SHARD)
    ]
