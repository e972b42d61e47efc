import contextlib
import threading

import pytest

from ktray.pipeline import run_folder
from ktray.pipeline.run_folder import RUNNING, open_run
from ktray.storage.store import Store


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    return Store(request.getfixturevalue("s3").home if request.param == "s3" else str(tmp_path))


def test_runs_of_one_recipe_at_once_have_a_folder_each(store):
    barrier, ids = threading.Barrier(2), []

    def work():
        with contextlib.ExitStack() as until:
            barrier.wait(60)
            ids.append(open_run(store, "same", "letters", until)[0])
            barrier.wait(60)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 2
    assert store.sub("runs").children() == sorted(ids)


def test_an_unfinished_run_is_continued_and_a_finished_one_is_not(store):
    with contextlib.ExitStack() as until:
        first, folder = open_run(store, "same", "a", until)
    with contextlib.ExitStack() as until:
        assert open_run(store, "other", "b", until)[0] != first
    folder.write("result.json", b"{}")  # of the attempt that was interrupted
    with contextlib.ExitStack() as until:
        assert open_run(store, "same", "c", until)[0] == first
        assert not folder.exists("result.json")
        assert len(folder.read_json(RUNNING)["starts"]) == 2
        folder.delete(RUNNING)
    assert not folder.exists(run_folder.FOLDER)
    with contextlib.ExitStack() as until:
        assert open_run(store, "same", "d", until)[0] != first
