"""A comparison of pretraining methods on one task, with equal budgets."""

from ktray.jobs.compare.run import compare

__all__ = ["compare"]
