"""The beginning of every job: checks in their order, and none of them twice where a job runs another."""

from dataclasses import replace

import pytest

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.pipeline import session
from ktray.recipe.schema import Recipe


@pytest.fixture
def recipe(tmp_path):
    return recipes.override(Recipe(), {"store": str(tmp_path / "store"), "cluster.jobs": 2})


@pytest.fixture
def checked(monkeypatch):
    found = []
    monkeypatch.setattr(session, "require", lambda recipe: found.append("checks"))
    return found


def test_a_job_plans_with_its_part_of_the_cluster(cluster, recipe, checked):
    with session.open_session(recipe) as found:
        assert checked == ["checks"]
        assert found.store.uri == recipe.store
        assert found.allocation.total_cpus == cluster.total_cpus / 2
        assert 0 < found.memory < 1e15


def test_a_job_within_a_job_works_with_what_it_was_given(cluster, recipe, checked):
    given = replace(cluster, workers=1, total_cpus=0.5)
    with session.open_session(recipe, allocation=given) as found:
        assert found.allocation is given
    assert checked == []


def test_a_store_that_cannot_be_written_is_told_before_the_cluster_is_asked(tmp_path, recipe, checked, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(session, "connect", lambda debug: pytest.fail("it had to be told before"))
    recipe.store = str(tmp_path / "file")
    with pytest.raises(KtrayError), session.open_session(recipe):
        pass
