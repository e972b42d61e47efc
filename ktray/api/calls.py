"""The jobs as functions. Each runs on the Ray cluster that this process is connected to, or starts Ray on this machine.

A call that is interrupted continues where it stopped if it is made again, also in another process, because every job
looks for its finished stages and shards in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ktray.api.asked import asked, shown

if TYPE_CHECKING:
    from ktray.api.results import CompareRun, CurateRun, ExportRun, IndexRun, PredictRun, Run, TuneRun

Recipes = str | Sequence[str] | None
Keys = Any  # a value of the recipe, or a mapping of keys to values


def distill(task: Any = None, gallery: Any = None, *, recipe: Recipes = None, quiet: bool = False, **keys: Keys) -> Run:
    """From a few labels to a small model, as ``jobs/distill.py``.

    Without arguments, it learns the built-in letters. The same call again continues an interrupted run; after a
    finished one, it makes a new run that reuses all stages.

    Args:
        task: the labelled images: the name of a built-in task, a folder or list (``task.data``), keys of the section
            ``task``, or images in memory: pairs (path, label) or triples (path, label, split), or a table with the
            columns ``label`` and ``path`` or ``image`` (`ktray.api.tables` has the accepted types).
        gallery: the unlabelled images: folders, tars, Parquet or CSV (``gallery.data``), keys of the section
            ``gallery``, a list of image files, or a table.
        recipe: names of built-in recipes, or YAML files, as after ``--recipe``.
        quiet: show only warnings, and no progress.
        keys: keys of the recipe, as nested mappings (``train={"steps": 500}``) or, in ``**{}``, as dotted names
            (``**{"train.steps": 500}``).

    Returns:
        The finished run.

    Raises:
        KtrayError: a key, a value or the data are wrong, or the job failed; the message says what to change.

    Example:
        >>> import ktray
        >>> run = ktray.distill("photos/", gallery="unlabelled/", train={"steps": 500})
        >>> run.metric
        0.883
    """
    from ktray.api.results import Run
    from ktray.pipeline.run import run

    wanted = asked(recipe, keys, task=task, gallery=gallery)
    with shown(quiet):
        return Run(run(wanted)["folder"])


def compare(
    task: Any = None, gallery: Any = None, *, recipe: Recipes = None, quiet: bool = False, **keys: Keys
) -> CompareRun:
    """Compare methods on one task at equal cost, as ``jobs/compare.py``. The arguments are those of `distill`.

    Example:
        >>> import ktray
        >>> found = ktray.compare("photos/", gallery="unlabelled/", compare={"seeds": [0, 1, 2]})
        >>> found.report
    """
    from ktray.api.results import CompareRun
    from ktray.jobs.compare import compare as job

    wanted = asked(recipe, keys, task=task, gallery=gallery)
    with shown(quiet):
        return CompareRun(job(wanted)["folder"])


def tune(
    task: Any = None, gallery: Any = None, *, recipe: Recipes = None, quiet: bool = False, **keys: Keys
) -> TuneRun:
    """Search for the best small model within a budget, as ``jobs/tune.py``. The arguments are those of `distill`.

    Example:
        >>> import ktray
        >>> found = ktray.tune("photos/", gallery="unlabelled/", budget={"wall": 60})
        >>> found.winner.student
    """
    from ktray.api.results import TuneRun
    from ktray.jobs.tune.run import tune as job

    wanted = asked(recipe, keys, task=task, gallery=gallery)
    with shown(quiet):
        return TuneRun(job(wanted)["folder"])


def curate(
    task: Any = None, gallery: Any = None, *, recipe: Recipes = None, quiet: bool = False, **keys: Keys
) -> CurateRun:
    """Only the transfer set, as ``jobs/curate.py``. The arguments are those of `distill`.

    Example:
        >>> import ktray
        >>> found = ktray.curate("photos/", gallery="unlabelled/", transfer={"size": 2000})
        >>> found.table
    """
    from ktray.api.results import CurateRun
    from ktray.pipeline.run import curate_only

    wanted = asked(recipe, keys, task=task, gallery=gallery)
    with shown(quiet):
        return CurateRun(curate_only(wanted)["folder"])


def index(gallery: Any = None, *, recipe: Recipes = None, quiet: bool = False, **keys: Keys) -> IndexRun:
    """Embed a gallery, so that later runs can search it, as ``jobs/index.py``.

    Args:
        gallery, recipe, quiet, keys: see `distill`.

    Example:
        >>> import ktray
        >>> found = ktray.index("unlabelled/", teacher={"name": "efficientnet-lite0"})
    """
    from ktray.api.results import IndexRun
    from ktray.pipeline.run import index_only

    wanted = asked(recipe, keys, gallery=gallery)
    with shown(quiet):
        return IndexRun(index_only(wanted)["folder"])


def export(run: Run | str | None = None, *, quiet: bool = False, **keys: Keys) -> ExportRun:
    """Write the student of a run as files to deploy, as ``jobs/export.py``.

    Args:
        run: the run, or its id or folder; None: the newest run in the store.
        quiet, keys: see `distill`.

    Example:
        >>> import ktray
        >>> files = ktray.export(run, export={"int8": True})
    """
    from ktray.api.results import ExportRun
    from ktray.jobs.export.run import export as job

    wanted = asked(None, keys, of_run=("export.run", run))
    with shown(quiet):
        return ExportRun(job(wanted)["folder"])


def predict(run: Run | str | None = None, data: Any = None, *, quiet: bool = False, **keys: Keys) -> PredictRun:
    """Predict every image of a folder, a bucket or a table on the cluster, as ``jobs/predict.py``.

    For a few images in this process, use ``run.student.predict(images)``.

    Args:
        run: the run, or its id or folder; None: the newest run in the store.
        data: the images, as ``gallery`` of `distill`.
        quiet, keys: see `distill`.

    Example:
        >>> import ktray
        >>> found = ktray.predict(run, "s3://bucket/photos", predict={"model": "teacher"})
        >>> found.dataset.to_table().to_pandas()
    """
    from ktray.api.results import PredictRun
    from ktray.jobs.predict.run import predict as job

    wanted = asked(None, keys, images=data, of_run=("predict.run", run))
    with shown(quiet):
        return PredictRun(job(wanted)["folder"])


def open_run(folder: str, store: str | None = None) -> Run:
    """Open a finished run of `distill` or of ``jobs/distill.py``.

    Args:
        folder: the run folder, local or ``s3://``; or its id, in ``store``.
        store: the store of the run, if ``folder`` is an id; None: ``./ktray-store``.

    Raises:
        KtrayError: there is no such run, or it has no student.

    Example:
        >>> import ktray
        >>> run = ktray.open_run("ktray-store/runs/20260101-120000-photos-oriented-1a2b")
    """
    from ktray.api.results import Run
    from ktray.pipeline.finished_run import find_run

    values: dict[str, Any] = {"export.run": str(folder), **({} if store is None else {"store": store})}
    remedy = "Give open_run the folder of a finished run, or its id and the store that it is in."
    return Run(find_run(asked(None, values), "export", remedy).folder.uri)
