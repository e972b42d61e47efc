import pytest
import yaml

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.recipe.schema import TrainConfig


def test_overrides_have_types_and_the_resolved_recipe_reads_back(tmp_path):
    found = recipes.load(None, ["train.lr=1e-3", "gallery.data=[a,b]", "student.kwargs.patch_size=2", "teach.views=2"])
    assert found.train.lr == 0.001
    assert found.gallery.data == ["a", "b"]
    assert found.student.kwargs["patch_size"] == 2
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(found))
    assert recipes.load(str(file), []) == found


def test_the_default_is_the_built_in_task_and_own_data_starts_from_the_schema():
    assert recipes.load(None, []).task.name == "letters"
    assert recipes.load(None, ["task.name=digits"]).task.name == "digits"
    own = recipes.load(None, ["task.data=photos"])
    assert own.student.name is None
    assert own.train == TrainConfig()


NAMES = sorted(p.stem for p in recipes.BUILTIN.glob("*.yaml"))
PARTS = [name for name in NAMES if name.startswith(("teacher-", "student-", "paper-"))]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PARTS])
def test_every_named_recipe_is_valid(name):
    assert recipes.load(name, []).task.name


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_recipe_goes_over_a_whole_one(name):
    found = recipes.load(["eurosat", name], [])
    assert found.task.name == "eurosat"
    assert found != recipes.load("eurosat", []) or name in ("teacher-dinov2-vitl14", "student-fastvit-s12")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=3", r"Unknown recipe key 'trian\.lr'\. Did you mean 'train\.lr'"),
        ("lr=3", r"Did you mean 'train\.lr'"),
        ("train.lr=fast", r"'train\.lr' does not accept 'fast'"),
        ("teacher.adapt=magic", "'probe', 'finetune', 'lora', 'text' or 'auto'"),
        ("teach.views=0", "greater than or equal to 1"),
        ("transfer.size", "not a key=value pair"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(KtrayError, match=message):
        recipes.load(None, [override])


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(KtrayError, match=r"No recipe is named 'nope'.*letters"):
        recipes.load("nope", [])
    with pytest.raises(KtrayError, match="cannot be read"):
        recipes.load(str(tmp_path / "none.yaml"), [])
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {lr: [")
    with pytest.raises(KtrayError, match="not YAML"):
        recipes.load(str(bad), [])
    bad.write_text("train: {learning: 3}")
    with pytest.raises(KtrayError, match=r"Unknown recipe key 'train\.learning'"):
        recipes.load(str(bad), [])


def test_every_key_is_documented():
    rows = recipes.schema()
    assert len(rows) > 60
    assert all(text for _, _, _, text in rows)
    contract = {
        "store",
        "seed",
        "task.name",
        "task.data",
        "task.kind",
        "task.labels_per_class",
        "task.splits",
        "gallery.data",
        "teacher.name",
        "teacher.checkpoint",
        "teacher.adapt",
        "student.name",
        "student.checkpoint",
        "student.kwargs",
        "transfer.source",
        "transfer.strategy",
        "transfer.size",
        "objective.name",
        "teach.mode",
        "teach.views",
        "train.epochs",
        "train.steps",
        "train.batch_size",
        "train.lr",
        "image_size",
        "cluster.workers",
        "cluster.use_gpu",
        "mlflow.uri",
        "mlflow.experiment",
    }
    assert contract <= {key for key, _, _, _ in rows}


@pytest.mark.parametrize(
    ("text", "workers", "span"),
    [("2", 2, (2, 2)), ("1..4", "1..4", (1, 4)), ("3..3", 3, (3, 3)), ("1..12", "1..12", (1, 12))],
)
def test_workers_are_a_number_or_a_range(tmp_path, text, workers, span):
    found = recipes.load(None, [f"cluster.workers={text}"])
    assert (found.cluster.workers, found.cluster.span) == (workers, span)
    (tmp_path / "again.yaml").write_text(recipes.dump(found))
    assert recipes.load(str(tmp_path / "again.yaml"), []) == found


@pytest.mark.parametrize(
    "text", ["0", "-1", "2..1", "0..2", "1..", "..4", "1.5", "two", "true", "1..2..3", "null", "[1,2]"]
)
def test_other_numbers_of_workers_are_refused(text):
    with pytest.raises(KtrayError, match=r"'cluster.workers' does not accept .*(min\.\.max|at least one worker)"):
        recipes.load(None, [f"cluster.workers={text}"])


def test_digest_is_stable_and_tells_values_apart():
    assert recipes.digest({"a": 1, "b": [2]}) == recipes.digest({"b": [2], "a": 1})
    assert recipes.digest("a") != recipes.digest("b")


def test_of_several_recipes_the_later_keys_win(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("student: {name: resnet18}\ntrain: {steps: 7}\n")
    found = recipes.load(["digits", str(more)], ["seed=3"])
    assert (found.task.name, found.train.steps, found.train.batch_size, found.seed) == ("digits", 7, 128, 3)
    # Arguments belong to the student that they were written for.
    assert (found.student.name, found.student.kwargs) == ("resnet18", {})
    assert recipes.load([str(more), "digits"], []).student.kwargs == {"output_stride": 8}


def test_recipes_without_a_task_stand_over_the_built_in_ones(tmp_path):
    part = tmp_path / "part.yaml"
    part.write_text("train: {steps: 7}\nfinetune: {steps: 9}\n")
    letters, digits = recipes.load("letters", []), recipes.load("digits", [])
    assert recipes.load(str(part), []) == recipes.override(letters, {"train.steps": 7, "finetune.steps": 9})
    assert recipes.load(str(part), ["task.name=digits"]) == recipes.override(
        digits, {"train.steps": 7, "finetune.steps": 9}
    )
    assert recipes.load(str(part), ["task.data=mine"]) == recipes.override(
        recipes.Recipe(), {"task.data": "mine", "train.steps": 7, "finetune.steps": 9}
    )
    part.write_text("task: {data: mine}\n")
    assert recipes.load(str(part), []) == recipes.override(recipes.Recipe(), {"task.data": "mine"})


@pytest.mark.parametrize(
    "override",
    [
        "mlflow.uri=http://user:hunter22@host:5000",
        "store=s3://key:hunter22@bucket/x",
        "gallery.data=[a,s3://key:hunter22@bucket/x]",
    ],
)
def test_a_recipe_holds_no_credentials(override, tmp_path):
    """It is saved, logged and shown with its run, and a command line by ``ps``."""
    with pytest.raises(KtrayError, match="are saved and logged with their runs") as refused:
        recipes.load(None, [override])
    assert "hunter22" not in str(refused.value)
    key, _, value = override.partition("=")
    part, _, name = key.partition(".")
    (tmp_path / "r.yaml").write_text(f"{part}:\n  {name}: {value}\n" if name else f"{part}: {value}\n")
    with pytest.raises(KtrayError, match="are saved and logged with their runs"):
        recipes.load(str(tmp_path / "r.yaml"), [])
    with pytest.raises(KtrayError, match="are saved and logged with their runs"):
        recipes.override(recipes.Recipe(), {key: value})


def test_yaml_makes_no_objects(tmp_path):
    mark = tmp_path / "mark"
    text = f"!!python/object/apply:os.mkdir ['{mark}']"
    yaml.unsafe_load(f"seed: {text}")
    assert mark.exists()  # the payload is a real one
    mark.rmdir()
    (tmp_path / "r.yaml").write_text(f"seed: {text}\n")
    with pytest.raises(KtrayError, match="is not YAML"):
        recipes.load(str(tmp_path / "r.yaml"), [])
    with pytest.raises(KtrayError, match="is not YAML"):
        recipes.load(None, [f"seed={text}"])
    assert not mark.exists()
