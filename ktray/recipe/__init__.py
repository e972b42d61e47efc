"""The recipe: one typed description of a run, from the command line to the run folder.

`ktray.recipe.schema` has the schema (the sections of single jobs are in files next to it), `ktray.recipe.load` reads
and writes recipes, and ``builtin/`` has the built-in recipes.
"""

from ktray.recipe.load import BUILTIN, DEFAULT, dotted, dump, load, load_values, override, schema
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest

__all__ = ["BUILTIN", "DEFAULT", "Recipe", "digest", "dotted", "dump", "load", "load_values", "override", "schema"]
