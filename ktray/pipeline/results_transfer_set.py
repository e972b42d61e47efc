"""Write the results of jobs/curate.py (the list of the transfer set, a page to browse it, and numbers about it) and of
jobs/index.py (numbers about the index)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ktray.accounting.device import versions
from ktray.models.teacher.spec import TeacherSpec
from ktray.pipeline import results_suggestions
from ktray.pipeline.results import transfer_set
from ktray.reporting.result import SCHEMA, CurateResult, IndexResult, finished, write_result
from ktray.reporting.transfer_set import on_task_html
from ktray.retrieval.browse import Match, Query, choose, page
from ktray.stages.base import RunContext, StageResult
from ktray.stages.curate.stage import REPEATED, small_images
from ktray.stages.index.gallery import Gallery
from ktray.storage.columns import read_rows
from ktray.storage.store import Dir

LISTED = ("transfer.parquet", "dropped.parquet", "contact_sheet.png")


def write(
    context: RunContext, curated: StageResult, begun: float, suggested: StageResult | None = None
) -> dict[str, Any]:
    """Write the run folder and log it; returns the content of ``result.json``.

    Args:
        suggested: the SUGGEST stage; None: no suggestions were asked for.
    """
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
    content = {"task": recipe.task.name or recipe.task.data, "transfer_set": chosen, **_shared(context, folder, begun)}
    if suggested:
        content["suggestions"] = results_suggestions.write(context, suggested, folder)
    result = write_result(folder, CurateResult(**content))
    context.tracker.final(metrics(result))
    for name in ("transfer.html", "result.json", "recipe.yaml", *LISTED, *results_suggestions.FILES):
        if folder.exists(name):
            context.tracker.stored(folder, name)
    folder.delete("running.json")
    return result


def write_index(context: RunContext, index: StageResult, spec: TeacherSpec, begun: float) -> dict[str, Any]:
    """Write and log the result of jobs/index.py: the content of the index and its cost; returns ``result.json``."""
    folder, facts = context.store.run(context.run_id), index.manifest
    context.runtime.quarantine.write(folder.file("quarantine.parquet"))
    content = {
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
    result = write_result(folder, IndexResult(**content))
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
    """The entries that the results of both jobs share."""
    return {
        "schema": SCHEMA,
        "run_id": context.run_id,
        "folder": folder.uri,
        "cost": context.ledger.summary(),
        "stages": context.ledger.stages(),
        "mlflow": context.tracker.info(),
        "versions": versions(),
        "device": dict(context.ledger.device),
        **finished(begun),
        "wall_seconds": round(time.time() - begun, 2),
    }


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """Numbers about the transfer set for MLflow: images kept and dropped, how evenly the queries contributed, and the
    cost."""
    chosen = result["transfer_set"]
    values = {"transfer.kept": chosen["kept"], "transfer.gallery": chosen["gallery"]}
    values |= {f"transfer.dropped.{reason}": count for reason, count in chosen["dropped"].items()}
    if chosen["coverage"]:
        queries = chosen["coverage"]["queries"]
        values |= {f"coverage.{name}": queries[name] for name in ("empty", "least", "median", "most")}
    values["cost.total_flops"] = result["cost"]["flops"]["total"]
    values["cost.total_device_seconds"] = result["cost"]["device_seconds"]["total"]
    return {name: float(value) for name, value in values.items()}


def _page(context: RunContext, curated: StageResult) -> str:
    rows = read_rows(curated.stage, "transfer.parquet", ["uri", "query", "similarity", "strategies"])
    taken = [tuple(name for name in str(names).split(",") if name) for names in rows["strategies"]]
    uris, query_of = rows["uri"].astype(str), rows["query"].astype(str)
    labels: dict[str, int] = {}
    if any(query_of) and context.kind.image_classes:
        queries = read_rows(curated.stage, "queries.parquet")
        labels = dict(zip(queries["uri"].astype(str).tolist(), queries["label"].tolist(), strict=True))
    # Queries are sorted by class; "" stands for images that were drawn without a query.
    order = sorted(set(query_of.tolist()), key=lambda uri: (labels.get(uri, -1), uri))
    number = {uri: i for i, uri in enumerate(order)}
    query = np.array([number[uri] for uri in query_of], dtype=np.int64)
    shown = choose(query)
    wanted = [*uris[shown].tolist(), *(uri for uri in order if uri)]
    images = small_images(wanted, context.recipe.data.max_pixels)
    part, dropped = context.recipe.transfer, curated.manifest["dropped"]
    repeated = dropped.get(REPEATED, 0)
    return page(
        f"Transfer set of {context.recipe.task.name or context.recipe.task.data}: {part.source}"
        + (f", {part.chosen_strategy.name}" if part.source == "retrieved" else ""),
        f"{len(uris):,} images, {len(shown):,} of them on this page; {sum(dropped.values()) - repeated} copies of "
        f"held-out images and {repeated} near-duplicates within the set were left out",
        context.task.classes,
        [Query(uri, labels.get(uri), images.get(uri)) for uri in order],
        [
            Match(uris[i], int(query[i]), float(rows["similarity"][i]), images[uris[i]], taken[i])
            for i in shown.tolist()
            if uris[i] in images
        ],
        on_task_html(curated.manifest.get("on_task")),
    )
