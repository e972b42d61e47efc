"""``--plan``: what a run would do, what is there already, and what the rest will cost. Nothing is run.

FLOPs are counted on the models' real graphs on the meta device, times the samples that will be processed.
Time and money divide them by a stated rate, so they are no better than that rate; the ledger tells the truth.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from ktray.data.records import is_image
from ktray.data.sources import list_shards
from ktray.device import describe_device
from ktray.errors import KtrayError
from ktray.ledger import hourly_price
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.student import build_student
from ktray.models.teacher import TeacherSource
from ktray.models.teacher_load import build_teacher
from ktray.objectives import build_objective
from ktray.recipe import Recipe
from ktray.resolve import Resolved, resolve
from ktray.resources import Plan, plan
from ktray.store import Store

# Sustained FLOP/s per device in training and embedding: 35% of the dense bf16 peak of NVIDIA's data sheets.
RATES = {"H200": 346e12, "H100": 346e12, "A100": 109e12, "L40S": 127e12, "L4": 42e12, "A10G": 24e12, "T4": 23e12}
GPU_RATE = 42e12
CORE_RATE = 30e9  # one CPU core, fp32; measured figures lie between 10 and 60 GFLOP/s for these models


@dataclass(frozen=True)
class Line:
    """One stage of a plan. ``flops``, ``store_bytes`` are totals; ``seconds`` are device-seconds."""

    stage: str
    flops: float
    store_bytes: float
    what: str


def lines(found: Resolved) -> list[Line]:
    """The stages that the recipe will go through."""
    recipe, task = found.recipe, found.task
    size, classes = int(recipe.image_size or 32), len(task.classes)
    part = recipe.student
    student = on_meta(lambda: build_student(str(part.name), dict(part.kwargs), classes, size).model)
    step = train_flops(student, (3, size, size))
    scored = forward_flops(student, (3, size, size))
    train = recipe.train
    steps, batch = int(train.steps or 1), int(train.batch_size or 1)
    floor = int(recipe.baselines.scratch_steps or steps)
    if recipe.objective.name == "scratch":
        return [
            Line("finetune", step * floor * batch, 0, f"at most {floor} steps of {batch} labelled images"),
            Line("evaluate", scored * len(task.test), 0, f"{len(task.test)} test images"),
        ]
    t = recipe.teacher
    teacher = build_teacher(TeacherSource(str(t.name), t.checkpoint, t.config, t.image_size), device="meta")
    tower = forward_flops(teacher.image_tower, (3, *teacher.preprocess.size))
    width = int(teacher.embed_dim)
    labelled = len(task.train) + len(task.val)
    adapt = tower * labelled
    objective = build_objective(recipe.objective)
    predicts = "logits" in objective.targets_needed
    if predicts and (t.adapt == "finetune" or (t.adapt == "auto" and "finetune" in t.candidates)):
        adapt += 3 * tower * t.finetune.steps * t.finetune.batch_size
    out = [
        Line("adapt", adapt, labelled * width * 2, f"{t.adapt if predicts else 'probe'} on {len(task.train)} labels")
    ]
    images = recipe.transfer.size or (len(task.train) + len(task.unlabeled))
    if recipe.transfer.source in ("generic", "retrieved"):
        gallery, known = _gallery_images(found)
        out.append(Line("index", tower * (gallery or 0), (gallery or 0) * width * 2, f"{known} gallery images"))
        held = len(task.val) + len(task.test)
        search = 2.0 * (gallery or 0) * width * (len(task.train) + held)
        out.append(Line("curate", tower * held + search, images * 100, f"{recipe.transfer.source}, {images:,} images"))
    views = recipe.teach.views * images
    targets = (classes if predicts else 0) + (width if "embedding" in objective.targets_needed else 0)
    stored = views * (3 * size**2 + 2 * targets)
    out.append(Line("teach", tower * views, stored, f"{recipe.teach.views} views of {images:,} images"))
    out.append(Line("transfer", step * steps * batch, 0, f"{steps} steps of {batch}"))
    f = recipe.finetune
    replay = f.replay if objective.reads == "logits" else 0.0
    tuned = step * f.steps * f.batch_size * (1 + replay)
    out.append(Line("finetune", tuned, 0, f"{f.steps} steps of {f.batch_size}{' and replay' if replay else ''}"))
    if recipe.baselines.scratch:
        out.append(Line("scratch", step * floor * batch, 0, f"the floor, at most {floor} steps (stops early)"))
    models = scored * (2 if recipe.baselines.scratch else 1) + tower
    out.append(Line("evaluate", models * len(task.test), 0, f"{len(task.test):,} test images"))
    return out


def _gallery_images(found: Resolved) -> tuple[int, str]:
    """How many, and how sure that is. Tars do not tell: local ones are judged by the first one's images a byte."""
    if found.gallery_images is not None:
        return found.gallery_images, f"{found.gallery_images:,}"
    recipe = found.recipe
    shards = list_shards(recipe.gallery.data or [], column=recipe.gallery.column)
    tars = [s.paths[0] for s in shards if s.count is None]
    if not all(os.path.isfile(p) for p in tars):
        return 0, "an unknown number of"
    with tarfile.open(tars[0]) as first:
        images = sum(is_image(name) for name in first.getnames())
    guess = images * sum(os.path.getsize(p) for p in tars) / max(1, os.path.getsize(tars[0]))
    total = round(guess) + sum(s.count or 0 for s in shards)
    return total, f"about {total:,}"


def this_machine(recipe: Recipe) -> Plan:
    """How the recipe would use this machine."""
    device = describe_device()
    gpus = device.get("gpus") or []
    cores = max(2.0, float(device["cores"]))
    return plan(cores, float(len(gpus)), 1, recipe.cluster.workers, recipe.cluster.use_gpu)


def show(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Print the plan of this machine; with ``RAY_ADDRESS`` set it is still this machine that is described."""
    device, local = describe_device(), this_machine(recipe)
    gpus = device.get("gpus") or []
    found = resolve(recipe, local, say)
    for reason in found.reasons:
        say(f"recipe    {reason}")
    name = str(gpus[0]["name"]) if gpus else ""
    rate = next((r for n, r in RATES.items() if n in name), GPU_RATE) if gpus else CORE_RATE * int(device["cores"])
    price = hourly_price(device, recipe.prices)
    store = Store(found.recipe.store)
    whole, unknown = _whole(store, found, local)
    say("")
    say(f"{'stage':<10}{'in store':<10}{'FLOPs':>12}{'device-hours':>14}{'USD':>10}{'store':>10}  what")
    total = saved = 0.0
    for line in lines(found):
        there = whole.get(line.stage, False)
        total += line.flops
        saved += line.flops if there else 0.0
        state = "reused" if there else "to make"
        say(_row(line.stage, state, line.flops, rate, price, line.store_bytes, line.what))
    say(_row("total", "", total, rate, price, 0, ""))
    if saved:
        say(_row("to spend", "", total - saved, rate, price, 0, "without the stages that are reused"))
    kind = name or f"{device['cores']} CPU cores"
    say(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed); decoding and start-up come on top")
    say(f"store     {store.uri}; {unknown or 'stages that it holds whole are reused at no cost'}")


def _whole(store: Store, found: Resolved, local: Plan) -> tuple[dict[str, bool], str]:
    """Which stages are whole, by name; and why that is not known, where the teacher is not on this machine."""
    import huggingface_hub.constants

    from ktray.pipeline import whole_stages

    was = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        return whole_stages(store, found, local), ""
    except KtrayError as error:
        return {}, f"what it holds of this run is not known: {error.what}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = was


def _row(stage: str, state: str, flops: float, rate: float, price: float | None, stored: float, what: str) -> str:
    hours = flops / rate / 3600
    usd = f"{hours * price:.4f}" if price is not None else "?"
    size = f"{stored / 1e6:.1f} MB" if stored else ""
    return f"{stage:<10}{state:<10}{flops:>12.3g}{hours:>14.4f}{usd:>10}{size:>10}  {what}"
