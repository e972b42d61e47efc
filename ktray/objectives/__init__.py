"""Objectives: one file each, found by `ktray.recipe.registries.OBJECTIVES`; `ktray.objectives.base` is the contract."""
