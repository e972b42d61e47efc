"""Several ways of pretraining on one task, on equal terms."""

from ktray.comparison.runs import compare

__all__ = ["compare"]
