"""Embedding of a gallery: INDEX, from files to stored embeddings, against the bare encoder on tensors in memory."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ktray.data.decode import MAX_PIXELS
from ktray.data.sources.base import Shard
from ktray.distributed.allocation import Allocation
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.distributed.retried_task import run_with_retries
from ktray.errors import KtrayError
from ktray.jobs.bench.rows import BenchRow, StageSpeed, in_turns
from ktray.models.device import device
from ktray.models.teacher.families.base import TeacherSource, family_of, model_of
from ktray.models.teacher.spec import TeacherSpec, tower_flops
from ktray.retrieval.crops import Crops
from ktray.retrieval.index_dir import IndexDir
from ktray.stages.index.decode import DecodeGallery
from ktray.stages.index.stage import EmbedGallery
from ktray.stages.speed_facts import index_facts

SECONDS = 10.0
BATCH = 64


def encoder(name: str, folder: Path) -> TeacherSpec:
    """Return a published architecture with random weights, which are as fast as trained weights.

    Args:
        name: a value of ``teacher.name`` without published weights. If the teacher library ships its weights, these are
            used.
        folder: folder in which the weights are kept.
    """
    path = folder / f"random-{name.replace(':', '-').replace('/', '-')}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        tower = family_of(name).untrained(model_of(name))
        if tower is None:
            return TeacherSpec.of(TeacherSource(name))
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in tower.state_dict().items()}, str(part))
        part.replace(path)
    return TeacherSpec.of(TeacherSource(name, str(path)))


def embedding(
    shards: list[Shard], images: int, spec: TeacherSpec, plan: Allocation, cores: int, repeats: int, folder: Path
) -> BenchRow:
    """Measure rates in images a second.

    On a CPU, decoding uses a share of the cores, while the encoder has all cores in the limit. So the limit cannot be
    reached with an encoder that costs hardly more than decoding.

    Args:
        images: number of images in the shards.
    """
    limit_rate = partial(_bare_rate, spec, cores, plan)
    rate = limit_rate()
    # Enough images to keep the encoder busy for some seconds; a shorter run would measure the start-up.
    some = shards[: max(1, round(len(shards) * min(1.0, 2 * SECONDS * rate / max(1, images))))]
    limit, reached = in_turns(limit_rate, lambda: through_ray(some, spec, plan, folder), repeats)
    facts: dict[str, float | int | str] = {
        "flops_per_image": tower_flops(spec.tower()),
        "dimensions": spec.embed_dim,
        "device": "GPU" if plan.actor_gpus else "CPU",
    }
    embedded = max(1, round(images * len(some) / len(shards)))
    devices = plan.actors * plan.actor_gpus or 1.0  # without GPUs, this machine
    stage = StageSpeed({"stage": "index", **index_facts(spec, None)}, embedded, devices)
    return BenchRow(f"embed, {spec.source.name}", "images/s", "bare encoder", limit, reached, facts, stage)


def _bare_rate(spec: TeacherSpec, cores: int, plan: Allocation) -> float:
    """`bare` in this process, or in a device worker if the teacher runs on a GPU."""
    if not plan.actor_gpus:
        return bare(spec.tower(), cores)
    what = partial(_bare_of, spec, cores)
    return run_with_retries(
        what, "the encoder", "Choose a smaller encoder.", 0, cpus=plan.actor_cpus, gpus=plan.actor_gpus
    )


def _bare_of(spec: TeacherSpec, cores: int) -> float:
    return bare(spec.tower(), cores)


@torch.inference_mode()
def bare(model: Any, cores: int) -> float:
    """Measure images a second of the encoder on uint8 tensors on its device."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        pixels = torch.randint(0, 256, (BATCH, 3, *model.preprocess.size), dtype=torch.uint8, device=device())
        _wait_for(model.embed(pixels))
        began, images = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < SECONDS:
            _wait_for(model.embed(pixels))
            images += BATCH
        return images / spent
    finally:
        torch.set_num_threads(before)


def _wait_for(out: torch.Tensor) -> None:
    out.sum().item()


def through_ray(shards: list[Shard], spec: TeacherSpec, plan: Allocation, folder: Path) -> float:
    """Measure images a second of INDEX, from the call to the last stored shard."""
    home = folder / "embedded"
    shutil.rmtree(home, ignore_errors=True)
    items: list[Item] = [{"shard": i, "name": s.fingerprint, "source": s.paths[0]} for i, s in enumerate(shards)]
    prepare = DecodeGallery(shards, spec.preprocess, Crops(), MAX_PIXELS)
    began = time.perf_counter()
    rows = sum(done["rows"] for done in map_shards(items, prepare, EmbedGallery(spec, IndexDir(str(home))), plan))
    spent = time.perf_counter() - began
    shutil.rmtree(home, ignore_errors=True)
    if not rows:
        raise KtrayError("No image was embedded", "Check gallery.data.")
    return rows / spent
