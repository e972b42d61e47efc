"""The list and the page of the images that jobs/curate.py suggests for labelling (``curate.suggest``)."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, cast

from ktray.retrieval.suggestions_page import MOST, Suggested, page
from ktray.stages.base import RunContext, StageResult
from ktray.stages.curate.stage import small_images
from ktray.stages.manifests import SuggestManifest
from ktray.stages.suggest.stage import LIST
from ktray.storage.columns import read_rows
from ktray.storage.store import Dir

FILES = ("suggestions.csv", "suggestions.html")
# The label is empty and stands beside the address: people are to look at the image, not to confirm the teacher's class.
COLUMNS = ("uri", "label", "rank", "suggested", "probability", "distance", "disagreement")


def write(context: RunContext, suggested: StageResult, folder: Dir) -> dict[str, Any]:
    """Write ``suggestions.csv`` and ``suggestions.html`` into the run folder; returns the entry of ``result.json``.

    Args:
        suggested: the SUGGEST stage.
    """
    rows = {name: values.tolist() for name, values in read_rows(suggested.stage, LIST).items()}
    listed = [
        Suggested(rank, *values)
        for rank, values in enumerate(zip(*(rows[name] for name in _READ), strict=True), start=1)
    ]
    recipe, facts = context.recipe, cast(SuggestManifest, suggested.manifest)
    folder.write(FILES[0], table(listed).encode())
    shown = listed[:MOST]
    images = small_images([one.uri for one in shown], recipe.data.max_pixels)
    folder.write(FILES[1], page(str(recipe.task.name or recipe.task.data), listed, images).encode())
    return {
        "asked": recipe.curate.suggest,
        **{name: facts[name] for name in ("suggested", "candidates", "images", "copies", "repeated")},
        "student": recipe.curate.student,
        "path": folder.file(FILES[0]),
        "page": folder.file(FILES[1]),
    }


_READ = ("uri", "suggested", "probability", "distance", "disagreement")


def table(listed: list[Suggested]) -> str:
    """The suggestions as CSV with the columns `COLUMNS`; ``label`` is empty, and so is an unknown disagreement."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in listed:
        values = (f"{value:.4f}" if math.isfinite(value) else "" for value in one.values)
        writer.writerow([one.uri, "", one.rank, one.suggested, *values])
    return stream.getvalue()
