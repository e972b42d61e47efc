"""Strategies: one file each, found by `ktray.recipe.registries.STRATEGIES`; `ktray.retrieval.strategies.base` is the
contract."""
