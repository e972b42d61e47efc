"""Pairs of rates: the limit and the rate of ktray, measured in turns, so that other load slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Rate = Callable[[], float]


@dataclass(frozen=True)
class BenchRow:
    """One comparison.

    Attributes:
        name: what is measured.
        unit: unit of the rates, such as "images/s".
        limit_name: name of the limit.
        limit, reached: rates of each turn.
        facts: further figures, for example to extrapolate the rates.
    """

    name: str
    unit: str
    limit_name: str
    limit: list[float]
    reached: list[float]
    facts: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median over the turns of reached / limit."""
        return median(r / x for r, x in zip(self.reached, self.limit, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def in_turns(limit: Rate, reached: Rate, repeats: int, warm: bool = True) -> tuple[list[float], list[float]]:
    """Measure ``repeats`` rates of each, alternating. With ``warm``, a turn of ``reached`` that is not counted comes
    first, to start processes and load models."""
    if warm:
        reached()
    pairs = [(limit(), reached()) for _ in range(repeats)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def markdown(rows: Sequence[BenchRow]) -> str:
    """Format the rows as a Markdown table with medians and the range of the ratios."""
    lines = ["| what | limit | reached | ratio | range |", "|---|---|---|---|---|"]
    for row in rows:
        each = [r / x for r, x in zip(row.reached, row.limit, strict=True)]
        lines.append(
            f"| {row.name} | {row.limit_name}: {_short(median(row.limit))} {row.unit} | {_short(median(row.reached))} "
            f"{row.unit} | {row.ratio:.0%} | {min(each):.0%} to {max(each):.0%} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
