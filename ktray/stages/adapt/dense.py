"""ADAPT for segmentation: a linear head on the frozen tower's patch embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.labelled.masks import IGNORE
from ktray.models.flops import count_flops
from ktray.models.maps import resize_map
from ktray.models.teacher.adapted_dense import DenseTeacher
from ktray.models.teacher.dense_head import fit_dense_probe, fit_map_temperature
from ktray.models.teacher.spec import TeacherSpec, device, embed_numpy, tower_flops
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Stage
from ktray.training.evaluation import pixel_scores

BATCH = 64


def fit_heads(
    stage: Stage, decoded: Stage, spec: TeacherSpec, classes: list[str], levels: int, threads: int
) -> dict[str, Any]:
    """The candidate ``probe``, and the pooled embeddings of the labelled images, which are the queries.

    Args:
        decoded: the ``labels`` stage, in the teacher's geometry.
        levels: see `ktray.models.teacher.teacher.Teacher.patch_embeddings`.

    Returns:
        ``scores`` of the candidate on validation, ``start`` for finetuning, ``images`` and ``flops``.
    """
    from ktray.models.teacher.adapted_dense import save_candidate

    torch.set_num_threads(threads)
    teacher = spec.load().drop_text()
    data: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    images = 0
    for split in ("train", "val"):
        names = [n for n in decoded.names(".parquet") if n.startswith(split)]
        shards = [read_rows(decoded, n, ["uri", "pixels", "pixels_mask", "label"]) for n in names]
        pixels = np.concatenate([s["pixels"] for s in shards])
        embedding = embed_numpy(teacher, pixels, BATCH)
        unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        columns = {name: np.concatenate([s[name] for s in shards]) for name in ("uri", "label")}
        write_rows(
            stage,
            f"embedding-{split}.parquet",
            {"uri": columns["uri"].astype(str), "label": columns["label"], "embedding": unit.astype(np.float16)},
        )
        with torch.inference_mode():
            parts = [
                teacher.patch_embeddings(torch.from_numpy(pixels[i : i + BATCH].copy()).to(device()), levels).half()
                for i in range(0, len(pixels), BATCH)
            ]
        # A clone made outside of inference mode: the head is fitted by gradients.
        features = torch.cat(parts).clone()
        data[split] = (features, torch.from_numpy(np.concatenate([s["pixels_mask"] for s in shards])))
        images += len(pixels)
    found: dict[str, Any] = {}

    def fit() -> None:
        found["head"] = fit_dense_probe(*data["train"], len(classes), teacher.level_dims(levels), val=data["val"])

    flops = 2 * tower_flops(teacher) * images + count_flops(fit)
    adapted = DenseTeacher(teacher, found["head"], classes)
    features, masks = data["val"]
    with torch.inference_mode():
        maps = torch.cat([adapted.maps_of(part.float()).cpu() for part in features.split(BATCH)])
    adapted.temperature = fit_map_temperature(maps, masks)
    scores = {"probe": {**score_maps(maps / adapted.temperature, masks), "temperature": adapted.temperature}}
    save_candidate(stage, "probe", adapted)
    return {"scores": scores, "start": "probe", "images": images, "flops": flops}


@torch.inference_mode()
def score_maps(maps: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """`pixel_scores` and ``loss`` (mean over labelled pixels) of logits (N, C, h, w) against masks (N, H, W)."""
    classes = maps.shape[1]
    sums, loss = torch.zeros(3, classes, dtype=torch.float64), 0.0
    for part, mask in zip(maps.split(BATCH), masks.split(BATCH), strict=True):
        resized = resize_map(part.float(), (mask.shape[1], mask.shape[2]))
        loss += float(F.cross_entropy(resized, mask.long(), reduction="sum", ignore_index=IGNORE))
        found, true = resized.argmax(1)[mask != IGNORE], mask[mask != IGNORE].long()
        sums += torch.stack([torch.bincount(x, minlength=classes) for x in (true[found == true], found, true)])
    return {**pixel_scores(*sums), "loss": loss / max(1.0, float(sums[2].sum()))}
