"""The result of a search: while it runs, the best trial so far; at its end, the winner and the baseline."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import ktray
from ktray.accounting.device import describe_device, versions
from ktray.data.labelled.rows import count
from ktray.errors import KtrayError
from ktray.jobs.tune import mlflow, page
from ktray.jobs.tune.budget import SearchBudget
from ktray.jobs.tune.importance import importance, of_transfer_set
from ktray.jobs.tune.random_draw import sentence
from ktray.jobs.tune.records import (
    BASELINE,
    OPEN,
    OVER_BUDGET,
    OVER_COST_LIMIT,
    Records,
)
from ktray.jobs.tune.space import Space, Spec
from ktray.jobs.tune.trial import recipe_of
from ktray.jobs.tune.winner import title
from ktray.pipeline.run_folder import RUNNING
from ktray.recipe.load import dump
from ktray.recipe.schema import Recipe
from ktray.reporting.progress import humanise
from ktray.reporting.result import SCHEMA, TuneProgress, TuneResult, finished, write_result
from ktray.reporting.result.tune import Spending, TrialPoint, TrialRecord
from ktray.reporting.units import flops, percent, seconds, usd
from ktray.storage.store import Dir
from ktray.tracking.tracker import Tracker

logger = logging.getLogger("ktray")

BEST = "best.yaml"


def described(spec: Spec) -> str:
    """Describe a spec, such as ``train.lr: 0.005 to 0.08, logarithmic``."""
    if spec.choices:
        what = ", ".join(str(value) for value in spec.labels)
    else:
        step = f" in steps of {spec.step:g}" if spec.step else ""
        what = f"{spec.low:g} to {spec.high:g}{step}{', logarithmic' if spec.log else ''}"
    where = " and ".join(f"{key} is {' or '.join(map(str, values))}" for key, values in spec.when)
    return f"{spec.key}: {what}{f' (if {where})' if where else ''}"


@dataclass
class SearchReporter:
    """Logs the changes of a trial, and saves the best point so far; Tune's loop calls it."""

    base: Recipe
    records: Records
    budget: SearchBudget
    folder: Dir
    log: Callable[[TrialRecord], None]
    _reported: set[tuple[int, int, str]] = field(default_factory=set)

    def __call__(self, record: TrialRecord) -> None:
        point = record.last
        news = (record.number, len(record.points), record.state)
        if news in self._reported:
            return
        self._reported.add(news)
        name = "baseline" if record.number == BASELINE else f"trial {record.number}"
        if record.state in ("failed", OVER_BUDGET, OVER_COST_LIMIT, "stopped"):
            logger.info(f"{name:<10}{record.state}: {record.reason}")
        elif point is not None and record.state == OPEN:
            keys = ", ".join(f"{k}={_short(v)}" for k, v in record.params.items())
            logger.info(
                f"{name:<10}{point.validation:>6.1%} after {point.steps} steps, {flops(point.whole['flops'])}  {keys}"
            )
        if record.state != OPEN:
            logger.info(progress(self.base, self.records, self.budget))
            self.save()
            self.log(record)

    def save(self) -> None:
        """Save the best point so far in `result.json` and as a recipe."""
        best = self.records.best(self.base.tune.cost_limit)
        progress_so_far = TuneProgress(
            schema=SCHEMA,
            state="running",
            budget=Spending(limits=self.budget.limits, spent=self.budget.spent()),
            best=best,
            front=self.records.front(),
            trials=self.records.in_order(),
        )
        write_result(self.folder, progress_so_far)
        if best is not None:
            self.folder.write(BEST, dump(recipe_at(self.base, self.records, best)).encode())


def progress(base: Recipe, records: Records, budget: SearchBudget) -> str:
    """Return ``tune      12 trials, 48% of the budget spent, best 83.1% (trial 5), about 6m10s left``."""
    ended = sum(r.state != OPEN for r in records.in_order())
    best = records.best(base.tune.cost_limit)
    best_so_far = f", best {best.validation:.1%} ({title(best)})" if best else ""
    spent = budget.share()
    to_go = budget.elapsed * (1 - spent) / spent if spent > 0.01 else 0.0
    more = f", about {humanise(to_go)} left" if to_go > 0 else ""
    return f"tune      {ended} trials, {spent:.0%} of the budget spent{best_so_far}{more}"


def check_baseline(records: Records) -> None:
    """Raise `KtrayError` if the baseline did not finish, since there is nothing to compare with then."""
    record = records.trials[BASELINE]
    if record.state == "failed":
        raise KtrayError(
            f"The baseline of the search failed: {record.reason}",
            "Run the recipe with jobs/distill.py, which shows more details, and correct it.",
        )
    if records.baseline() is None:
        raise KtrayError(
            f"The budget does not allow one run of the baseline ({record.reason or 'stopped'})",
            "Raise the limits in budget, or lower tune.steps. The same command resumes the search.",
        )


def recipe_at(base: Recipe, records: Records, point: TrialPoint) -> Recipe:
    """Return the recipe with which a point can be run again."""
    return recipe_of(base, records.trials[point.trial].keys, point.share)


def sharing(records: Records, budget: SearchBudget, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the FLOPs and device-seconds that the search spent, and those of its runs without shared stages."""
    amounts: dict[str, float] = {}
    spent = budget.spent()
    lost = [r.lost for r in records.in_order()]
    for unit in ("flops", "device_seconds"):
        runs = [p.whole[unit] or 0.0 for p in records.points()]
        runs += [float(r["cost"]["without_cache"][unit]) for r in results]
        amounts[unit] = spent[unit]
        amounts[f"{unit}_without"] = sum(runs) + sum(one.get(unit, 0.0) for one in lost)
        amounts[f"{unit}_times"] = amounts[f"{unit}_without"] / spent[unit] if spent[unit] else 1.0
    return amounts


def planned_and_taken(points: Sequence[TrialPoint]) -> dict[str, Any]:
    """What was planned for the runs of the trials, and what they took."""
    known = [point for point in points if point.planned]
    priced = all("usd" in point.spent for point in known)
    return {
        "runs": len(known),
        "planned_seconds": sum(point.planned["wall"] for point in known),
        "planned_usd": sum(point.planned["usd"] for point in known) if priced else None,
        "seconds": sum(point.seconds for point in known),
        "usd": sum(point.spent["usd"] for point in known) if priced else None,
    }


def build(
    base: Recipe, run_id: str, folder: Dir, space: Space, records: Records, budget: SearchBudget, final: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of ``result.json`` of a finished search.

    Args:
        final: see `ktray.jobs.tune.winner.train_winner`; ``random`` is the result of
            `ktray.jobs.tune.random_draw.random_draw`.
    """
    point: TrialPoint = final["point"]
    baseline = records.baseline()
    assert baseline is not None  # see `check_baseline`
    front = records.front()
    results = final["results"]
    tests = [float(r["metric"]["test"]) for r in results]
    validations = [float(r["metric"]["val"]) for r in results]
    matters = importance(space, records, base.tune.seed)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "state": "finished",
        "run_id": run_id,
        "folder": folder.uri,
        "task": base.task.name or base.task.data,
        "metric": base.task.metric,
        "search": base.tune.search,
        "stop": base.tune.stop,
        "cost": base.tune.cost,
        "cost_limit": base.tune.cost_limit,
        "space": [described(spec) for spec in space.specs],
        "budget": {"limits": budget.limits, "spent": budget.spent()},
        "trials": [asdict(r) for r in records.in_order()],
        "front": [asdict(p) for p in front],
        "given": {**asdict(baseline), "on_front": any(p.run == baseline.run for p in front)},
        "winner": {
            **asdict(point),
            "name": title(point),
            "keys": records.trials[point.trial].keys,
            "is_given": point.trial == BASELINE,
            "seeds": [r["seed"] for r in results],
            "runs": [r["run_id"] for r in results],
            "validation_seeds": validations,
            "test_seeds": tests,
            "test": mean(tests) if tests else None,
            "spread": stdev(tests) if len(tests) > 1 else None,
            "missing": final["missing"],
            "student": f"{results[0]['folder']}/student" if results else None,
        },
        "random_draw": final.get("random"),
        "importance": matters,
        "importance_of_transfer_set": of_transfer_set(matters),
        "sharing": sharing(records, budget, results),
        "plan": planned_and_taken(list(records.points())),
        "versions": versions(),
        "device": dict(describe_device()),
        "ktray": ktray.__version__,
        **finished(time.time() - budget.elapsed),
        "wall_seconds": round(budget.elapsed, 2),
    }
    content["says"] = headline(content)
    return content


def headline(content: dict[str, Any]) -> str:
    """Summarise the result of the search in one sentence."""
    winner, baseline = content["winner"], content["given"]
    test = ""
    if winner["seeds"]:
        # The best of many runs was also lucky, so the mean over seeds is a better estimate of its accuracy.
        seeds = count(winner["seeds"], "seed")
        spread = f" ± {100 * winner['spread']:.1f}" if winner["spread"] is not None else ""
        validation = percent(mean(winner["validation_seeds"]))
        test = f"; the mean over {seeds} is {validation} on validation and {percent(winner['test'])}{spread} on test"
    if winner["is_given"] or winner["validation"] <= baseline["validation"]:
        where = "is in the Pareto set" if baseline["on_front"] else "is as accurate as any other run"
        most = percent(baseline["validation"])
        return f"the baseline {where}: no run within the cost limit exceeds its {most} on validation{test}"
    less = baseline["cost"] / winner["cost"] if winner["cost"] else 1.0
    return (
        f"{winner['name']} has {percent(winner['validation'])} on validation for {less:.2f} times less cost than the "
        f"baseline, which has {percent(baseline['validation'])}{test}"
    )


def table(content: dict[str, Any]) -> str:
    """Format the Pareto set for a terminal, the cheapest model first."""
    head = f"{'model':<34}{'validation':>11}{'compute':>14}{'time':>10}{'money':>11}  recipe"
    out = [head, "-" * len(head)]
    for raw in content["front"]:
        p = TrialPoint(**raw)
        mark = "*" if p.run == content["winner"]["run"] else " "
        w = p.whole
        out.append(
            f"{mark}{title(p):<33}{percent(p.validation):>11}{flops(w['flops']):>14}{seconds(w['device_seconds']):>10}"
            f"{usd(w['usd']):>11}  {front_file(p)}"
        )
    s = content["sharing"]
    out.append(f"\n{content['says']}")
    if draw := content.get("random_draw"):
        out.append(sentence(draw, content["winner"]["validation"]))
    out.append(
        f"{len(content['trials'])} trials, {flops(s['flops'])} spent, {flops(s['flops_without'])} without shared "
        f"stages ({s['flops_times']:.1f} times); {seconds(content['budget']['spent']['wall'])} of wall time"
    )
    plan = content.get("plan")
    if plan and plan["runs"]:
        out.append(
            f"planned {seconds(plan['planned_seconds'])}, {usd(plan['planned_usd'])}; took {seconds(plan['seconds'])}, "
            f"{usd(plan['usd'])}, for the runs of the trials"
        )
    if content["importance"]:
        top = ", ".join(f"{k} {v:.0%}" for k, v in list(content["importance"].items())[:5])
        out.append(f"importance: {top}; the transfer set in total {content['importance_of_transfer_set']:.0%}")
    return "\n".join(out)


def front_file(point: TrialPoint) -> str:
    return f"front/{'given' if point.trial == BASELINE else f'trial-{point.trial}'}-{point.steps}.yaml"


def write(
    content: dict[str, Any], base: Recipe, folder: Dir, records: Records, budget: SearchBudget, tracker: Tracker
) -> dict[str, Any]:
    """Write the recipes of the Pareto set, the page and ``result.json``, and log them; returns the result."""
    files = {point.run: front_file(point) for point in records.front()}
    for point in records.front():
        folder.write(files[point.run], dump(recipe_at(base, records, point)).encode())
    winner = TrialPoint(**{f.name: content["winner"][f.name] for f in fields(TrialPoint)})
    folder.write(BEST, dump(recipe_at(base, records, winner)).encode())
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        pages = page.write(Path(scratch), content, files)
        for file in pages:
            folder.put(file)
        content["mlflow"] = mlflow.close(tracker, content, folder, [file.name for file in pages], budget.rest())
    content["wall_seconds"] = content["budget"]["spent"]["wall"] = round(budget.elapsed, 2)
    content = write_result(folder, TuneResult(**content))
    folder.delete(RUNNING)
    return content


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
