"""Several ways of pretraining on one task, on equal terms."""

from ktray.jobs.compare.run import compare

__all__ = ["compare"]
