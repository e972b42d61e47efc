"""The command line that all jobs share: recipe, overrides, help from the schema, one clear line per error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ktray import recipe as recipes
from ktray.distributed.connect import lasting_store
from ktray.distributed.explain import explain
from ktray.errors import KtrayError
from ktray.recipe.schema import Recipe
from ktray.redact import scrub

DRY_SUBMIT = "prints the `ray job submit` that does this on a cluster, and does nothing"
USAGE = "[--recipe NAME|FILE.yaml ...] [key.path=value ...] [--plan] [--dry-submit] [--debug] [--help]"


@dataclass
class Arguments:
    """A parsed command line."""

    recipes: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    plan: bool = False
    dry_submit: bool = False
    debug: bool = False
    help: bool = False


def parse(argv: list[str], options: Mapping[str, str] | None = None) -> Arguments:
    """Raises `KtrayError` for an unknown option.

    Args:
        options: a job's own: each stands for an override, in which ``{}`` is the word that follows the option.
    """
    found, own = Arguments(), options or {}
    rest = iter(argv)
    for word in rest:
        if word in ("--help", "-h"):
            found.help = True
        elif word == "--plan":
            found.plan = True
        elif word == "--dry-submit":
            found.dry_submit = True
        elif word == "--debug":
            found.debug = True
        elif word == "--recipe" or word.startswith("--recipe="):
            value = word.partition("=")[2] or next(rest, "")
            if not value:
                raise KtrayError("--recipe needs a name or a file", f"Usage: {USAGE}")
            found.recipes.append(value)
        elif word.partition("=")[0] in own:
            name, _, value = word.partition("=")
            value = value or (next(rest, "") if "{}" in own[name] else "")
            if "{}" in own[name] and not value:
                raise KtrayError(f"{name} needs a value", f"It stands for {own[name].format('VALUE')}.")
            found.overrides.append(own[name].format(value))
        elif word.startswith("-"):
            raise KtrayError(f"Unknown option '{word}'", f"Usage: {USAGE}; keys are given as key.path=value.")
        else:
            found.overrides.append(word)
    return found


def help_text(program: str, purpose: str, options: Mapping[str, str] | None = None) -> str:
    """Usage and every key of the recipe with type, default and meaning."""
    lines = [f"python jobs/{program}.py {USAGE}", "", purpose, ""]
    lines += ["  --plan  says what would be done and what it costs", f"  --dry-submit  {DRY_SUBMIT}"]
    lines += [f"  {name}  stands for  {key.format('VALUE')}" for name, key in (options or {}).items()]
    lines += [f"Recipes: {', '.join(sorted(p.stem for p in recipes.BUILTIN.glob('*.yaml'))) or 'none'}", "", "Keys:"]
    for key, default, kind, text in recipes.schema():
        shown = "null" if default is None else default
        lines.append(f"  {key}={shown}  ({kind})\n      {text}")
    return "\n".join(lines)


def main(
    program: str,
    purpose: str,
    run: Callable[[Recipe, Callable[[str], None], bool], None],
    plan: Callable[[Recipe, Callable[[str], None]], None],
    argv: list[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> int:
    """Parse, build the recipe, run or plan. Returns the exit code: 0 only if the result was written."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    try:
        arguments = parse(words, options)
        if arguments.help:
            say(help_text(program, purpose, options))
            return 0
        recipe = recipes.load(arguments.recipes, arguments.overrides)
        if arguments.dry_submit:
            from ktray.distributed import submit

            for line in submit.lines(program, [w for w in words if w != "--dry-submit"], recipe, os.environ):
                say(line)
            return 0
        from ktray.bootstrap import check_torchvision

        problem = check_torchvision()
        if problem:
            raise KtrayError(problem)
        store = lasting_store(recipe.store)
        if store != recipe.store:
            say(f"recipe    store={store} (a job's own folder is deleted with it; on a cluster name a shared one)")
            recipe.store = store
        if arguments.plan:
            plan(recipe, say)
        else:
            run(recipe, say, arguments.debug)
    except KeyboardInterrupt:
        print("stopped by the keyboard; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {scrub(explain(error))}", file=sys.stderr)
        return 1
    return 0


def say(text: str) -> None:
    """One line for the person who watches, at once."""
    print(text, flush=True)
