"""What a call asks for: the recipe of its arguments, and what the user sees while the job runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktray.distributed.connect import lasting_store
from ktray.distributed.explain import user_error
from ktray.errors import KtrayError
from ktray.recipe.load import dotted, load_values
from ktray.recipe.schema import Recipe
from ktray.reporting import log

if TYPE_CHECKING:
    from ktray.api.results import Run

Pairs = list[tuple[str, Any]]


def asked(
    recipes: str | Sequence[str] | None,
    keys: Mapping[str, Any],
    *,
    task: Any = None,
    gallery: Any = None,
    images: Any = None,
    of_run: tuple[str, Run | str | None] | None = None,
) -> Recipe:
    """The recipe of a call. Images in memory are written into the store.

    Args:
        recipes: built-in recipes or files.
        keys: keys of the recipe, nested or dotted.
        task, gallery: see `ktray.distill`.
        images: the images to predict, in the forms of ``gallery``.
        of_run: a key that names a run, and the run; the store of a `Run` is used unless ``keys`` has another.

    Raises:
        KtrayError: a key or a value is wrong, or is given twice.
    """
    names = [recipes] if isinstance(recipes, str) else list(recipes or [])
    pairs: Pairs = [(key, _plain(value)) for key, value in dotted(keys)]
    key, run = of_run or ("", None)
    if isinstance(run, str):
        pairs.append((key, run))
    elif run is not None:
        pairs = [("store", run.store), *pairs, (key, run.folder)]
    store = lasting_store(load_values(names, pairs).store)
    for section, value in (("task", task), ("gallery", gallery), ("predict", images)):
        added = _given(section, value, store)
        if twice := sorted({key for key, _ in pairs} & {key for key, _ in added}):
            argument = "data" if section == "predict" else section
            raise KtrayError(
                f"{twice[0]} is given twice: as a key, and by the argument {argument}", "Leave one of them out."
            )
        pairs += added
    return load_values(names, [*pairs, ("store", store)])


def _given(section: str, value: Any, store: str) -> Pairs:
    """The keys that the argument for ``task``, ``gallery`` or ``predict`` sets."""
    if value is None:
        return []
    # A DatasetDict of Hugging Face is a mapping, too.
    in_memory = type(value).__module__.partition(".")[0] == "datasets"
    if isinstance(value, Mapping) and section != "predict" and not in_memory:
        return [(key, _plain(item)) for key, item in dotted({section: value})]
    if section == "task" and isinstance(value, str):
        from ktray.miniverse import TASKS

        if value in TASKS:
            return [("task.name", value)]
    if isinstance(value, str | os.PathLike):
        return [(f"{section}.data", os.fspath(value))]
    from ktray.api import tables  # its imports take a second

    write = tables.labelled if section == "task" else tables.unlabelled
    return [(f"{section}.data", write(value, store))]


def _plain(value: Any) -> Any:
    """A value as the recipe has it: paths as text, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def shown(quiet: bool) -> Iterator[None]:
    """Show the lines of the job as the command line does, or only warnings.

    Raises:
        KtrayError: the error in the chain of Ray's wrappers, if the job failed with one.
    """
    from ktray.bootstrap import check_torchvision

    if problem := check_torchvision():
        raise KtrayError(problem)
    with log.console(), log.muted() if quiet else contextlib.nullcontext():
        log.verbosity(quiet)
        try:
            yield
        except Exception as error:
            found = user_error(error)
            if found is None or found is error:
                raise
            raise found from error
