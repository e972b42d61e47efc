"""The recipe of a call is that of the same command line."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import ktray
from ktray import recipe as recipes
from ktray.api.asked import asked, shown
from ktray.api.results import Run
from ktray.errors import KtrayError


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, []),
        ({"task": "digits"}, ["task.name=digits"]),
        ({"task": Path("photos")}, ["task.data=photos"]),
        ({"task": "./letters"}, ["task.data=./letters"]),
        ({"task": {"data": "a", "kind": "segmentation"}}, ["task.data=a", "task.kind=segmentation"]),
        ({"gallery": ["a", Path("b/*.tar")]}, ["gallery.data=[a, b/*.tar]"]),
        ({"gallery": {"data": "a", "crops": "grid"}}, ["gallery.data=a", "gallery.crops=grid"]),
        ({"keys": {"train": {"steps": 20, "lr": 1e-05}}}, ["train.steps=20", "train.lr=1e-5"]),
        ({"keys": {"train.steps": 20, "seed": 3}}, ["train.steps=20", "seed=3"]),
        ({"keys": {"student": {"kwargs": {"patch_size": 2}}}}, ["student.kwargs={patch_size: 2}"]),
        ({"keys": {"train": {"augment": {"erase": 0.5}}}}, ["train.augment.erase=0.5"]),
        ({"keys": {"prices": {"H100": 2.0}}}, ["prices={H100: 2.0}"]),
        ({"keys": {"mlflow": {"tags": {"a.b": "c"}}}}, ["mlflow.tags={a.b: c}"]),
        (
            {"keys": {"objective": {"name": "dual", "label_weight": 0.3}}},
            ["objective.name=dual", "objective.label_weight=0.3"],
        ),
        ({"keys": {"compare": {"seeds": (0, 1)}}}, ["compare.seeds=[0, 1]"]),
        ({"images": "a", "keys": {"predict": {"model": "teacher"}}}, ["predict.data=a", "predict.model=teacher"]),
        ({"of_run": ("export.run", "a-run")}, ["export.run=a-run"]),
        ({"of_run": ("export.run", Run("/s/runs/x"))}, ["store=/s", "export.run=/s/runs/x"]),
        ({"of_run": ("export.run", Run("/s/runs/x")), "keys": {"store": "/t"}}, ["store=/t", "export.run=/s/runs/x"]),
    ],
)
def test_it_is_that_of_the_command_line(call, words) -> None:
    call = {"keys": {}, **call}
    assert asked(None, call.pop("keys"), **call) == recipes.load(None, words)


def test_recipes_come_first_and_keys_replace_theirs(tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("seed: 5\ntrain: {steps: 7}\n")
    found = asked(["digits", str(own)], {"train.steps": 9})
    assert found == recipes.load(["digits", str(own)], ["train.steps=9"])
    assert (found.task.name, found.seed, found.train.steps) == ("digits", 5, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"keys": {"train": {"stepps": 1}}}, r"Unknown recipe key 'train\.stepps'\. Did you mean 'train\.steps'"),
        ({"keys": {"train.steps": "many"}}, r"'train\.steps' does not accept 'many'"),
        ({"gallery": "a", "keys": {"gallery": {"data": "b"}}}, r"gallery\.data is given twice: .* argument gallery"),
        ({"images": "a", "keys": {"predict.data": "b"}}, r"predict\.data is given twice: .* argument data"),
        ({"task": 7}, "Images cannot be read from a int"),
        ({"keys": {"mlflow.uri": "http://user:secret@host"}}, "has a secret"),
    ],
)
def test_mistakes_are_told_as_on_the_command_line(call, message) -> None:
    call = {"keys": {}, **call}
    with pytest.raises(KtrayError, match=message):
        asked(None, call.pop("keys"), **call)


def test_lines_are_shown_or_only_warnings(capsys) -> None:
    logger = logging.getLogger("ktray")
    for quiet in (False, True):
        with shown(quiet):
            logger.info("a line")
            logger.warning("a warning")
    out, err = capsys.readouterr()
    assert (out, err) == ("a line\n", "a warning\na warning\n")
    assert (logger.level, logger.propagate) == (logging.NOTSET, True)


def test_the_users_error_is_raised_without_rays_wrappers(cluster) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def fail():
        raise KtrayError("Bad", "Mend.")

    with pytest.raises(KtrayError) as caught, shown(True):
        ray.get(fail.remote())
    assert str(caught.value) == "Bad. Mend."
    with pytest.raises(ZeroDivisionError), shown(True):
        1 / 0  # noqa: B018


def test_importing_ktray_is_light_and_everything_it_offers_is_there() -> None:
    heavy = "torch ray timm mlflow pandas pyarrow numpy pydantic"
    code = f"import sys, ktray; dir(ktray); assert not set(sys.modules) & set('{heavy}'.split())"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in ktray.__all__:
        assert getattr(ktray, name)
        assert name in dir(ktray)
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        ktray.distil  # noqa: B018
