"""Numbers with units, and tables, as text for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def flops(value: float | None) -> str:
    """``1.2 TFLOP``; an en dash for None."""
    return "–" if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"), "FLOP")


def size(value: float | None) -> str:
    """Bytes as ``1.2 GB`` (powers of 1000)."""
    return "–" if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T", "P"), "B")


def seconds(value: float | None) -> str:
    """``0.4 s``, ``35 s``, ``4.2 min``, ``1.3 h``, ``2.5 d``."""
    if value is None:
        return "–"
    if value < 9.95:
        return f"{value:.1f} s"
    for limit, divisor, unit in ((119.5, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / divisor:.0f} {unit}" if divisor == 1 else f"{value / divisor:.1f} {unit}"
    return f"{value / 86400:.1f} d"


def usd(value: float | None) -> str:
    """``$12.50``; small amounts have two significant digits: ``$0.0004``."""
    if value is None:
        return "–"
    if value <= 0:
        return "$0"
    digits = 2 if value >= 0.1 else min(9, 1 - math.floor(math.log10(value)))
    text = f"{value:,.{digits}f}"
    return "$" + (text.rstrip("0") if digits > 2 else text)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _scaled(value: float, base: int, prefixes: Sequence[str], unit: str) -> str:
    step = 0
    while abs(value) >= base * 0.9995 and step < len(prefixes) - 1:
        value /= base
        step += 1
    return f"{value:.3g} {prefixes[step]}{unit}"


def aligned(rows: Sequence[Sequence[str]], words: int, rules: Sequence[int]) -> str:
    """A table whose columns are as wide as their widest cell.

    Args:
        rows: cells, row by row.
        words: number of columns, from the left, that are aligned left; the others are aligned right.
        rules: numbers of the rows that have a rule above them.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        if number in rules:
            lines.append("  ".join("-" * width for width in widths))
        cells = [
            cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def flatten(value: Any, keep: Callable[[str, Any], bool] = lambda name, value: False) -> dict[str, Any]:
    """Nested mappings and lists as one dictionary from dotted names (``a.b.0``) to values, in order.

    Args:
        keep: a function of a dotted name and the mapping or list under it; if it returns True, the mapping or list
            becomes a value unchanged. Empty mappings and lists that are not kept are dropped.
    """
    leaves: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        nested = isinstance(node, Mapping | list | tuple)
        if not nested or (name and keep(name, node)):
            leaves[name] = node
            return
        for key, part in node.items() if isinstance(node, Mapping) else enumerate(node):
            visit(f"{name}.{key}" if name else str(key), part)

    visit("", value)
    return leaves
