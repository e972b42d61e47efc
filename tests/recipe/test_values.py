"""The type of a key decides how its value is read."""

import pytest
import yaml

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.recipe.values import Scalar, read_document, write_document


def value_of(word, *more):
    value = recipes.load(None, [*(["task.data=/z"] if not word.startswith("task.data") else []), word, *more])
    for name in word.partition("=")[0].split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
        if isinstance(value, dict):
            return value
    return value


# Texts that YAML 1.1 takes for a number, a date, a boolean, null, a comment, a mapping, a list or a tag.
NAMES = (
    "2024_01", "007", "1e5", "0x10", "1:30", "2026-11-27", "yes", "off", "~x", "my #1 photos", "site: north", "[old]",
    "{new}", "&a", "*a", "!x", "%20", "@home", "`x`", "'quoted'", "a: b: c", "- x", "? x", "|", ">", "x ", " x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["task.data", "mlflow.run_name", "store", "teacher.checkpoint", "export.register_as"])
def test_a_text_is_what_was_typed(tmp_path, key, name):
    assert value_of(f"{key}={name}") == name
    recipe = recipes.load(None, ["task.data=/z", f"{key}={name}"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(str(file), []) == recipe  # what is recorded can be run again


@pytest.mark.parametrize("name", [n for n in NAMES if n[0] not in "[{"])
def test_an_address_of_a_gallery_is_a_text_too(name):
    assert value_of(f"gallery.data={name}") == name


def test_lists_of_texts():
    assert value_of("gallery.data=[/a b, 2024_01, /x/my #1 photos]") == ["/a b", "2024_01", "/x/my #1 photos"]
    assert value_of('gallery.data=["/a, b", c]') == ["/a, b", "c"]
    assert value_of("task.prompts=[a photo of a {}., the {}]") == ["a photo of a {}.", "the {}"]
    assert value_of("compare.ways=[oriented retrieved, scratch]") == ["oriented retrieved", "scratch"]
    with pytest.raises(KtrayError, match=r"The value of 'gallery.data' is not YAML.*quotes"):
        value_of('gallery.data=["/a, b]')


def test_other_types_are_yaml():
    assert value_of("train.lr=1e-3") == 0.001
    assert value_of("transfer.size=500") == 500
    assert value_of("transfer.size=auto") == "auto"
    assert value_of("cluster.workers=1..4") == "1..4"
    assert value_of("cluster.use_gpu=false") is False
    assert value_of("compare.seeds=[1, 2]") == [1, 2]
    assert value_of("student.kwargs={patch_size: 2, name: no}") == {"patch_size": 2, "name": "no"}
    assert value_of("compare.ways={a: {train.lr: 1e-3}}") == {"a": {"train.lr": 0.001}}


def test_null_is_an_empty_value():
    assert value_of("teacher.checkpoint=null") is None
    assert value_of("teacher.checkpoint=") is None
    assert value_of("teacher.image_size=null") is None
    with pytest.raises(KtrayError, match="'store' does not accept None"):
        value_of("store=")


def test_what_follows_an_open_key_is_one_key():
    assert value_of("prices.g6.xlarge=0.9", "prices.cpu_core=0.1") == {"g6.xlarge": 0.9, "cpu_core": 0.1}
    assert value_of("mlflow.tags.team.name=a", "mlflow.tags.since=2026-11-27", "mlflow.tags.answer=no") == {
        "team.name": "a",
        "since": "2026-11-27",
        "answer": "no",
    }
    with pytest.raises(KtrayError, match="does not accept 'cheap'"):
        value_of("prices.g6.xlarge=cheap")


def test_a_file_is_read_like_the_command_line(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "task: {data: 2024_01}\nmlflow: {run_name: 2026-11-27, experiment: 42, tags: {on: yes, n: 3}}\n"
        "student: {kwargs: {a: 1e-3, b: 2026-11-27}}\ntrain: {lr: 1e-3}\n"
    )
    recipe = recipes.load(str(file), [])
    assert recipe.task.data == "2024_01"
    assert recipe.train.lr == 0.001
    assert recipe.mlflow.run_name == "2026-11-27"
    assert recipe.mlflow.experiment == "42"
    assert recipe.mlflow.tags == {"on": "yes", "n": "3"}
    assert recipe.student.kwargs == {"a": 0.001, "b": "2026-11-27"}


@pytest.mark.parametrize(
    "value", ["1e5", "1e-5", "yes", "2024_01", "0o7", "null", "", "1.", "2026-11-27", 1e-5, 7, None, True]
)
def test_documents_are_read_as_they_were_written(value):
    read = read_document(write_document({"a": value}))["a"]
    assert isinstance(read, Scalar)
    assert (read.value, type(read.value)) == (value, type(value))
    assert yaml.safe_load(write_document({"a": value})) == {"a": value}  # and by every other reader
