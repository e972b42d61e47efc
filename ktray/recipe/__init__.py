"""The recipe: one typed description of a run, from the command line to the run folder.

The schema is in `ktray.recipe.schema` (with the sections of single jobs beside it), reading and writing in
`ktray.recipe.load`, the built-in recipes in ``builtin/``.
"""

from ktray.recipe.load import BUILTIN, DEFAULT, dump, load, override, schema
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest

__all__ = ["BUILTIN", "DEFAULT", "Recipe", "digest", "dump", "load", "override", "schema"]
