"""The definition of every job: its purpose, what it runs, what ``--plan`` shows, and its short options.

``ktray NAME`` and ``python jobs/NAME.py`` both start from here. The functions import what they need themselves, so that
``--help`` and a mistake in the command line need no torch and no Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ktray.recipe.schema import Recipe
from ktray.reporting.log import ending, result

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class Job:
    """One job of the command line.

    Args:
        name: the word after ``ktray``, and the file in ``jobs/``.
        purpose: one line for ``--help``.
        run: runs the job, with the recipe and whether ``--debug`` was given.
        plan: writes what the job would do and cost.
        options: short options, each with the override that it stands for, in which ``{}`` is the word that follows it.
    """

    name: str
    purpose: str
    run: Callable[[Recipe, bool], None]
    plan: Callable[[Recipe], None]
    options: Mapping[str, str] = field(default_factory=dict)


def _distill(recipe: Recipe, debug: bool) -> None:
    from ktray.pipeline.run import run
    from ktray.reporting.report import closing_table

    content = run(recipe, debug)
    folder, uri = content["folder"], content["mlflow"]["tracking_uri"]
    result("")
    result(closing_table(content))
    result(f"\nreport    {folder}/report.html\nstudent   {folder}/student\nresult    {folder}/result.json")
    result(f"runs      mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else f"runs      {uri}")


def _plan_distill(recipe: Recipe) -> None:
    from ktray.pipeline.plan import show

    show(recipe)


def _index(recipe: Recipe, debug: bool) -> None:
    from ktray.pipeline.run import index_only

    content = index_only(recipe, debug)
    index = content["index"]
    result(
        f"\nindex     {index['folder']}: {index['images']:,} images, {index['rows']:,} rows in "
        f"{index['shards']:,} shards"
    )
    result(f"result    {content['folder']}/result.json")


def _plan_index(recipe: Recipe) -> None:
    from ktray.pipeline.plan import show_index

    show_index(recipe)


def _curate(recipe: Recipe, debug: bool) -> None:
    from ktray.pipeline.run import curate_only

    content = curate_only(recipe, debug)
    folder, transfer_set = content["folder"], content["transfer_set"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in transfer_set["dropped"].items()) or "none"
    result(
        f"\nkept      {transfer_set['kept']:,} of {transfer_set['gallery']:,} images; dropped as near-duplicates of "
        f"held-out images: {dropped}"
    )
    result(f"list      {transfer_set['path']}\npage      {folder}/transfer.html\nresult    {folder}/result.json")
    if suggested := content.get("suggestions"):
        result(
            f"label     {suggested['suggested']:,} of {suggested['candidates']:,} unlabelled images, in "
            f"{suggested['path']}\n          ({suggested['page']}); fill in the column label, then run again with "
            f"task.more_labels={suggested['path']}"
        )


def _plan_curate(recipe: Recipe) -> None:
    from ktray.pipeline.plan import show_curate

    show_curate(recipe)


def _compare(recipe: Recipe, debug: bool) -> None:
    from ktray.jobs.compare import compare

    compare(recipe, debug)


def _plan_compare(recipe: Recipe) -> None:
    from ktray.jobs.compare.equal_budget import show

    show(recipe)


def _tune(recipe: Recipe, debug: bool) -> None:
    from ktray.jobs.tune.run import tune

    tune(recipe, debug)


def _plan_tune(recipe: Recipe) -> None:
    from ktray.jobs.tune.plan import report

    report(recipe)


def _export(recipe: Recipe, debug: bool) -> None:
    from ktray.jobs.export.card import closing
    from ktray.jobs.export.run import export

    content = export(recipe, debug)
    result(f"\n{closing(content)}\n\nexport    {content['folder']}\ncard      {content['folder']}/README.md")


def _plan_export(recipe: Recipe) -> None:
    from ktray.jobs.export.run import show

    show(recipe)


def _predict(recipe: Recipe, debug: bool) -> None:
    from ktray.jobs.predict.run import closing, predict

    result(f"\n{closing(predict(recipe, debug))}")


def _plan_predict(recipe: Recipe) -> None:
    from ktray.jobs.predict.run import show

    show(recipe)


def _bench(recipe: Recipe, debug: bool) -> None:
    from ktray.jobs.bench.run import bench

    content = bench(recipe, debug)
    result(f"\ntable     {content['folder']}/bench.md\nresult    {content['folder']}/result.json")


def _plan_bench(recipe: Recipe) -> None:
    logger.info(f"bench     {', '.join(recipe.bench.only)}: {recipe.bench.repeats} turns each, a few minutes in total")


def _doctor(recipe: Recipe, debug: bool) -> None:
    from ktray.distributed.doctor.run import show

    with ending():  # the checks are the result of this job
        show(recipe, debug)


def _plan_doctor(recipe: Recipe) -> None:
    logger.info(
        "Checks versions, store, checkpoints, GPUs, clocks, plan, decoding, network, token and MLflow; costs nothing."
    )


JOBS: Mapping[str, Job] = {
    job.name: job
    for job in (
        Job(
            "distill",
            "From a few labels to a small model: adapt the teacher, retrieve, distil, finetune, test, account.",
            _distill,
            _plan_distill,
        ),
        Job(
            "index",
            "Embed the gallery: a folder of shards that later runs search, and that grows with the gallery.",
            _index,
            _plan_index,
        ),
        Job(
            "curate",
            "Only the transfer set: adapt, index, retrieve, and a page that shows the retrieved images.",
            _curate,
            _plan_curate,
        ),
        Job(
            "compare",
            "Compare pretraining methods on one task: accuracy with its interval against compute, over seeds.",
            _compare,
            _plan_compare,
        ),
        Job(
            "tune",
            "Find the best small model for a budget: a search over transfer sets, objectives, teachers and students.",
            _tune,
            _plan_tune,
        ),
        Job(
            "export",
            "Export the student of a run: ONNX (and int8), plain timm, a model card, a registered version in MLflow.",
            _export,
            _plan_export,
        ),
        Job(
            "predict",
            "Predict the class of every image in a bucket or folder, with the student or the teacher of a run.",
            _predict,
            _plan_predict,
        ),
        Job(
            "bench",
            "Benchmark this machine: the rate of each part as a share of a limit that is measured in the same run.",
            _bench,
            _plan_bench,
            {"--only": "bench.only=[{}]", "--quick": "bench.quick=true", "--json": "bench.json_file={}"},
        ),
        Job(
            "doctor",
            "Check this cluster and recipe before you pay for a job: one line for each check.",
            _doctor,
            _plan_doctor,
        ),
    )
}
