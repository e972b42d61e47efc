"""A run: the order of the stages, what is decided before, what is written after."""
