"""A small finished run, which tests of several files read; runs that they add reuse its stages."""

import pytest
from heard import heard
from image_zoo import write_zoo
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.pipeline.run import run


@pytest.fixture(scope="session")
def zoo_world(tmp_path_factory):
    """A folder with ``task`` and ``gallery``, and the images of all kinds, some damaged, in the gallery."""
    root = tmp_path_factory.mktemp("world")
    write_task(root / "task")
    write_gallery(root / "gallery")
    return root, write_zoo(root / "gallery" / "zoo")


@pytest.fixture(scope="session")
def zoo_run(cluster, zoo_world, tmp_path_factory):
    """Its store, the overrides with its data, its result, what it logged, and the images of all kinds."""
    root, zoo = zoo_world
    store = tmp_path_factory.mktemp("store")
    data = [f"task.data={root / 'task'}", f"gallery.data={root / 'gallery'}", "data.max_bad_fraction=0.2"]
    lines: list[str] = []
    recipe = recipes.load(None, [f"store={store}", *SMALL, *data, "train.steps=60"])
    result = heard(lines, run, recipe)
    return store, data, result, lines, zoo
