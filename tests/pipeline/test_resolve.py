"""What the recipe leaves open is decided from the data and the machine, and told."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_task import write_scenes

from ktray import recipe as recipes
from ktray.distributed.allocation import allocate
from ktray.errors import KtrayError
from ktray.pipeline.published import PUBLISHED_TEACHER, PUBLISHED_TEACHER_GPU
from ktray.pipeline.resolve import labels_of, resolve
from ktray.recipe.choice import objectives

CPU = allocate(2, 0, 1, 1, False)
GPU = allocate(16, 1, 1, 1, True)
CLIP = (PUBLISHED_TEACHER, PUBLISHED_TEACHER_GPU)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 12 pictures, and 30 unlabelled ones, 200 x 240 px."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for folder, count in (("task/oak tree", 12), ("task/Bäume", 12), ("gallery", 30)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (200, 240, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.jpg")
    return root


def load(photos, *overrides):
    return recipes.load(None, [f"task.data={photos / 'task'}", f"gallery.data={photos / 'gallery'}", *overrides])


@pytest.mark.parametrize(("installed", "student"), [(True, "tf_efficientnet_lite0"), (False, "mobilenetv3_small_050")])
@pytest.mark.parametrize(("machine", "size", "images"), [(CPU, 128, 15), (GPU, 160, 15)])
def test_own_photos_close_every_key_with_its_reason(photos, machine, size, images, installed, student, monkeypatch):
    found = Path(__file__) if installed else None
    monkeypatch.setattr("ktray.models.packaged.PackagedWeights.find", lambda self: found)
    student, starts = ("fastvit_s12", False) if machine is GPU else (student, installed)
    given = load(photos)
    found = resolve(given, machine)
    r = found.recipe
    assert (r.image_size, r.student.name, r.transfer.source, r.transfer.size) == (size, student, "retrieved", images)
    assert r.teacher.name in ("efficientnet-lite2", "efficientnet-lite1", "efficientnet-lite0", CLIP[machine is GPU])
    assert r.student.pretrained is starts  # no test asks the hub
    # Thirty passes over 15 images would be four steps.
    assert (r.train.steps, r.train.lr) == ((500, 5e-4) if starts else (2000, 6e-3))
    assert r.objective.mixup == (0.0 if starts else 0.8)
    assert (r.baselines.start, r.baselines.scratch) == (starts, not starts)
    for key in (
        "image_size",
        "student.name",
        "transfer.size",
        "train.batch_size",
        "train.steps",
        "teacher.name",
        "student.pretrained",
    ):
        (reason,) = [line for line in found.reasons if line.startswith(f"{key}=")]
        assert "(" in reason
    assert given.image_size is None, "the given recipe was changed"


def test_what_is_given_is_kept(photos):
    found = resolve(load(photos, "image_size=64", "student.name=resnet18", "train.steps=7"), CPU)
    assert (found.recipe.image_size, found.recipe.student.name, found.recipe.train.steps) == (64, "resnet18", 7)
    assert not [line for line in found.reasons if line.startswith(("image_size", "student.name", "train.steps"))]


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_small_images_keep_a_map_to_pool_over(photos, machine):
    from ktray.models.student.classifier import build_student

    found = resolve(load(photos, "image_size=32"), machine)
    student = build_student(found.recipe.student.name, found.recipe.student.kwargs, 2, 32)
    assert student.warnings == []


def test_without_a_gallery_the_task_itself_is_the_transfer_set(photos):
    found = resolve(recipes.load(None, [f"task.data={photos / 'task'}"]), CPU)
    assert found.recipe.transfer.source == "target"
    with pytest.raises(KtrayError, match=r"gallery\.data"):
        resolve(recipes.load(None, [f"task.data={photos / 'task'}", "transfer.source=retrieved"]), CPU)


def test_checkpoint_without_its_architecture(photos):
    with pytest.raises(KtrayError, match=r"teacher\.name=open_clip:"):
        resolve(load(photos, "teacher.checkpoint=weights.pt"), CPU)


def test_unknown_built_in_task_names_its_nearest(tmp_path):
    with pytest.raises(KtrayError, match="letters"):
        resolve(recipes.load(None, ["task.name=leters", f"store={tmp_path}"]), CPU)


def test_a_drawn_folder_is_copied_once_into_a_store_that_other_machines_see(tmp_path):
    from ktray.pipeline.resolve import _shared

    drawn = tmp_path / "home" / "world"
    (drawn / "a").mkdir(parents=True)
    (drawn / "a" / "1.png").write_bytes(b"one")
    given = recipes.load(None, [f"store={tmp_path / 'local'}"])
    assert _shared(given, drawn) == str(drawn)
    given = recipes.load(None, [f"store=file://{tmp_path / 'far'}"])
    copy = tmp_path / "far" / "miniverse" / "world"
    assert _shared(given, drawn).endswith(str(copy))
    assert (copy / "a" / "1.png").read_bytes() == b"one"
    (drawn / "a" / "1.png").write_bytes(b"two")
    _shared(given, drawn)
    assert (copy / "a" / "1.png").read_bytes() == b"one"


def test_a_drawn_folder_of_large_files_reaches_s3(tmp_path, s3):
    from ktray.pipeline.resolve import _shared
    from ktray.storage.store import Dir

    drawn = tmp_path / "world"
    drawn.mkdir()
    content = {f"{number:02d}.tar": bytes([number]) * 5_500_000 for number in range(10)}  # more than one part each
    for name, data in content.items():
        (drawn / name).write_bytes(data)
    copy = Dir(_shared(recipes.load(None, [f"store={s3.home}"]), drawn))
    assert copy.names() == {name: len(data) for name, data in content.items()}
    assert copy.read("09.tar") == content["09.tar"]


def test_an_objective_that_samples_embeddings_has_them_stored(photos):
    found = resolve(load(photos, "objective.name=specmatch", "teach.views=100"), GPU)
    assert found.recipe.teach.mode == "cached"
    assert any("specmatch needs stored embeddings" in line for line in found.reasons)
    for mode in ("live", "streamed"):
        with pytest.raises(KtrayError, match=rf"specmatch needs stored embeddings.*teach\.mode={mode}") as caught:
            resolve(load(photos, "objective.name=specmatch", f"teach.mode={mode}"), GPU)
        assert "teach.mode=cached" in caught.value.remedy


def test_objectives_of_classes_are_refused_for_maps(tmp_path):
    write_scenes(tmp_path / "task", tmp_path / "gallery")
    data = [f"task.data={tmp_path / 'task'}", f"gallery.data={tmp_path / 'gallery'}", "task.kind=segmentation"]
    of_classes = [config.objective_name() for config in objectives() if config().traits.classes]
    assert of_classes == ["dual", "oriented_features", "mtkd", "consistency", "probe"]
    for name in of_classes:
        with pytest.raises(KtrayError, match=f"{name} needs one class for each image") as caught:
            resolve(recipes.load(None, [*data, f"objective.name={name}", "image_size=32"]), CPU)
        assert "objective.name=oriented" in caught.value.remedy
    resolve(recipes.load(None, [*data, "objective.name=specmatch", "image_size=32"]), CPU)


def test_an_objective_without_a_teacher_takes_a_random_set_and_trains_the_classifier_itself(photos):
    found = resolve(load(photos, "objective.name=consistency"), CPU)
    assert (found.recipe.transfer.source, found.recipe.finetune.steps) == ("generic", 0)
    features = load(photos, "objective.name=oriented_features", "objective.predictions=0", "finetune.steps=0")
    with pytest.raises(KtrayError, match="leaves the student's classifier untrained"):
        resolve(features, CPU)
    both = resolve(load(photos, "objective.name=oriented_features", "finetune.steps=0"), CPU)
    assert both.recipe.finetune.steps == 0


def test_an_automatic_size_has_the_usual_limit_and_a_floor(photos):
    usual, found = resolve(load(photos), CPU), resolve(load(photos, "transfer.size=auto"), CPU)
    assert (usual.recipe.transfer.size, usual.recipe.transfer.min_similarity) == (15, None)
    assert (found.recipe.transfer.size, found.recipe.transfer.min_similarity) == (15, "auto")
    assert found.recipe.train.steps == usual.recipe.train.steps
    assert any(reason.startswith("transfer.min_similarity=auto (") for reason in found.reasons)
    given = resolve(load(photos, "transfer.size=auto", "transfer.min_similarity=0.4"), CPU)
    assert given.recipe.transfer.min_similarity == 0.4
    drawn = resolve(load(photos, "transfer.size=auto", "transfer.source=generic"), CPU)
    assert (drawn.recipe.transfer.size, drawn.recipe.transfer.min_similarity) == (15, None)
    own = resolve(load(photos, "transfer.size=auto", "transfer.source=target"), CPU)
    assert own.recipe.transfer.size is None


@pytest.mark.parametrize("wrong", ["transfer.size=0", "transfer.size=many", "transfer.min_similarity=1.5"])
def test_a_size_or_floor_that_cannot_be_is_refused(photos, wrong):
    with pytest.raises(KtrayError, match=wrong.partition("=")[0]):
        load(photos, wrong)


@pytest.mark.parametrize(("steps", "views"), [(2, 1), (8, 5), (500, 8)])
def test_no_more_views_are_stored_than_training_uses(photos, steps, views, monkeypatch):
    """10 images a step, 15 images: 1.3, 5.3 and 333 views of each image are used."""
    monkeypatch.setattr("ktray.pipeline.teaching.are_photographs", lambda recipe: True)  # these are noise
    keys = (f"train.steps={steps}", "train.batch_size=10", "transfer.size=15", "image_size=64")
    part = resolve(load(photos, *keys), CPU).recipe.teach
    assert (part.views, part.mode) == (views, "cached")


def test_parts_of_a_batch_need_equal_sizes_and_no_cuda_graphs(photos):
    keys = ["train.batch_size=32", "train.accumulate=2"]
    assert resolve(load(photos, *keys, "train.compile=true"), CPU).recipe.train.accumulate == 2
    with pytest.raises(KtrayError, match=r"train\.compile=graphs cannot add up .* train\.accumulate=2 parts"):
        resolve(load(photos, *keys, "train.compile=graphs"), CPU)
    with pytest.raises(KtrayError, match=r"train\.accumulate=3 does not divide the 32 images"):
        resolve(load(photos, "train.batch_size=32", "train.accumulate=3"), CPU)


def test_weights_need_predictions_that_exist_before_images_are_drawn(photos):
    found = resolve(load(photos, "transfer.weight=confidence", "teach.views=50"), CPU)
    assert (found.recipe.transfer.weight, found.recipe.teach.mode) == ("confidence", "cached")
    other = resolve(load(photos, "transfer.weight=confidence", "objective.name=agnostic"), CPU)
    assert other.recipe.transfer.weight == "none"
    assert any(reason.startswith("transfer.weight=none (agnostic") for reason in other.reasons)
    with pytest.raises(KtrayError, match=r"teach\.mode=live") as refused:
        resolve(load(photos, "transfer.weight=confidence", "teach.mode=live"), CPU)
    assert "teach.mode=cached" in refused.value.remedy


def test_labels_are_read_before_the_other_keys_are_chosen(photos):
    recipe = load(photos)
    assert labels_of(recipe).classes == ["Bäume", "oak tree"]
    assert recipe.task.metric == "auto"
