"""Objectives, one file for each. `ktray.recipe.registries.OBJECTIVES` finds them; `ktray.objectives.base` is the
contract."""
