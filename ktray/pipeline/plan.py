"""``--plan``: the stages of a run, which of them the store holds already, and what the others will cost. Nothing runs.

Time and money follow from an assumed rate (FLOP/s), so they are only as accurate as that rate; the ledger of a run has
the measured values.
"""

from __future__ import annotations

import logging

from ktray.accounting.device import describe_device
from ktray.accounting.prices import hourly_price
from ktray.distributed.allocation import Allocation, allocate
from ktray.errors import KtrayError
from ktray.pipeline.plan_gallery import gallery_images, given_embeddings
from ktray.pipeline.plan_stages import lines, teacher_cost
from ktray.pipeline.resolve import Resolved, resolve, resolve_gallery
from ktray.recipe.schema import Recipe
from ktray.retrieval.crops import Crops
from ktray.storage.store import Store

logger = logging.getLogger("ktray")

# Sustained FLOP/s per device in training and embedding: 35% of the dense bf16 peak of NVIDIA's data sheets.
RATES = {"H200": 346e12, "H100": 346e12, "A100": 109e12, "L40S": 127e12, "L4": 42e12, "A10G": 24e12, "T4": 23e12}
GPU_RATE = 42e12
CORE_RATE = 30e9  # one CPU core, fp32; these models reach between 10 and 60 GFLOP/s in measurements


HEAD = f"\n{'stage':<10}{'in store':<10}{'FLOPs':>12}{'device-hours':>14}{'USD':>10}{'store':>10}  what"


def this_machine(recipe: Recipe) -> Allocation:
    """How the recipe would use this machine."""
    device = describe_device()
    gpus = device.get("gpus") or []
    cores = max(2.0, float(device["cores"]))
    low, high = recipe.cluster.span
    nodes = low if low < high else 1  # on CPUs each worker has a node; assume that all nodes are like this one
    return allocate(
        cores * nodes, float(len(gpus)), nodes, (low, high), recipe.cluster.use_gpu, gpu_share=recipe.cluster.gpu_share
    )


def show(recipe: Recipe, until: str | None = None) -> None:
    """Print the plan for this machine, also when ``RAY_ADDRESS`` is set.

    Args:
        recipe: the recipe, resolved or not.
        until: the last stage to print; None: all stages.
    """
    local = this_machine(recipe)
    logger.info(local.line)
    resolved = resolve(recipe, local)
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    store = Store(resolved.recipe.store)
    whole, unknown = _whole(store, resolved, local)
    logger.info(HEAD)
    total = saved = 0.0
    planned = lines(resolved)
    last = next((i for i, line in enumerate(planned) if line.stage == until), len(planned) - 1)
    for line in planned[: last + 1]:
        there = whole.get(line.stage, False)
        total += line.flops
        saved += line.flops if there else 0.0
        state = "reused" if there else "to run"
        logger.info(_row(line.stage, state, line.flops, rate, price, line.store_bytes, line.what))
    logger.info(_row("total", "", total, rate, price, 0, ""))
    if saved:
        logger.info(_row("to spend", "", total - saved, rate, price, 0, "excludes the stages that are reused"))
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed), without decoding and start-up")
    logger.info(f"store     {store.uri}; {unknown or 'complete stages in the store are reused at no cost'}")


def show_index(recipe: Recipe) -> None:
    """Print the plan for embedding the gallery. Nothing runs."""
    resolved = resolve_gallery(recipe, this_machine(recipe))
    for reason in resolved.reasons:
        logger.info(f"recipe    {reason}")
    rate, price, kind = machine(recipe)
    teacher = teacher_cost(resolved.recipe)
    images, images_text = gallery_images(resolved)
    crops = Crops(recipe.gallery.crops, recipe.gallery.crop_count).most
    rows = images * crops
    logger.info(HEAD)
    what = f"{images_text} gallery images" + (f", {crops} embeddings each" if crops > 1 else "")
    logger.info(
        _row(
            "index",
            "",
            teacher.tower * (rows - given_embeddings(recipe)),
            rate,
            price,
            rows * (teacher.width * 2 + 100),
            what,
        )
    )
    logger.info(f"\nat {rate / 1e12:.3g} TFLOP/s sustained on {kind} (assumed), without decoding")
    logger.info("shards that are already in the index cost nothing")


def machine(recipe: Recipe) -> tuple[float, float | None, str]:
    """The assumed FLOP/s, the price in USD per hour (None: unknown), and the name of the device."""
    device = describe_device()
    gpus = device.get("gpus") or []
    name = str(gpus[0]["name"]) if gpus else ""
    rate = next((r for n, r in RATES.items() if n in name), GPU_RATE) if gpus else CORE_RATE * int(device["cores"])
    return rate, hourly_price(device, recipe.prices), name or f"{device['cores']} CPU cores"


def _whole(store: Store, resolved: Resolved, local: Allocation) -> tuple[dict[str, bool], str]:
    """By name, whether the store holds each stage completely; and, where the teacher is not on this machine, the reason
    why that is not known."""
    import huggingface_hub.constants

    from ktray.pipeline.run import whole_stages

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        return whole_stages(store, resolved, local), ""
    except KtrayError as error:
        return {}, f"the stages that it holds are not known: {error.what}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _row(stage: str, state: str, flops: float, rate: float, price: float | None, stored: float, what: str) -> str:
    hours = flops / rate / 3600
    usd = f"{hours * price:.4f}" if price is not None else "?"
    size = f"{stored / 1e6:.1f} MB" if stored else ""
    return f"{stage:<10}{state:<10}{flops:>12.3g}{hours:>14.4f}{usd:>10}{size:>10}  {what}"
