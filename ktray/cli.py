"""The command line that all jobs share: options, recipe, overrides, help from the schema, one clear line per error."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import ktray
from ktray import recipe as recipes
from ktray.distributed.connect import lasting_store
from ktray.distributed.explain import DONE, FAULT, INPUT, INTERRUPTED, exit_code, explain
from ktray.distributed.termination import handle_sigterm, was_terminated
from ktray.errors import KtrayError
from ktray.jobs.definitions import JOBS, Job
from ktray.recipe.help import READ_BY, keys, shown, width
from ktray.recipe.places import with_absolute_places
from ktray.recipe.schema import Recipe
from ktray.redact import scrub
from ktray.reporting import log
from ktray.reporting.progress import humanise

USAGE = "[options] [--recipe NAME|FILE.yaml ...] [key.path=value ...]"
CHART = "Cost against accuracy in MLflow's own pages, for the runs of an experiment."


@dataclass
class Arguments:
    """A parsed command line.

    Args:
        recipes: names and files after ``--recipe``, in order.
        overrides: ``key=value`` words: first those that the job's short options stand for, then those of the command
            line, in order. The last override of a key counts.
    """

    recipes: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    plan: bool = False
    dry_submit: bool = False
    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    version: bool = False
    help: bool = False


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as `KtrayError`."""

    def error(self, message: str) -> NoReturn:
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem == "expected one argument":
            raise _without_value(option, next(a for a in self._actions if option in a.option_strings))
        raise KtrayError(message[:1].upper() + message[1:], f"Usage: {USAGE}")


class _Collected(argparse.Action):
    """An option that may be given several times. The override that a job's own option stands for is its ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.nargs is None and not values:
            raise _without_value(str(option_string), self)
        value = values if self.const is None else str(self.const).format(values)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), value])


def _without_value(option: str, action: argparse.Action) -> KtrayError:
    if action.const is None:
        return KtrayError(f"{option} needs a name or a file", f"Usage: {USAGE}")
    return KtrayError(f"{option} needs a value", f"It stands for {str(action.const).format('VALUE')}.")


def parser(program: str, purpose: str, options: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """The parser of a job's options. It does not parse words without a dash: these are overrides (see `parse`)."""
    command = _Parser(
        prog=f"python jobs/{program}.py",
        usage=f"python jobs/{program}.py {USAGE}\n       ktray {program} ...  (where ktray is installed)",
        description=purpose,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width()),
        add_help=False,
        allow_abbrev=False,
    )
    group = command.add_argument_group("Options")
    group.add_argument(
        "--recipe",
        action=_Collected,
        dest="recipes",
        default=[],
        metavar="NAME|FILE.yaml",
        help="a built-in recipe or a file; may be given several times; a later recipe overrides keys of earlier ones",
    )
    group.add_argument("--plan", action="store_true", help="show what would be done and what it costs, and do nothing")
    group.add_argument(
        "--dry-submit",
        action="store_true",
        help="print the `ray job submit` that runs this command on a cluster, and do nothing",
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="show only warnings, errors and the final result")
    amount.add_argument(
        "--verbose", action="store_true", help="show more detail, such as all keys that differ from the defaults"
    )
    group.add_argument(
        "--debug", action="store_true", help="show the traceback of an error and what Ray and its workers log"
    )
    group.add_argument("--version", action="store_true", help="show the version of ktray, and the commit in a checkout")
    group.add_argument("-h", "--help", action="store_true", help="show this text")
    command.set_defaults(overrides=[])
    if options:
        own = command.add_argument_group(f"Options of {program} (key.path=value overrides them)")
        for name, pattern in options.items():
            takes = "{}" in pattern
            own.add_argument(
                name,
                action=_Collected,
                dest="overrides",
                const=pattern,
                nargs=None if takes else 0,
                metavar="VALUE" if takes else None,
                default=argparse.SUPPRESS,
                help=f"stands for {pattern.format('VALUE')}",
            )
    return command


def parse(argv: Sequence[str], options: Mapping[str, str] | None = None) -> Arguments:
    """Parse the words of a command line into options and overrides.

    Args:
        argv: the words after the job's name.
        options: the job's own options, each with the override that it stands for, in which ``{}`` is the word that
            follows the option.

    Raises:
        KtrayError: an option is unknown or has no value.
    """
    reader = parser("JOB", "", options)
    options_given, rest = reader.parse_known_args(list(argv))
    for word in rest:
        if word.startswith("-"):
            raise _unknown(word, reader)
    return Arguments(**{**vars(options_given), "overrides": [*options_given.overrides, *rest]})


def _unknown(word: str, reader: argparse.ArgumentParser) -> KtrayError:
    options = [option for action in reader._actions for option in action.option_strings]
    near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return KtrayError(f"Unknown option '{word}'", f"{hint}Usage: {USAGE}; keys are given as key.path=value.")


def help_text(job: Job) -> str:
    """Return usage, options, and the keys of the recipe in groups, each with its default, type and meaning."""
    recipe_names = ", ".join(sorted(path.stem for path in recipes.BUILTIN.glob("*.yaml")))
    return "\n\n".join(
        (
            parser(job.name, job.purpose, job.options).format_help().rstrip(),
            textwrap.fill(f"Built-in recipes: {recipe_names}", width(), subsequent_indent="  ", break_on_hyphens=False),
            "Keys of the recipe, each as key=default  (type):",
            keys(job.name),
        )
    )


def version() -> str:
    """Return ``ktray 0.1.0``, and the commit if ktray runs from a checkout."""
    from ktray.tracking.tags import commit

    head = commit()
    return f"ktray {ktray.__version__}" + (f" (commit {head[:12]})" if head else "")


def entry(argv: Sequence[str] | None = None) -> int:
    """Run ``ktray JOB ...``; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    name, *rest = words or [""]
    if name in JOBS:
        return main(JOBS[name], rest)
    if name == "chart":
        from ktray.jobs import chart

        return chart.main(rest, "ktray chart")
    top = _Parser(
        prog="ktray",
        usage="ktray JOB [options] [key.path=value ...]",
        description=f"{ktray.__doc__}\n\n`ktray JOB --help` lists the options and keys of a job.",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width()),
        add_help=False,
        allow_abbrev=False,
    )
    jobs = top.add_subparsers(title="Jobs", metavar="JOB", dest="job")
    for job in JOBS.values():
        jobs.add_parser(job.name, help=job.purpose, add_help=False)
    jobs.add_parser("chart", help=CHART, add_help=False)
    group = top.add_argument_group("Options")
    group.add_argument("--version", action="store_true", help="show the version of ktray, and the commit in a checkout")
    group.add_argument("-h", "--help", action="store_true", help="show this text")
    with log.console():
        if name == "--version":
            _show(version())
        elif name in ("--help", "-h", ""):
            _show(top.format_help().rstrip())
        else:
            near = difflib.get_close_matches(name, [*JOBS, "chart"], n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            what = f"Unknown option '{name}' before the job's name" if name[:1] == "-" else f"No job is named '{name}'"
            log.logger.error(f"error: {KtrayError(what, f'{hint}`ktray --help` lists the jobs.')}")
            return INPUT
    return DONE if name else INPUT


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, build the recipe, and run or plan the job.

    Returns the exit code: 0 only if the result was written; the others are in `ktray.distributed.explain`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    handle_sigterm()
    with log.console():
        try:
            _main(job, words)
        except KeyboardInterrupt:
            word = "terminated" if was_terminated() else "interrupted"
            log.logger.warning(f"{word}; the same command resumes this job")
            return INTERRUPTED
        except Exception as error:
            if "--debug" in words:
                traceback.print_exc()
            log.logger.error(f"error: {scrub(explain(error))}")
            code = exit_code(error)
            if code == FAULT:
                log.logger.error(
                    "This is a fault of ktray. Please report it with this line, the output of the same command with "
                    "--debug, and log.jsonl of the run folder."
                )
            return code
    return DONE


def _main(job: Job, words: list[str]) -> None:
    started = time.monotonic()
    arguments = parse(words, job.options)
    log.verbosity(arguments.quiet, arguments.verbose or arguments.debug)
    if arguments.help:
        _show(help_text(job))
        return
    if arguments.version:
        _show(version())
        return
    recipe = recipes.load(arguments.recipes, arguments.overrides)
    for line in _unread(arguments.overrides, job.name):
        log.logger.warning(line)
    if arguments.dry_submit:
        from ktray.distributed import submit

        for line in submit.lines(job.name, [w for w in words if w != "--dry-submit"], recipe, os.environ):
            log.result(line)
        return
    from ktray.bootstrap import check_torchvision

    problem = check_torchvision()
    if problem:
        raise KtrayError(problem)
    log.logger.debug(version())
    for line in _changed(recipe, job.name):
        log.logger.debug(f"recipe    {line}")
    store = lasting_store(recipe.store)
    if store != recipe.store:
        log.logger.info(
            f"recipe    store={store} (Ray deletes a job's working folder with the job; on a cluster, set store= to "
            "shared storage)"
        )
        recipe.store = store
    recipe = with_absolute_places(recipe)
    if arguments.plan:
        with log.ending():
            job.plan(recipe)
    else:
        job.run(recipe, arguments.debug)
    log.logger.debug(f"{job.name:<9} ended after {humanise(time.monotonic() - started)}")


def _show(text: str) -> None:
    """Write a text whose reader may close the pipe early, such as ``head``."""
    try:
        log.result(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the buffered rest goes there at exit


def _unread(overrides: Sequence[str], job: str) -> Iterator[str]:
    """Yield a warning for each override that this job does not read. Recipes may have such keys, for other jobs."""
    for word in overrides:
        key = word.partition("=")[0].strip()
        reader = READ_BY.get(key.partition(".")[0], job)
        if reader != job:
            yield f"WARNING: {key} has no effect here: only jobs/{reader}.py reads it"


def _changed(recipe: Recipe, job: str) -> Iterator[str]:
    """Yield the keys of a recipe that differ from the defaults, except those that only other jobs read."""
    for key, default, *_ in recipes.schema():
        first, *rest = key.split(".")
        if READ_BY.get(first, job) != job:
            continue
        value: Any = getattr(recipe, first)
        for part in rest:
            value = getattr(value, part, default)
        if value != default:
            yield f"{key}={scrub(shown(value), key)} (default {shown(default)})"
