"""What one GPU does in ktray against what it can do: `jobs/bench.py --only gpu`.

The limits are measured in the same run: the strongest bare step of each student, over memory layouts, cuDNN's search
for algorithms, torch.compile and CUDA graphs, and the bare forward pass of the teacher in bfloat16.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktray.data.sources.listing import list_shards
from ktray.distributed.allocation import Allocation
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.errors import KtrayError
from ktray.jobs.bench.busy import busy_share
from ktray.jobs.bench.embedding import embedding, encoder
from ktray.jobs.bench.lesson import BenchTargets, Case, ensure_targets
from ktray.jobs.bench.lightly import lightly_rate
from ktray.jobs.bench.rows import BenchRow, StageSpeed
from ktray.jobs.bench.searching import searching
from ktray.jobs.bench.training import VARIANTS, Variant, on_device, stage_speed, through_ktray, timm_step
from ktray.miniverse.photos import ensure_tars
from ktray.models.device import device
from ktray.models.flops import train_flops
from ktray.recipe.load import load
from ktray.stages.speed_facts import teach_facts
from ktray.stages.teach.shards import WithTeacher
from ktray.storage.store import Store

TEACHER = "timm:vit_large_patch14_clip_224"
BATCH, SIDE, IMAGES, VIEWS, STEPS = 256, 224, 4096, 4, 60
STUDENTS = ("fastvit_s12", "vit_small_patch16_224", "mobilenetv3_small_100")
CASES = tuple(Case(name, SIDE, TEACHER, BATCH, IMAGES, large=True) for name in STUDENTS)
JPEG = Variant("cached as JPEG, read from disk", "cached", False, False, jpeg=90)


def gpu(
    folder: Path, plan: Allocation, cores: int, quick: bool = False, vectors: int = 1_000_000
) -> Iterator[BenchRow]:
    """Measure on one GPU.

    Args:
        quick: one small student and few images, which shows that everything runs, also without a GPU.
        vectors: size of the gallery that is searched.

    Raises:
        KtrayError: the plan has no GPU.
    """
    if not plan.worker_gpus:
        raise KtrayError("bench.only=[gpu] needs a GPU, and this plan has none", "Run it on a machine with a GPU.")
    cases = CASES
    if quick:
        small = Case("mobilenetv3_small_050", 64, "timm:vit_tiny_patch16_224", 16, 256, large=True)
        cases, vectors = (small,), 20_000
    for case in cases:
        yield from _students(case, folder, plan, 8 if quick else STEPS, lightly=case is cases[min(1, len(cases) - 1)])
    yield from _teacher(cases[0], folder, plan, cores)
    yield next(searching(folder, vectors, plan, cores, 1, quick=True))
    yield _default_job(folder, quick)


def _students(case: Case, folder: Path, plan: Allocation, steps: int, lightly: bool) -> Iterator[BenchRow]:
    targets = ensure_targets(case, folder, plan)
    rates: dict[str, float] = on_device(_bare_rates, targets, steps, plan)
    eager = max(rate for name, rate in rates.items() if not name.startswith(("compiled", "graph")))
    facts: dict[str, float | int | str] = {"batch": case.batch, "FLOPs of a step": _flops(targets) * case.batch}
    facts |= {f"bare, {name}": rate for name, rate in rates.items()}
    for variant in (*VARIANTS[:2], JPEG, VARIANTS[3]):
        own = targets if variant.jpeg is None else ensure_targets(case, folder, plan, jpeg=variant.jpeg)
        waits: list[float] = []
        count = steps // (3 if variant.with_teacher else 1)
        with busy_share() as busy:
            rate = through_ktray(own, variant, count, plan, folder, waits)
        more = {"data_wait": max(waits), "card busy": busy.share, "TFLOP/s": rate * _flops(targets) / 1e12}
        limit, name = eager, "strongest bare eager step"
        if variant.with_teacher:
            teacher = on_device(_bare_teacher, targets, 8, plan)
            limit, name = 1 / (1 / teacher + 1 / eager), "bare teacher, then bare step"
        stage, title = stage_speed(own, variant, count, plan), f"train {variant.name}, {case.name}"
        yield BenchRow(title, "images/s", name, [limit], [rate], {**facts, **more}, stage)
        if variant.with_teacher:
            rate = on_device(timm_step, targets, count, plan)
            yield BenchRow(f"timm's distillation task, {case.name}", "images/s", name, [limit], [rate])
            if lightly and (peer := lightly_rate(case, folder, max(8, count * 3))) is not None:
                yield BenchRow(f"lightly-train's distillation, {case.name}", "images/s", name, [limit], [peer])


def _teacher(case: Case, folder: Path, plan: Allocation, cores: int) -> Iterator[BenchRow]:
    shards = list_shards(ensure_tars(folder / "photos", case.images, a_tar=50))
    with busy_share() as busy:
        row = embedding(shards, case.images, encoder(case.teacher, folder), plan, cores, 1, folder)
    yield replace(row, name=f"INDEX, {case.teacher}", facts={**row.facts, "card busy": busy.share})
    targets = ensure_targets(case, folder, plan)
    limit = on_device(_bare_teacher, targets, 16, plan)
    stage = Store(str(folder)).stage("bench-teach", "0" * 16)
    stage.delete()
    cut = replace(targets.cut, views=VIEWS)
    items: list[Item] = [{**targets.stage.read_json(f"{name}.images"), "name": name} for name, _ in targets.shards]
    with busy_share() as busy:
        began = time.perf_counter()
        rows = sum(s["rows"] for s in map_shards(items, cut, WithTeacher(stage, targets.predict), plan))
        spent = time.perf_counter() - began
    shutil.rmtree(stage.path, ignore_errors=True)
    facts: dict[str, float | int | str] = {"views": VIEWS, "card busy": busy.share}
    own = teach_facts(case.teacher, cut.size, targets.predict.targets, False)
    stage_facts = StageSpeed({"stage": "teach", **own}, rows, plan.actors * plan.actor_gpus or 1.0)
    limit_name = "bare forward pass in bf16"
    yield BenchRow(f"TEACH, {case.teacher}", "views/s", limit_name, [limit], [rows / spent], facts, stage_facts)


def _default_job(folder: Path, quick: bool) -> BenchRow:
    """The default job (letters) from the call to its result."""
    from ktray.pipeline.run import run

    keys = [f"store={folder / 'default-job'}", *(["train.steps=20", "finetune.steps=5"] if quick else [])]
    shutil.rmtree(folder / "default-job", ignore_errors=True)
    began = time.perf_counter()
    result = run(load(None, keys))
    spent = time.perf_counter() - began
    stages = {f"{row['name']} s": row["wall_seconds"] for row in result["stages"]}
    facts: dict[str, float | int | str] = {**stages, "validation": result["metric"]["val"]}
    return BenchRow("default job (letters)", "1/s", "90 s", [1 / 90], [1 / spent], {"seconds": spent, **facts})


def _flops(targets: BenchTargets) -> float:
    side = targets.case.size
    return train_flops(targets.student.make(bare=True).model, (3, side, side))


def _bare_teacher(targets: BenchTargets, steps: int, threads: int) -> float:
    """Images a second of the teacher's predictions for views in memory."""
    loaded = targets.predict.load()
    pixels = torch.randint(0, 256, (BATCH, 3, *loaded.teacher.preprocess.size), dtype=torch.uint8, device=device())

    @torch.inference_mode()
    def step(number: int) -> None:
        loaded.teacher.logits(pixels)

    return _rate(step, steps, len(pixels))


def _bare_rates(targets: BenchTargets, steps: int, threads: int) -> dict[str, float]:
    """Images a second of the student's step on tensors in memory, for each way to run it; ways that fail are left
    out."""
    case, place = targets.case, device()
    pixels = torch.randint(0, 256, (case.batch, 3, case.size, case.size), dtype=torch.uint8, device=place)
    labels = torch.randint(0, 20, (case.batch,), device=place)
    rates = {}
    for channels_last in (False, True):
        for search in (False, True) if place.type == "cuda" else (False,):
            name = f"{'channels-last' if channels_last else 'contiguous'}{', cuDNN search' if search else ''}"
            torch.backends.cudnn.benchmark = search
            rates[name] = _rate(_stepper(targets, channels_last, pixels, labels), steps, case.batch)
    best = max(rates, key=lambda name: rates[name])
    torch.backends.cudnn.benchmark, layout = "cuDNN" in best, "channels-last" in best
    if place.type == "cuda":
        ways: dict[str, Callable[[], Callable[[int], Any]]] = {
            "compiled": partial(_stepper, targets, layout, pixels, labels, compiled=True),
            "graph": partial(_graph, targets, layout, pixels, labels),
        }
        for name, build in ways.items():
            try:
                rates[name] = _rate(build(), steps, case.batch)
            except Exception:  # a compiler or a graph may refuse a model; then it is no limit
                continue
    torch.backends.cudnn.benchmark = False
    return rates


def _stepper(
    targets: BenchTargets, channels_last: bool, pixels: torch.Tensor, labels: torch.Tensor, compiled: bool = False
) -> Callable[[int], Any]:
    student = targets.student.make(bare=True)
    model, preprocess, place = student.model.to(pixels.device).train(), student.preprocess, pixels.device
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile()
    capturable = {"capturable": True} if place.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True, **capturable)

    def step(number: int) -> None:
        with torch.autocast(place.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(preprocess.scale(pixels)).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _graph(
    targets: BenchTargets, channels_last: bool, pixels: torch.Tensor, labels: torch.Tensor
) -> Callable[[int], Any]:
    step = _stepper(targets, channels_last, pixels, labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(4):
            step(number)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return lambda number: graph.replay()


def _rate(step: Callable[[int], Any], steps: int, batch: int) -> float:
    for number in range(max(3, steps // 4)):
        step(number)
    _settled()
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    _settled()
    return steps * batch / (time.perf_counter() - began)


def _settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
