"""EVALUATE: read the test split, once, for the student, the scratch floor and the teacher.

Every test image is scored by itself and the counts are made on the driver, so the result depends neither on
the number of workers nor on how images were cut into shards. Unusable test images are quarantined and named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ktray.data.preprocess import Preprocess
from ktray.distributed.ray_data import Item, map_shards
from ktray.errors import KtrayError
from ktray.models.flops import forward_flops
from ktray.models.teacher.spec import AdaptedSpec, device, predict_numpy, tower_flops
from ktray.stages.base import Reporter, RunContext, StageResult, finish_shard, finished_shards, run_stage
from ktray.stages.evaluate import dense
from ktray.stages.labels import Masks, decode_examples, shard_items
from ktray.stages.manifests import EvaluateManifest
from ktray.stages.shard_summary import ShardSummary, pairs
from ktray.storage.columns import Rows, read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks import classification, segmentation
from ktray.training.inputs import StudentSpec

VERSION = 2  # 2: masks


@dataclass(frozen=True)
class _Prepare:
    transforms: dict[str, Preprocess]
    max_pixels: int

    def __call__(self, item: Item) -> Rows:
        columns, bad = decode_examples([tuple(e) for e in item["examples"]], self.max_pixels, self.transforms)
        columns["bad"] = np.array(bad, dtype=str).reshape(-1, 2)
        return columns


class _Score:
    def __init__(self, stage: Stage, students: dict[str, StudentSpec], teacher: AdaptedSpec | None) -> None:
        from ktray.training.worker import WorkerContext

        env = WorkerContext(device(), 0, 1, 1.0)
        self.stage = stage
        self.students = {name: spec.build(env, 0) for name, spec in students.items()}
        self.teacher = teacher.load() if teacher else None
        self.flops = sum(forward_flops(m, (3, *p.size)) for m, p in self.students.values())
        if self.teacher:
            self.flops += tower_flops(self.teacher)

    @torch.inference_mode()
    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        out: Rows = {"uri": columns["uri"], "label": columns["label"]}
        for name, (model, preprocess) in self.students.items():
            model.eval()
            x = torch.from_numpy(columns["student"]).to(device())
            out[name] = model(preprocess.normalise(x)).float().cpu().numpy()
        if self.teacher:
            out["teacher"] = predict_numpy(self.teacher, columns["teacher"], 256)
        write_rows(self.stage, item["name"], out)
        n = len(out["label"])
        bad = pairs(columns["bad"].tolist())
        summary = ShardSummary(item["name"], n, len(item["examples"]), bad, images=n, flops=self.flops * n)
        return finish_shard(self.stage, summary)


@dataclass(frozen=True)
class _MakeScore:
    stage: Stage
    students: dict[str, StudentSpec]
    teacher: AdaptedSpec | None

    def __call__(self) -> _Score:
        return _Score(self.stage, self.students, self.teacher)


def run(
    context: RunContext, students: dict[str, tuple[StudentSpec, str]], teacher: tuple[AdaptedSpec, str] | None
) -> StageResult:
    """Shards of test logits (or counts of pixels) per model, and ``metrics`` by model in the manifest.

    Args:
        students: name to (student, key of the stage that made its weights).
        teacher: (adapted teacher, key of ADAPT), or None.
    """

    recipe, classes = context.recipe, context.task.classes
    masks = Masks.of(context)

    def work(stage: Stage, reporter: Reporter) -> EvaluateManifest:
        spec = next(iter(students.values()))[0]
        transforms = {"student": spec.make(bare=True).preprocess}
        if teacher:
            transforms["teacher"] = teacher[0].preprocess
        items = shard_items("test", context.task.test)
        finished = finished_shards(stage)
        reporter.expect(len(context.task.test))
        reporter.shards(s.resumed() for s in finished.values())
        specs, judge = {n: s for n, (s, _) in students.items()}, teacher[0] if teacher else None
        limit = recipe.data.max_pixels
        todo = [i for i in items if i["name"] not in finished]
        names = [*students, *(["teacher"] if teacher else [])]
        if masks:
            prepare = dense.PrepareMasks(transforms, limit, masks)
            finish = dense.MakeScore(stage, specs, judge, len(classes))
            reporter.shards(ShardSummary.each(map_shards(todo, prepare, finish, context.plan)))
        else:
            found = map_shards(todo, _Prepare(transforms, limit), _MakeScore(stage, specs, judge), context.plan)
            reporter.shards(ShardSummary.each(found))
        rows = load(stage)
        if not len(rows["uri"]):
            raise KtrayError("No test image can be used", "Check the quarantine list and the test split of task.data.")
        if masks:
            return {
                "metrics": {
                    n: segmentation.metrics(rows[f"{n}_tp"], rows[f"{n}_fp"], rows[f"{n}_fn"], classes) for n in names
                }
            }
        return {"metrics": {n: classification.metrics(rows[n], rows["label"], classes) for n in names}}

    parts = [
        VERSION,
        context.fingerprint,
        {name: key for name, (_, key) in students.items()},
        teacher[1] if teacher else None,
        recipe.image_size,
        recipe.data.max_pixels,
        asdict(masks) if masks else None,
    ]
    return run_stage(context, "evaluate", parts, work)


def load(stage: Stage) -> Rows:
    """All test rows: ``uri``, ``label`` and the logits of each model; for segmentation ``uri`` and per model
    ``<name>_tp``, ``<name>_fp``, ``<name>_fn`` (N, C) pixels."""
    shards = [read_rows(stage, name) for name in stage.names(".parquet")]
    return {name: np.concatenate([s[name] for s in shards]) for name in shards[0]}
