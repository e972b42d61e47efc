"""Rates in pairs: the limit and what ktray reaches, in turns, so that a busy neighbour slows both."""

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
        name: what is done.
        unit: of the rates, such as "images/s".
        limit_name: what ktray is held against.
        limit, reached: rates of each turn.
        facts: further figures, for those who scale them.
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
    """``repeats`` rates of each, alternating; with ``warm`` after a turn of ``reached`` that is not counted: it starts
    processes and loads models."""
    if warm:
        reached()
    pairs = [(limit(), reached()) for _ in range(repeats)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def markdown(rows: Sequence[BenchRow]) -> str:
    """The rows as a table: medians, and the range of the ratios."""
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
