"""Strategies: each has its own file, which `ktray.recipe.registries.STRATEGIES` finds.

`ktray.retrieval.strategies.base` describes what a strategy must provide.
"""
