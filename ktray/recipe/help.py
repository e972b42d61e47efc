"""The recipe keys in ``--help``: in groups, the most used first, each with its default, type and meaning."""

from __future__ import annotations

import shutil
import textwrap

import yaml

from ktray.recipe.load import schema

MOST_USED = (
    "task.data",
    "task.name",
    "gallery.data",
    "teacher.name",
    "student.name",
    "transfer.size",
    "objective.name",
    "train.steps",
    "store",
    "seed",
)
# In the order of the pipeline; a section that is not named here comes after them.
SECTIONS = {
    "task": "The labelled images, what is predicted from them, and how models are judged.",
    "gallery": "The unlabelled images, and how they are indexed and searched.",
    "data": "Limits for images of any kind.",
    "teacher": "The foundation model that teaches, and how it is adapted to the task.",
    "student": "The small model that is trained.",
    "transfer": "Which images of the gallery the student is pretrained on.",
    "teach": "How the teacher's targets are computed, and the views (augmented images) for which they are computed.",
    "objective": "What the student is pretrained to do.",
    "supervised": "Data of the objective 'supervised'.",
    "train": "Pretraining of the student on the transfer set, and training of the scratch baseline.",
    "finetune": "Finetuning of the student on the labelled images, after pretraining.",
    "baselines": "What the student is compared with.",
    "cluster": "Workers, CPUs and GPUs that the job uses.",
    "mlflow": "Where the run is logged.",
    "curate": "Which images jobs/curate.py suggests for labelling.",
    "compare": "Which methods jobs/compare.py runs side by side.",
    "tune": "What jobs/tune.py searches, and how.",
    "budget": "What a whole search of jobs/tune.py may spend, the final training of the winner included.",
    "export": "Which run jobs/export.py exports, and to what.",
    "predict": "Which model of a run jobs/predict.py applies, and to which images.",
    "bench": "What jobs/bench.py measures.",
}
GENERAL = "General"
# Sections that only one job reads; the help of the other jobs names that job instead of the keys.
READ_BY = {
    "curate": "curate",
    "compare": "compare",
    "tune": "tune",
    "budget": "tune",
    "export": "export",
    "predict": "predict",
    "bench": "bench",
}


def keys(job: str) -> str:
    """All keys of the recipe, for the help of a job.

    Args:
        job: name of the job. Sections that only another job reads are shown as one line.
    """
    rows = {key: (default, kind, text) for key, default, kind, text in schema()}
    groups: dict[str, list[str]] = {}
    for key in rows:
        groups.setdefault(key.partition(".")[0] if "." in key else GENERAL, []).append(key)
    order = [name for name in SECTIONS if name in groups]
    order += [name for name in groups if name not in SECTIONS]  # the general keys, and sections that have no line yet
    own = [name for name in order if READ_BY.get(name) == job]
    common = [name for name in order if name not in READ_BY]
    blocks = ["\n".join(["Most used", *(_key(key, *rows[key]) for key in MOST_USED if key in rows)])]
    for name in (*own, *common):
        lines = [f"{name}: {SECTIONS[name]}" if name in SECTIONS else name]
        if above := [key for key in groups[name] if key in MOST_USED]:
            lines.append(f"  See 'Most used' for {', '.join(above)}.")
        blocks.append("\n".join([*lines, *(_key(key, *rows[key]) for key in groups[name] if key not in MOST_USED)]))
    others = {name: READ_BY[name] for name in order if name in READ_BY and name not in own}
    blocks.append(
        "\n".join(
            f"{name}.*: only read by {reader}; see: python jobs/{reader}.py --help" for name, reader in others.items()
        )
    )
    return "\n\n".join(blocks)


def shown(value: object) -> str:
    """A value in the form of the command line: ``null``, ``false``, ``[a, b]``, ``./ktray-store``."""
    if value is not None and not isinstance(value, bool | int | float | list | dict):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def width() -> int:
    """Width of ``--help`` in columns."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns - 2, 110))


def _key(key: str, default: object, kind: str, text: str) -> str:
    indent = " " * 6
    meaning = textwrap.fill(
        text,
        width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return f"  {key}={shown(default)}  ({kind})\n{meaning}"
