"""What a stage reads is in its key: each field of its inputs, and nothing else reaches its work."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from small_task import SMALL, write_gallery, write_task

import ktray.stages
from ktray import recipe as recipes
from ktray.data.preprocess import Preprocess
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import look_at_stages
from ktray.pipeline.suggest import curation
from ktray.recipe.schema import TrainConfig
from ktray.recipe.section import digest
from ktray.stages.base import Runtime
from ktray.stages.inputs import AddedLater, NotInKey, StageInputs, key_value
from ktray.storage.store import Store

STAGES = {
    "labels",
    "adapt",
    "ensemble",
    "index",
    "curate",
    "suggest",
    "hygiene",
    "teach",
    "transfer",
    "finetune",
    "scratch",
    "evaluate",
}
# Every exception is one that somebody has looked at: whoever adds one says why it cannot change a result.
EXCEPTIONS = {
    "adapt": {"images", "levels"},
    "ensemble": {"members", "names", "images"},
    "index": {"gallery", "encoder", "items", "prepare", "total", "folder", "shared"},
    "curate": {"transfer"},
    "suggest": {"source"},
    "teach": {"predict", "teacher"},
    "transfer": {"train"},
    "finetune": {"train"},
    "scratch": {"train"},
    "evaluate": {"teacher", "taught_by"},
}


def kinds() -> dict[str, type[StageInputs]]:
    """The inputs of all stages, by the stage's name."""
    for module in pkgutil.walk_packages(ktray.stages.__path__, "ktray.stages."):
        importlib.import_module(module.name)
    return {kind.stage: kind for kind in StageInputs.__subclasses__() if kind.__module__.startswith("ktray.stages.")}


@pytest.fixture(scope="module")
def seen(cluster, tmp_path_factory) -> dict[str, StageInputs]:
    """The inputs of every stage of a run and of jobs/curate.py, as a plan asks for them: nothing is run."""
    found: dict[str, StageInputs] = {}
    folder = str(tmp_path_factory.mktemp("store"))
    task, gallery = write_task(Path(folder) / "task"), write_gallery(Path(folder) / "gallery")
    own = [f"task.data={task}", f"gallery.data={gallery}", "teacher.name=miniverse", f"store={folder}"]
    others = "teacher.others=[{name: efficientnet-lite0, image_size: 48}]"
    recipe = recipes.load(None, [*SMALL, *own, others, "baselines.scratch=true", "curate.suggest=5"])
    with pytest.MonkeyPatch.context() as patch:
        key_of = StageInputs.key_of
        patch.setattr(
            StageInputs, "key_of", lambda self, parts: found.setdefault(self.stage, self) and key_of(self, parts)
        )
        resolved = resolve(recipe, cluster)
        look_at_stages(Store(folder), resolved, cluster)
        look_at_stages(Store(folder), resolved, cluster, curation)
    return found


def test_every_stage_declares_its_inputs() -> None:
    assert set(kinds()) == STAGES
    for kind in kinds().values():
        assert kind.__dataclass_params__.frozen


def test_exceptions_from_the_key_are_these_and_say_why() -> None:
    marked = {name: kind.not_in_key() for name, kind in kinds().items()}
    assert {name: set(marks) for name, marks in marked.items() if marks} == EXCEPTIONS
    for marks in marked.values():
        assert all(len(mark.reason) > 15 for mark in marks.values())


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_each_field_of_the_inputs_changes_the_key(seen: dict[str, StageInputs], stage: str) -> None:
    inputs, marks = seen[stage], kinds()[stage].not_in_key()
    for field in dataclasses.fields(inputs):
        changed = dataclasses.replace(inputs, **{field.name: "another value"})
        mark = marks.get(field.name)
        if mark is None:
            assert changed.key != inputs.key, field.name
        elif mark.names:
            part = getattr(inputs, field.name)
            for name in type(part).model_fields:
                value = part.model_copy(update={name: "another value"})
                same = dataclasses.replace(inputs, **{field.name: value}).key == inputs.key
                assert same == (name in mark.names), f"{field.name}.{name}"
        else:
            assert changed.key == inputs.key, field.name


def test_a_plan_knows_what_the_speed_of_every_planned_stage_depends_on(seen: dict[str, StageInputs]) -> None:
    for name in STAGES - {"ensemble"}:  # it costs next to nothing, and is not planned
        facts = seen[name].speed
        assert "size" in facts, name
        assert json.loads(json.dumps(facts)) == facts, name


def test_time_grows_with_the_gallery_in_curate_and_with_what_was_read_in_labels(seen: dict[str, StageInputs]) -> None:
    manifest = {"gallery": 48, "read": 30}
    assert seen["curate"].images_worked(7, manifest) == 48
    assert seen["labels"].images_worked(0, manifest) == 30
    assert seen["hygiene"].images_worked(7, manifest) == 7


def test_the_key_is_a_hash_of_what_the_manifest_lists(seen: dict[str, StageInputs]) -> None:
    for inputs in seen.values():
        assert inputs.key == digest(inputs.stage, inputs.key_parts())
        assert inputs.key_parts()["version"] == inputs.version


def test_work_gets_its_inputs_and_the_services_and_closes_over_nothing() -> None:
    """The functions handed to `run_stage` are plain functions of a module, with the four parameters it gives them; what
    they and their helpers can reach besides is the runtime, which holds no recipe."""
    works = []
    for path in Path(ktray.stages.__path__[0]).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        handed = {
            call.args[2].id
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "run_stage"
            if isinstance(call.args[2], ast.Name)
        }
        plain = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert handed <= set(plain), f"{path.name}: work is not a function of the module"
        for name in handed:
            arguments = [argument.arg for argument in plain[name].args.args]
            assert arguments == ["inputs", "runtime", "stage", "reporter"], f"{path.name}: {name}"
            read = {node.attr for node in ast.walk(plain[name]) if isinstance(node, ast.Attribute)}
            assert "recipe" not in read, f"{path.name}: {name}"
            works.append(name)
    assert len(works) == len(STAGES)
    assert not {"recipe", "task", "context"} & {field.name for field in dataclasses.fields(Runtime)}
    assert not any("Recipe" in str(kind) for kind in inspect.get_annotations(Runtime).values())


@dataclass(frozen=True)
class Toy(StageInputs):
    stage = "toy"
    version = 1

    size: int
    note: Annotated[str, NotInKey("only for the terminal")] = ""
    train: Annotated[TrainConfig, NotInKey("how, not what", ("checkpoint_seconds",))] = dataclasses.field(
        default_factory=TrainConfig
    )


@dataclass(frozen=True)
class Grown(StageInputs):
    """`Toy` in a later version."""

    stage = "toy"
    version = 1

    size: int
    train: Annotated[TrainConfig, NotInKey("how, not what", ("checkpoint_seconds",)), AddedLater({"clip": 1.0})] = (
        dataclasses.field(default_factory=TrainConfig)
    )
    weight: Annotated[str, AddedLater("none")] = "none"


def test_what_was_added_later_is_in_the_key_only_if_it_changes_something() -> None:
    parts = Toy(1).key_parts()
    del parts["train"]["clip"]  # as if the older version had no such field
    base = Grown(1)
    assert base.key_parts() == parts
    assert base.key == Toy(1).key_of(parts)
    assert Grown(1, weight="confidence").key_parts()["weight"] == "confidence"
    assert Grown(1, train=TrainConfig(clip=2.0)).key_parts()["train"]["clip"] == 2.0
    keys = {base.key, Grown(1, weight="confidence").key, Grown(1, train=TrainConfig(clip=2.0)).key}
    assert len(keys) == 3
    assert Grown(1, train=TrainConfig(checkpoint_seconds=1.0)).key == base.key


def test_the_keys_of_transfer_sets_without_a_floor_and_of_equal_weights_are_those_of_older_stores(
    seen: dict[str, StageInputs],
) -> None:
    curate, transfer = seen["curate"], seen["transfer"]
    assert not {"min_similarity", "weight"} & set(curate.key_parts()["transfer"])
    assert "weight" not in transfer.key_parts()
    weighted = dataclasses.replace(curate, transfer=curate.transfer.model_copy(update={"weight": "confidence"}))
    assert weighted.key == curate.key
    floored = dataclasses.replace(curate, transfer=curate.transfer.model_copy(update={"min_similarity": 0.5}))
    assert floored.key != curate.key


def test_what_is_marked_stays_out_of_the_key() -> None:
    base = Toy(1)
    assert Toy(2).key != base.key
    assert Toy(1, note="hello").key == base.key
    assert Toy(1, train=TrainConfig(checkpoint_seconds=1.0)).key == base.key
    assert Toy(1, train=TrainConfig(lr=0.5)).key != base.key
    assert "note" not in base.key_parts()
    assert "checkpoint_seconds" not in base.key_parts()["train"]


def test_another_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Toy(1).key
    monkeypatch.setattr(Toy, "version", 2)
    assert Toy(1).key != before


def test_a_value_that_nothing_tells_apart_is_refused() -> None:
    class Odd:
        pass

    toy: Any = Toy(Odd())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="type Odd has no key"):
        _ = toy.key


def test_values_are_told_apart_by_content_or_fingerprint() -> None:
    one, other = (Preprocess((32, 32), mean=(0.5, 0.5, m), std=(1.0, 1.0, 1.0)) for m in (0.1, 0.2))
    assert key_value(one) != key_value(other)
    assert key_value({"a": [one, None, 1.5]}) == {"a": [one.fingerprint, None, 1.5]}
