"""The small world that ships with ktray: images, captions, labelled tasks, and a small foundation model."""

from ktray.miniverse.generate import TASKS, ensure_gallery, ensure_task
from ktray.miniverse.vocabulary import WORLD_VERSION

__all__ = ["TASKS", "WORLD_VERSION", "ensure_gallery", "ensure_task"]
