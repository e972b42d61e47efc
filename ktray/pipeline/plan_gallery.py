"""The size of the gallery of a plan, as far as it is known without reading the gallery."""

from __future__ import annotations

import os

from ktray.data.sources.lists import embedded_only, gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.pipeline.resolve import Resolved, transfer_images
from ktray.recipe.schema import Recipe


def given_embeddings(recipe: Recipe) -> int:
    """The number of gallery images that come with embeddings."""
    g = recipe.gallery
    if g.data is None or recipe.transfer.list is not None:
        return 0
    shards = embedded_only(g.data, g.images, g.column)
    return sum(s.count or 0 for s in shards)


def gallery_images(resolved: Resolved) -> tuple[int, str]:
    """The number of gallery images, and the same as text that says how reliable it is.

    A tar file does not state its number of images. For local tar files it is estimated from their sizes and the images
    per byte of the first one.
    """
    if resolved.gallery_images is not None:
        return resolved.gallery_images, f"{resolved.gallery_images:,}"
    recipe, g = resolved.recipe, resolved.recipe.gallery
    shards = gallery_shards(g.data, g.column, recipe.transfer.list, g.images)
    unknown = [s for s in shards if s.count is None]
    sizes = [os.path.getsize(s.paths[0]) for s in unknown if os.path.isfile(s.paths[0])]
    if len(sizes) < len(unknown):
        return 0, "an unknown number of"
    images = sum(record.error is None for record in read_shard(unknown[0]))
    guess = images * sum(sizes) / max(1, sizes[0])
    total = round(guess) + sum(s.count or 0 for s in shards)
    return total, f"about {total:,}"


def missing_images(resolved: Resolved) -> str:
    """A sentence if the gallery is known to have fewer images than the transfer set should have; else empty."""
    recipe = resolved.recipe
    if recipe.transfer.source not in ("generic", "retrieved", "list") or not recipe.objective.has_transfer_set():
        return ""
    asked, (there, text) = transfer_images(recipe, resolved.task), gallery_images(resolved)
    if not there or there >= asked:
        return ""
    return (
        f"the gallery has {text} images, fewer than transfer.size={asked:,}: the transfer set will be smaller. Use a "
        "larger gallery.data, or set transfer.size."
    )
