"""Decode the labelled images once, in the geometry of the model that will see them.

Train images are kept as square canvases somewhat larger than the model's input (finetuning crops from them on
the device) and in the evaluation view; validation images in the evaluation view. Test images are never read here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ktray.data.decode import decode_rgb
from ktray.data.labelled import Example
from ktray.data.reading import fetch
from ktray.errors import BadImage, KtrayError
from ktray.models.preprocess import Preprocess
from ktray.stages.base import Context, Done, Reporter, run_stage
from ktray.store import Stage
from ktray.streaming import Item, cpu_shards, write_rows

VERSION = 1
SHARD = 256


def canvas_preprocess(preprocess: Preprocess, factor: float) -> Preprocess:
    """The geometry of canvases: as the model's own, ``factor`` times its size, without the centre crop's margin."""
    height, width = preprocess.size
    return replace(preprocess, size=(round(height * factor), round(width * factor)), crop_pct=1.0)


def decode_examples(
    examples: list[tuple[str, int]], max_pixels: int, transforms: dict[str, Preprocess]
) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """Fetch, decode and transform labelled images.

    Returns:
        Columns ``uri``, ``label`` and one (N, 3, H, W) uint8 per transform, of the usable images, and the
        (uri, reason) of the others.
    """
    rows: dict[str, list[Any]] = {"uri": [], "label": [], **{name: [] for name in transforms}}
    bad: list[tuple[str, str]] = []
    for (uri, label), (_, data, error) in zip(examples, fetch([uri for uri, _ in examples]), strict=True):
        try:
            if data is None:
                raise BadImage(error or "cannot be read")
            image = decode_rgb(data, max_pixels=max_pixels)
        except BadImage as reason:
            bad.append((uri, reason.reason))
            continue
        rows["uri"].append(uri)
        rows["label"].append(label)
        for name, transform in transforms.items():
            rows[name].append(transform.eval_transform(image))
    columns = {
        "uri": np.array(rows["uri"], dtype=str),
        "label": np.array(rows["label"], dtype=np.int64),
    }
    for name, transform in transforms.items():
        shape = (0, 3, *transform.size)
        columns[name] = np.stack(rows[name]) if rows[name] else np.zeros(shape, np.uint8)
    return columns, bad


class _Decode:
    def __init__(self, stage: Stage, preprocess: Preprocess, canvas: Preprocess, max_pixels: int) -> None:
        self.stage, self.preprocess, self.canvas, self.max_pixels = stage, preprocess, canvas, max_pixels

    def __call__(self, item: Item) -> dict[str, Any]:
        transforms = {"pixels": self.preprocess}
        if item["split"] == "train":
            transforms["canvas"] = self.canvas
        columns, bad = decode_examples([tuple(e) for e in item["examples"]], self.max_pixels, transforms)
        write_rows(self.stage, item["name"], columns)
        counts = np.bincount(columns["label"]).tolist() if len(columns["label"]) else []
        return {"name": item["name"], "read": len(item["examples"]), "bad": bad, "counts": counts}


def run(context: Context, preprocess: Preprocess) -> Done:
    """The labelled images for a model with this preprocessing."""
    canvas = canvas_preprocess(preprocess, context.canvas)

    def work(stage: Stage, reporter: Reporter) -> dict[str, Any]:
        items = shard_items("train", context.task.train) + shard_items("val", context.task.val)
        reporter.expect(sum(len(i["examples"]) for i in items))
        decode = _Decode(stage, preprocess, canvas, context.recipe.data.max_pixels)
        kept = reporter.shards(cpu_shards(items, decode, context.plan))
        for split in ("train", "val"):
            if not any(sum(s["counts"]) for s in kept if s["name"].startswith(split)):
                raise KtrayError(
                    f"No image of the {split} split can be used", "Check the files named in the quarantine list."
                )
        return {"canvas": canvas.size, "size": preprocess.size, "shards": sorted(stage.names(".parquet"))}

    parts = [VERSION, context.fingerprint, preprocess.to_dict(), canvas.to_dict(), context.recipe.data.max_pixels]
    return run_stage(context, "labels", parts, work)


def shard_items(split: str, examples: list[Example]) -> list[Item]:
    """Shards of a split for `cpu_shards` and `map_shards`."""
    return [
        {
            "name": f"{split}-{i // SHARD:05d}.parquet",
            "split": split,
            "examples": [[e.uri, e.label] for e in examples[i : i + SHARD]],
        }
        for i in range(0, len(examples), SHARD)
    ]
