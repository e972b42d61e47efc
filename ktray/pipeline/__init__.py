"""A run: resolving the recipe, running the stages in order, and writing the results."""
