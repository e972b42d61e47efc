"""Pairs of rates: the limit and the rate of ktray, measured in turns, so that other load slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ktray.accounting.speeds import Measured

Rate = Callable[[], float]


@dataclass(frozen=True)
class StageSpeed:
    """A stage of a run whose speed a row measured.

    Attributes:
        facts: what the speed depends on besides the device (`ktray.accounting.speeds`), with the name of the ``stage``.
        images: number of images in a turn.
        devices: number of devices that worked.
    """

    facts: dict[str, Any]
    images: int
    devices: float

    def measured(self, rate: float) -> Measured:
        """What a run with this rate, in images a second, would have measured."""
        return Measured(self.images, self.devices * self.images / rate)


@dataclass(frozen=True)
class BenchRow:
    """One comparison.

    Attributes:
        name: what is measured.
        unit: unit of the rates, such as "images/s".
        limit_name: name of the limit.
        limit, reached: rates of each turn.
        facts: further figures, for example to extrapolate the rates.
        stage: the stage of a run that ``reached`` is the rate of, for plans; None: it is not that of a stage.
    """

    name: str
    unit: str
    limit_name: str
    limit: list[float]
    reached: list[float]
    facts: dict[str, float | int | str] = field(default_factory=dict)
    stage: StageSpeed | None = None

    @property
    def ratio(self) -> float:
        """Median over the turns of reached / limit."""
        return median(r / x for r, x in zip(self.reached, self.limit, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {**{name: value for name, value in asdict(self).items() if name != "stage"}, "ratio": self.ratio}


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
