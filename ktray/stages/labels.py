"""Decode the labelled images once, in the geometry of the model that will see them.

Train images are kept as square canvases somewhat larger than the model's input (finetuning crops from them on
the device) and in the evaluation view; validation images in the evaluation view. Test images are never read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ktray.data.labelled.masks import check_mask, decode_mask, eval_mask
from ktray.data.labelled.read import LabelledExample
from ktray.data.preprocess import Preprocess
from ktray.data.sources.fetch import decode_image, fetch
from ktray.distributed.ray_data import Item, cpu_shards
from ktray.errors import BadImage, KtrayError
from ktray.stages.base import Reporter, RunContext, StageResult, run_stage
from ktray.stages.manifests import LabelsManifest
from ktray.stages.shard_summary import ShardSummary, pairs
from ktray.storage.columns import write_rows
from ktray.storage.store import Stage
from ktray.training.inputs import Labels

VERSION = 1
SHARD = 256


def labels_of(context: RunContext, done: StageResult) -> Labels:
    """What training needs to know of a whole directory."""
    return Labels(done.stage, context.recipe.task.kind == "segmentation")


def canvas_preprocess(preprocess: Preprocess, factor: float) -> Preprocess:
    """The geometry of canvases: as the model's own, ``factor`` times its size, without the centre crop's margin."""
    height, width = preprocess.size
    return replace(preprocess, size=(round(height * factor), round(width * factor)), crop_pct=1.0)


@dataclass(frozen=True)
class Masks:
    """How label maps are read: `num_classes` of them, the file's value of class 0, see `ktray.data.labelled.masks`."""

    num_classes: int
    offset: int

    @classmethod
    def of(cls, context: RunContext) -> Masks | None:
        """Of the recipe's task; None for classification."""
        if context.recipe.task.kind != "segmentation":
            return None
        return cls(len(context.task.classes), context.task.mask_offset)


def read_examples(
    examples: list[tuple[str, int, str]], max_pixels: int, masks: Masks | None
) -> Iterator[tuple[str, int, np.ndarray | None, np.ndarray | None, str]]:
    """(uri, label, image (H, W, 3), label map (H, W) or None, "") of each; of an unusable one the reason at the end."""
    images = fetch([uri for uri, _, _ in examples])
    maps = fetch([mask for _, _, mask in examples]) if masks else None
    for uri, label, _ in examples:
        _, data, error = next(images)
        _, mask_data, mask_error = next(maps) if maps else (None, None, None)
        try:
            image = decode_image(uri, data, error, max_pixels=max_pixels)
            mask = None
            if masks:
                if mask_data is None:
                    raise BadImage(f"its mask: {mask_error or 'cannot be read'}")
                mask = decode_mask(mask_data, masks.num_classes, offset=masks.offset, max_pixels=max_pixels)
                check_mask(image, mask)
        except BadImage as reason:
            yield uri, label, None, None, reason.reason
            continue
        yield uri, label, image, mask, ""


def decode_examples(
    examples: list[tuple[str, int, str]],
    max_pixels: int,
    transforms: dict[str, Preprocess],
    masks: Masks | None = None,
) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """Fetch, decode and transform labelled images.

    Returns:
        Columns ``uri``, ``label`` and one (N, 3, H, W) uint8 per transform, with masks also its ``<name>_mask``
        (N, H, W) uint8, of the usable images; and the (uri, reason) of the others.
    """
    rows: dict[str, list[Any]] = {"uri": [], "label": [], **{name: [] for name in transforms}}
    rows |= {f"{name}_mask": [] for name in transforms} if masks else {}
    bad: list[tuple[str, str]] = []
    for uri, label, image, mask, reason in read_examples(examples, max_pixels, masks):
        if image is None:
            bad.append((uri, reason))
            continue
        rows["uri"].append(uri)
        rows["label"].append(label)
        for name, transform in transforms.items():
            rows[name].append(transform.eval_transform(image))
            if mask is not None:
                rows[f"{name}_mask"].append(eval_mask(transform, mask))
    columns = {
        "uri": np.array(rows["uri"], dtype=str),
        "label": np.array(rows["label"], dtype=np.int64),
    }
    for name, transform in transforms.items():
        columns[name] = np.stack(rows[name]) if rows[name] else np.zeros((0, 3, *transform.size), np.uint8)
        if masks:
            found = rows[f"{name}_mask"]
            columns[f"{name}_mask"] = np.stack(found) if found else np.zeros((0, *transform.size), np.uint8)
    return columns, bad


@dataclass(frozen=True)
class LabelShard(ShardSummary):
    """``counts``: images by class; one number of all where an image has a mask in place of a class."""

    counts: tuple[int, ...] = ()


class _Decode:
    def __init__(
        self, stage: Stage, preprocess: Preprocess, canvas: Preprocess, max_pixels: int, masks: Masks | None
    ) -> None:
        self.stage, self.preprocess, self.canvas, self.max_pixels = stage, preprocess, canvas, max_pixels
        self.masks = masks

    def __call__(self, item: Item) -> dict[str, Any]:
        transforms = {"pixels": self.preprocess}
        if item["split"] == "train":
            transforms["canvas"] = self.canvas
        examples = [tuple(e) for e in item["examples"]]
        columns, bad = decode_examples(examples, self.max_pixels, transforms, self.masks)
        write_rows(self.stage, item["name"], columns)
        counts = np.bincount(columns["label"]).tolist() if len(columns["label"]) else []
        read = len(item["examples"])
        return LabelShard(item["name"], len(columns["label"]), read, pairs(bad), counts=tuple(counts)).to_json()


def run(context: RunContext, preprocess: Preprocess) -> StageResult:
    """The labelled images, and for segmentation their label maps, for a model with this preprocessing."""
    masks = Masks.of(context)
    canvas = canvas_preprocess(preprocess, context.canvas)

    def work(stage: Stage, reporter: Reporter) -> LabelsManifest:
        items = shard_items("train", context.task.train) + shard_items("val", context.task.val)
        reporter.expect(sum(len(i["examples"]) for i in items))
        decode = _Decode(stage, preprocess, canvas, context.recipe.data.max_pixels, masks)
        kept = reporter.shards(LabelShard.each(cpu_shards(items, decode, context.plan)))
        for split in ("train", "val"):
            if not any(sum(s.counts) for s in kept if s.name.startswith(split)):
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
        asdict(masks) if masks else None,
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
