"""Problems with the labelled images as the report and the closing lines show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CLAUSES = {
    "train_test": "test images that are copies of training images",
    "train_val": "validation images that are copies of training images",
    "val_test": "test images that are copies of validation images",
    "torn_groups": "groups in more than one split",
    "two_labels": "identical images with two labels",
    "doubtful_labels": "training labels that the teacher contradicts",
}


@dataclass(frozen=True)
class Exhibit:
    """One problem: one or two images (H, W, 3) uint8, their addresses, and what is wrong with them."""

    images: list[np.ndarray]
    uris: list[str]
    text: str


@dataclass(frozen=True)
class HygieneReport:
    """What the report shows.

    Attributes:
        groups: titles with the most certain problems of each kind.
        torn: lines about groups that are in more than one split.
    """

    groups: list[tuple[str, list[Exhibit]]] = field(default_factory=list)
    torn: Sequence[str] = ()


def clauses(numbers: Mapping[str, Any]) -> list[str]:
    """Clauses about the numbers of the entry ``hygiene`` of result.json that are not 0."""
    return [f"{text}: {numbers[name]}" for name, text in _CLAUSES.items() if numbers.get(name)]


def closing_line(result: Mapping[str, Any]) -> str:
    """One line about the labelled images; empty if they were not checked."""
    numbers = result.get("hygiene")
    if not numbers:
        return ""
    found = clauses(numbers)
    if not found:
        return "labelled images: no copies in two splits and no contradicted labels were found."
    return f"labelled images: {'; '.join(found)}. The report shows them; the list is {numbers['path']}."
