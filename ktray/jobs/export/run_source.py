"""The run that is exported."""

from __future__ import annotations

from ktray.errors import KtrayError
from ktray.pipeline.finished_run import FinishedRun, find_run
from ktray.recipe.schema import Recipe


def find(requested: Recipe) -> FinishedRun:
    """Find the run that ``export.run`` names.

    Args:
        requested: see `ktray.pipeline.finished_run.find_run`.

    Raises:
        KtrayError: the run does not exist or has no student, its result is damaged, or its task kind has no export.
    """
    found = find_run(requested, "export")
    for kind in found.kinds:
        if kind.no_export is not None:
            what, remedy = kind.no_export
            raise KtrayError(f"Run '{found.run_id}' {what}", remedy)
    return found
