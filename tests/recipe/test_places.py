"""Places are absolute in what is recorded and sent."""

from ktray import recipe as recipes
from ktray.recipe.places import with_absolute_places


def test_every_place_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    recipe = recipes.load(
        None,
        [
            "task.data=~/photos",
            "task.splits=splits",
            "gallery.data=[a, s3://bucket/x, b/*.tar, file:///c]",
            "gallery.images=tars",
            "gallery.index=index",
            "teacher.name=open_clip:x",
            "teacher.checkpoint=../t.safetensors",
            "teacher.config=t.json",
            "teacher.others=[{name: timm:x, checkpoint: o.pt}]",
            "student.checkpoint=s.pt",
            "transfer.list=list.txt",
            "supervised.data=sup",
            "store=./ktray-store",
            "bench.json_file=out.json",
            "mlflow.run_name=a/b",
        ],
    )
    here = str(tmp_path)
    made = with_absolute_places(recipe)
    assert made.task.data == "/home/me/photos"
    assert made.task.splits == f"{here}/splits"
    assert made.gallery.data == [f"{here}/a", "s3://bucket/x", f"{here}/b/*.tar", "/c"]
    assert (made.gallery.images, made.gallery.index) == (f"{here}/tars", f"{here}/index")
    assert made.teacher.checkpoint == f"{tmp_path.parent}/t.safetensors"
    assert (made.teacher.config, made.teacher.others[0].checkpoint) == (f"{here}/t.json", f"{here}/o.pt")
    assert (made.student.checkpoint, made.transfer.list) == (f"{here}/s.pt", f"{here}/list.txt")
    assert (made.supervised.data, made.store) == (f"{here}/sup", f"{here}/ktray-store")
    assert made.bench.json_file == f"{here}/out.json"
    assert (made.mlflow.run_name, made.teacher.name) == ("a/b", "open_clip:x")
    assert recipe.gallery.data[0] == "a"  # the argument is unchanged
    assert with_absolute_places(made) == made
    assert made.objective.model_fields_set == recipe.objective.model_fields_set


def test_nothing_is_invented():
    recipe = recipes.load(None, ["task.data=s3://bucket/x"])
    made = with_absolute_places(recipe)
    assert made.task.data == "s3://bucket/x"
    assert made.model_copy(update={"store": recipe.store, "task": recipe.task}) == recipe
