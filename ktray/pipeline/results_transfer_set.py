"""What jobs/curate.py leaves: the transfer set as a list, a page to browse it, and what it consists of; and what
jobs/index.py leaves: what the index holds."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ktray.accounting.device import versions
from ktray.models.teacher.spec import TeacherSpec
from ktray.pipeline.results import transfer_set
from ktray.reporting.result import SCHEMA, CurateResult, IndexResult, write_result
from ktray.retrieval.browse import Match, Query, choose, page
from ktray.stages.base import RunContext, StageResult
from ktray.stages.curate.stage import REPEATED, small_images
from ktray.stages.index.gallery import Gallery
from ktray.storage.columns import read_rows
from ktray.storage.store import Dir

LISTED = ("transfer.parquet", "dropped.parquet", "contact_sheet.png")


def write(context: RunContext, curated: StageResult, begun: float) -> dict[str, Any]:
    """Write the run folder and log it; returns the content of ``result.json``."""
    folder, facts, recipe = context.store.run(context.run_id), curated.manifest, context.recipe
    folder.write("transfer.html", _page(context, curated).encode())
    for name in LISTED:
        if curated.stage.exists(name):
            folder.write(name, curated.stage.read(name))
    chosen = {
        **transfer_set(recipe, facts, folder),
        "gallery": facts["gallery"],
        "coverage": facts.get("coverage"),
    }
    found = {"task": recipe.task.name or recipe.task.data, "transfer_set": chosen, **_shared(context, folder, begun)}
    result = write_result(folder, CurateResult(**found))
    context.tracker.final(metrics(result))
    for name in ("transfer.html", "result.json", "recipe.yaml", *LISTED):
        if folder.exists(name):
            context.tracker.stored(folder, name)
    folder.delete("running.json")
    return result


def write_index(context: RunContext, index: StageResult, spec: TeacherSpec, begun: float) -> dict[str, Any]:
    """The same for jobs/index.py: what the index holds and what it cost."""
    folder, facts = context.store.run(context.run_id), index.manifest
    context.runtime.quarantine.write(folder.file("quarantine.parquet"))
    found = {
        "teacher": context.recipe.teacher.name,
        "index": {
            "folder": Gallery.of(index).folder.uri,
            "images": facts["images"],
            "rows": facts["rows"],
            "shards": facts["shard_count"],
            "dimensions": spec.embed_dim,
            "crops": context.recipe.gallery.crops,
            "search": facts["search"],
        },
        "data": {
            "read": context.runtime.read,
            "quarantined": context.runtime.quarantine.images(),
            "quarantine_list": folder.file("quarantine.parquet"),
        },
        **_shared(context, folder, begun),
    }
    result = write_result(folder, IndexResult(**found))
    cost = result["cost"]
    context.tracker.final(
        {
            "index.images": float(facts["images"]),
            "index.rows": float(facts["rows"]),
            "cost.total_flops": float(cost["flops"]["total"]),
            "cost.total_device_seconds": float(cost["device_seconds"]["total"]),
        }
    )
    folder.delete("running.json")
    return result


def _shared(context: RunContext, folder: Dir, begun: float) -> dict[str, Any]:
    """What both results have in common."""
    return {
        "schema": SCHEMA,
        "run_id": context.run_id,
        "folder": folder.uri,
        "cost": context.ledger.summary(),
        "stages": context.ledger.stages(),
        "mlflow": context.tracker.info(),
        "versions": versions(),
        "device": dict(context.ledger.device),
        "wall_seconds": round(time.time() - begun, 2),
    }


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """The set in numbers for MLflow: what was kept and dropped, how evenly the queries brought it, and its cost."""
    chosen = result["transfer_set"]
    found = {"transfer.kept": chosen["kept"], "transfer.gallery": chosen["gallery"]}
    found |= {f"transfer.dropped.{reason}": count for reason, count in chosen["dropped"].items()}
    if chosen["coverage"]:
        queries = chosen["coverage"]["queries"]
        found |= {f"coverage.{name}": queries[name] for name in ("empty", "least", "median", "most")}
    found["cost.total_flops"] = result["cost"]["flops"]["total"]
    found["cost.total_device_seconds"] = result["cost"]["device_seconds"]["total"]
    return {name: float(value) for name, value in found.items()}


def _page(context: RunContext, curated: StageResult) -> str:
    rows = read_rows(curated.stage, "transfer.parquet", ["uri", "query", "similarity", "strategies"])
    taken = [tuple(name for name in str(names).split(",") if name) for names in rows["strategies"]]
    uris, brought_by = rows["uri"].astype(str), rows["query"].astype(str)
    labels: dict[str, int] = {}
    if any(brought_by) and context.kind.image_classes:
        asked = read_rows(curated.stage, "queries.parquet")
        labels = dict(zip(asked["uri"].astype(str).tolist(), asked["label"].tolist(), strict=True))
    # Queries in the order of their classes; "" stands for a draw without query.
    order = sorted(set(brought_by.tolist()), key=lambda uri: (labels.get(uri, -1), uri))
    number = {uri: i for i, uri in enumerate(order)}
    query = np.array([number[uri] for uri in brought_by], dtype=np.int64)
    shown = choose(query)
    wanted = [*uris[shown].tolist(), *(uri for uri in order if uri)]
    images = small_images(wanted, context.recipe.data.max_pixels)
    part, dropped = context.recipe.transfer, curated.manifest["dropped"]
    again = dropped.get(REPEATED, 0)
    return page(
        f"Transfer set of {context.recipe.task.name or context.recipe.task.data}: {part.source}"
        + (f", {part.chosen_strategy.name}" if part.source == "retrieved" else ""),
        f"{len(uris):,} images, {len(shown):,} of them here; left out were {sum(dropped.values()) - again} copies of "
        f"held-out images and {again} that show the same as another",
        context.task.classes,
        [Query(uri, labels.get(uri), images.get(uri)) for uri in order],
        [
            Match(uris[i], int(query[i]), float(rows["similarity"][i]), images[uris[i]], taken[i])
            for i in shown.tolist()
            if uris[i] in images
        ],
    )
