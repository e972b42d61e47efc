"""The small drawn world that ships with ktray: images, captions, labelled tasks, and a small foundation model."""

from ktray.miniverse.generate import ensure_gallery, ensure_generic_labels, ensure_task
from ktray.miniverse.tasks import TASKS, MiniverseTask
from ktray.miniverse.vocabulary import WORLD_VERSION

__all__ = ["TASKS", "WORLD_VERSION", "MiniverseTask", "ensure_gallery", "ensure_generic_labels", "ensure_task"]
