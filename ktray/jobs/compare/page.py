"""``compare.html``, its figures as PNG files, ``compare.csv``, and the table for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ktray.jobs.compare import figure
from ktray.reporting import page
from ktray.reporting.units import flops, percent, seconds, usd

COLUMNS = (
    "name", "accuracy", "spread", "low", "high", "validation", "flops", "teacher_share", "device_seconds", "usd",
    "start", "steps", "lr", "images", "seeds", "pareto", "lead", "lead_low", "lead_high", "reached_by", "times_less",
    "times_low", "times_high",
)  # fmt: skip


def write(folder: Path, content: dict[str, Any]) -> list[Path]:
    """Write the page, its figures and the CSV file into ``folder``; returns their paths."""
    return page.write(
        folder,
        "compare",
        "ktray.jobs.compare",
        {"compare": figure.compute(content), "sizes": figure.sizes(content), "shares": figure.shares(content)},
        COLUMNS,
        (_csv_row(method) for method in content["ways"]),
        {"accuracy": accuracy},
        f=content,
        metric=figure.metric_name(content),
        times=times,
        points=points,
        headline=headline(content),
        draws=against_random(content),
    )


def accuracy(method: dict[str, Any]) -> str:
    """Format a method's accuracy, such as ``88.9 ± 0.3%``; without a spread if there is only one seed."""
    spread = "" if method["spread"] is None else f" ± {100 * method['spread']:.1f}"
    return f"{100 * method['accuracy']:.1f}{spread}%"


def points(lead: list[float] | None) -> str:
    """Format the first method's lead in percentage points with its interval: ``+5.4 (+4.1 to +6.8)``."""
    if lead is None:
        return "–"
    mean, low, high = (100 * v for v in lead)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def times(reach: dict[str, Any] | None) -> str:
    """Format a ratio of costs, such as ``3.4x less compute (2.0 to 4.1)``.

    A ratio below 1 is more compute, and about 1 is the same compute. A bound of ``not reached`` means that the interval
    contains draws in which no run was as accurate.
    """
    if reach is None:
        return "not reached"
    value, low, high = reach["times"], reach["low"], reach["high"]
    word = f"{_factor(value)}x less compute"
    if value < 0.995:
        word = f"{_factor(1 / value)}x more compute"
        low, high = (1 / v if v else math.inf for v in (high, low))
    elif value < 1.005:
        word = "the same compute"
    bounds = [f"{_factor(v)}" if v and v < math.inf else "not reached" for v in (low, high)]
    return word if word.startswith("the same") and bounds == ["1.00"] * 2 else f"{word} ({' to '.join(bounds)})"


def headline(content: dict[str, Any]) -> str:
    """Compare the first method with the best (on validation) of the others in one sentence; empty without others."""
    others = [w for w in content["ways"] if w["family"] != content["ways"][0]["family"]]
    if not others:
        return ""
    best = max(others, key=lambda w: w["validation"])
    text = f"{content['first']} gains {points(best['lead'])} points over {best['name']}, the best of the others"
    if best["reach"] is None:
        return f"{text}, and no run of it reaches that method's {percent(best['accuracy'])}"
    return f"{text}, and reaches its {percent(best['accuracy'])} with {times(best['reach'])}: {best['reach']['name']}"


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def table(content: dict[str, Any]) -> str:
    """Format the comparison for a terminal, with the best method on validation first."""
    width = max(len(w["name"]) for w in content["ways"]) + 2
    head = (
        f"{'method':<{width}}{'test':>15}{'95% interval':>18}{'validation':>12}"
        f"{'compute':>14}{'teacher':>9}{'time':>10}{'money':>11}"
    )
    out = [head, "-" * len(head)]
    for w in sorted(content["ways"], key=lambda w: -w["validation"]):
        span = f"{100 * w['low']:.1f} to {100 * w['high']:.1f}%"
        cost = f"{flops(w['flops']):>14}{w['teacher_share']:>9.0%}{seconds(w['device_seconds']):>10}{usd(w['usd']):>11}"
        out.append(f"{w['name']:<{width}}{accuracy(w):>15}{span:>18}{percent(w['validation']):>12}{cost}")
    out += _starts(content["ways"])
    first = content["first"]
    others = [w for w in content["ways"] if w["family"] != content["ways"][0]["family"]]
    if others:
        out.append(f"\n{headline(content)}\n")
        out.append(f"{first} against the others: points gained, and its cheapest run with at least their accuracy")
    for w in others:
        by = f" by '{w['reach']['name']}'" if w["reach"] else ""
        out.append(f"  {w['name']:<{width}}{points(w['lead']):>26}   {times(w['reach'])}{by}")
    if draws := against_random(content):
        out += [
            "\nretrieved transfer sets against random draws from the same gallery",
            *(f"  {line}" for line in draws),
        ]
    return "\n".join(out)


def _starts(methods: list[dict[str, Any]]) -> list[str]:
    """Name the initial weights of the students, unless all of them were random."""
    starts: dict[str, list[str]] = {}
    for method in methods:
        starts.setdefault(method.get("start", "unknown"), []).append(method["name"])
    if set(starts) <= {"random", "unknown"}:
        return []
    named = (f"{start}: {', '.join(names) if len(starts) > 1 else 'all'}" for start, names in starts.items())
    return [f"\nstart of the students: {'; '.join(named)}"]


def against_random(content: dict[str, Any]) -> list[str]:
    """A sentence for each retrieved transfer set beside a random draw: the difference of their accuracies."""
    rows = {row["name"]: row for row in content["ways"]}
    return [
        f"{name} ({rows[name]['images']:,.0f} images): {100 * (rows[name]['accuracy'] - draw['accuracy']):+.1f} points "
        f"on test compared with {draw['name']} ({draw['images']:,.0f} images)"
        for draw in rows.values()
        for name in draw.get("like", ())
    ]


def _csv_row(method: dict[str, Any]) -> dict[str, Any]:
    """Flatten a method for the CSV file: the bounds of its lead, and the run that reaches it, get columns."""
    lead, reach = method["lead"] or (None, None, None), method["reach"] or {}
    more = {"reached_by": reach.get("name"), "times_less": reach.get("times")}
    more |= {"times_low": reach.get("low"), "times_high": reach.get("high")}
    return {**method, "lead": lead[0], "lead_low": lead[1], "lead_high": lead[2], **more}
