"""The recipes at the paper's scale: each resolves on a small copy of its data, and its header tells its plan's cost."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from heard import heard
from image_zoo import jpeg
from PIL import Image
from small_task import write_generic

from ktray import recipe as recipes
from ktray.accounting.speeds import Speeds
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.distributed.allocation import allocate as share_out
from ktray.jobs.compare.methods import recipe_of
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.plan_stages import lines, traffic_of
from ktray.pipeline.plan_work import PlannedWork, named_facts
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import run
from ktray.storage.store import Store

GALLERY = 15_000_000  # about YFCC15M, the paper's gallery for ADE20K
# Classes, and images in train, val, test and the unlabelled rest, at the recipe's budget: the lists' own lengths.
SCALE = {
    "imagenet": (1000, 11_811, 1_000, 50_000, 1_268_356),
    "places365": (365, 18_250, 3_650, 32_850, 1_785_210),
    "ham10k": (7, 700, 193, 1_512, 9_315),
    "eurosat": (10, 100, 5_400, 18_900, 2_600),
    "ade20k": (150, 1_200, 1_000, 2_000, 18_010),
}
TEACHERS = {"teacher-dinov2-vitl14": "timm:vit_large_patch14", "teacher-openclip-vitl14": "open_clip:ViT-L-14/"}
STUDENTS = {
    "student-fastvit-s12": "fastvit_s12",
    "student-mobilevitv2-100": "mobilevitv2_100",
    "student-vit-s16": "vit_small_patch16_224",
}


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed, 32, 32))


def small_copy(root, name):
    """A few images of the data set in its host's layout, with lists in the official format: (data, lists)."""
    lists: dict[str, list[str]] = {}
    seeds = itertools.count()

    def add(split, file, line):
        write(root / "data" / file, next(seeds))
        lists.setdefault(split, []).append(line)

    classes = {
        "imagenet": ["n01440764", "n02012849"],
        "places365": ["airfield", "hunting_lodge_outdoor"],
        "ham10k": ["MEL", "NV"],
        "eurosat": ["Forest", "SeaLake"],
    }.get(name, [])
    for c, i in itertools.product(classes, range(12)):
        split = "train" if i < 8 else "val" if i < 10 else "test"
        if name == "imagenet" and split == "train":
            add("train_1percent" if i < 6 else "train_full", f"train/{c}/{c}_{i}.JPEG", f"{c}_{i}.JPEG,{c}")
        elif name == "imagenet":
            file = f"ILSVRC2012_val_{classes.index(c) * 100 + i:08d}.JPEG"
            add("val", f"val/{file}", f"{file},{c}")
        elif name == "places365" and split == "train":
            folder = c.replace("lodge_", "lodge/")
            add("train_50img_per_class", f"data_256/{c[0]}/{folder}/{i:08d}.jpg", f"{i:08d}.jpg,{c}")
        elif name == "places365":
            file = f"Places365_val_{classes.index(c) * 100 + i:08d}.jpg"
            add(split, f"val_256/{file}", f"{file},{c}")
        elif name == "ham10k":
            file = f"ISIC_{classes.index(c) * 100 + i:07d}.jpg"
            add("train_100img_max_per_class" if split == "train" else split, f"part_{i % 3}/{file}", f"{file},{c}")
        else:
            file = f"{c}_{i}.jpg"
            add("train_10img_per_class" if split == "train" else split, f"2750/{c}/{file}", f"{file},{c}")
    if name == "ade20k":
        masks = np.random.default_rng(0).integers(0, 4, (12, 32, 32), dtype=np.uint8)
        for i in range(12):
            part, short = ("training", "train") if i < 9 else ("validation", "val")
            file = f"ADE_{short}_{i:08d}"
            add("train_1200img" if i < 6 else "val" if i < 9 else "test", f"images/{part}/{file}.jpg", f"{file}.jpg")
            labels = root / "data/annotations" / part
            labels.mkdir(parents=True, exist_ok=True)
            Image.fromarray(masks[i]).save(labels / f"{file}.png")
        rows = (f"{i}\t0.1\t1\t1\t0\t{text}" for i, text in enumerate(("wall", "sky, heaven", "tree"), 1))
        (root / "data/objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows))
    (root / "lists").mkdir()
    for split, some in lists.items():
        (root / "lists" / f"{split}.txt").write_text("\n".join(some))
    for i in range(6):
        write(root / "gallery" / f"{i}.jpg", 1000 + i)
    return str(root / "data"), str(root / "lists"), str(root / "gallery")


def resolved(root, name, *overlays):
    """The recipe resolved on its small copy."""
    data, lists, gallery = small_copy(root, name)
    keys = [f"store={root}/store", f"task.data={data}", f"task.splits={lists}", f"gallery.data={gallery}"]
    said: list[str] = []
    return heard(said, resolve, recipes.load([name, *overlays], keys), share_out(8.0, 1.0, 1, 1, "auto"))


def at_scale(found, name):
    """As if all of the data set, and the paper's gallery, had been read."""
    classes, train, val, test, rest = SCALE[name]
    one = LabelledExample("x", 0)
    task = LabelledSet([str(i) for i in range(classes)], [one] * train, [one] * val, [one] * test, ["x"] * rest)
    return replace(found, task=task, gallery_images=GALLERY)


def petaflops_and_hours(found, gpu="H200"):
    """Of INDEX and of all other stages: PFLOP, and hours on one GPU, without the speeds of a store."""
    none = Speeds(Store(str(found.recipe.store)).sub("speeds"))
    work = PlannedWork(lines(found), traffic_of(found), named_facts(found.recipe), none)
    estimates = work.on(PlannedDevice.named(gpu, {}))
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for line in work.lines:
        place = int(line.stage != "index")
        sums[0][place] += line.flops / 1e15
        sums[1][place] += estimates[line.stage].device_seconds / 3600
    return sums


@pytest.mark.parametrize("name", SCALE)
def test_it_resolves_on_a_small_copy(tmp_path, name):
    found = resolved(tmp_path, name)
    recipe = found.recipe
    assert found.task.train
    assert found.task.val
    assert found.task.test
    assert all(bool(example.mask) == (name == "ade20k") for example in found.task.train)
    assert recipe.task.name == name
    assert recipe.transfer.source == "retrieved"
    assert recipe.train.steps == round(recipe.train.epochs * 153_600 / recipe.train.batch_size)
    assert recipe.task.metric == {"ham10k": "mean_class_accuracy", "ade20k": "miou"}.get(name, "top1")


# Four tasks have images of one shape, so one of them and ADE20K see every model at both sizes.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("imagenet", "ade20k") else pytest.mark.slow) for name in SCALE],
)
def test_the_header_tells_what_the_plan_counts(tmp_path, name):
    found = at_scale(resolved(tmp_path, name), name)
    (index, rest), (index_hours, rest_hours) = petaflops_and_hours(found)
    text = (recipes.BUILTIN / f"{name}.yaml").read_text(encoding="utf-8")
    told = re.search(
        r"index ([\d,]+) PFLOP \(([\d.]+) H200-hours.*?the rest ([\d,]+) PFLOP \(([\d.]+) H200-h", text, re.S
    )
    told = [float(number.replace(",", "")) for number in told.groups()]
    assert told == pytest.approx([index, index_hours, rest, rest_hours], rel=0.05)
    assert "not public" in text
    assert f"--recipe {name} task.data=" in text


@pytest.mark.parametrize(("teacher", "student"), [*itertools.product(TEACHERS, STUDENTS)])
def test_overlays_name_their_models_and_nothing_else(teacher, student):
    for name in SCALE:
        alone, both = recipes.load(name, []), recipes.load([name, teacher, student], [])
        assert both.teacher.name.startswith(TEACHERS[teacher])
        assert both.student.name == STUDENTS[student]
        assert both.teacher.image_size == alone.teacher.image_size
        same = {"teacher": {"name"}, "student": {"name"}}
        assert both.model_dump(exclude=same) == alone.model_dump(exclude=same)


QUICK = [
    ("imagenet", "teacher-openclip-vitl14", "student-mobilevitv2-100"),
    ("imagenet", "teacher-dinov2-vitl14", "student-vit-s16"),
    ("ade20k", "teacher-openclip-vitl14", "student-vit-s16"),
    ("ade20k", "teacher-dinov2-vitl14", "student-mobilevitv2-100"),
]
ALL = [
    pytest.param(*combination, marks=() if combination in QUICK else pytest.mark.slow)
    for combination in itertools.product(SCALE, TEACHERS, STUDENTS)
]


@pytest.mark.parametrize(("name", "teacher", "student"), ALL)
def test_all_tasks_teachers_and_students_are_planned(tmp_path, name, teacher, student):
    found = at_scale(resolved(tmp_path, name, teacher, student), name)
    plan = {line.stage: line for line in lines(found)}
    assert set(plan) >= {"adapt", "index", "curate", "teach", "transfer", "finetune", "scratch", "evaluate"}
    assert all(line.flops > 0 for stage, line in plan.items() if stage != "labels")  # LABELS only decodes
    # ViT-L/14: 24 blocks of 12 x 1024^2 weights, two FLOPs each, on side^2 patches; attention and the rest on top.
    side = found.recipe.teacher.image_size // 14
    per_image = plan["teach"].flops / (found.recipe.teach.views * 153_600)
    assert 1.0 < per_image / (24 * 12 * 1024**2 * 2 * side**2) < 1.35


SHRUNKEN = [
    "teacher.name=miniverse",
    "teacher.image_size=null",
    "teacher.finetune.steps=1",
    "image_size=32",
    "student.name=test_resnet",
    "student.kwargs={output_stride: 8}",
    "student.pretrained=false",
    "transfer.size=5",
    "teach.views=2",
    "train.steps=1",
    "train.batch_size=4",
    "finetune.steps=1",
    "finetune.batch_size=4",
    "baselines.scratch=false",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "ade20k" else pytest.param(name, marks=pytest.mark.long) for name in SCALE],
)
def test_one_shrunken_step_of_each_runs_to_its_end(cluster, tmp_path, name):
    data, lists, gallery = small_copy(tmp_path, name)
    keys = [f"store={tmp_path}/store", f"task.data={data}", f"task.splits={lists}", f"gallery.data={gallery}"]
    result = run(recipes.load(name, [*keys, *SHRUNKEN]))
    assert [s["name"] for s in result["stages"] if s["name"] in ("transfer", "finetune", "evaluate")] == [
        "transfer",
        "finetune",
        "evaluate",
    ]
    assert result["metric"]["name"] == {"ham10k": "mean_class_accuracy", "ade20k": "miou"}.get(name, "top1")
    # ImageNet's list named val is the test set, as the paper has it.
    assert result["metric"]["test_images"] == {"imagenet": 8, "ade20k": 3}.get(name, 4)
    assert 0 <= result["metric"]["test"] <= 1
    assert result["data"]["quarantined"] == 0
    assert result["transfer_set"]["kept"] == 5


@pytest.mark.long
@pytest.mark.slow
def test_the_page_on_compute_tells_what_the_plan_counts(tmp_path):
    page = (recipes.BUILTIN.parents[2] / "docs" / "measured" / "compute.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([a-z ]+) \| [^|]+ \| ([\d,]+ \| [\d,]+) \|", page, re.M))
    timed = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+ \| [\d.]+) \|", page, re.M))
    data, lists, gallery = small_copy(tmp_path, "eurosat")
    keys = [f"task.data={data}", f"task.splits={lists}", f"gallery.data={gallery}"]
    generic = write_generic(tmp_path / "generic", 3)
    base = recipes.load(["eurosat", "paper-schedules"], [*keys, f"supervised.data={generic}"])
    assert set(told) == set(timed) == set(base.compare.ways)
    for name, way in base.compare.ways.items():
        found = resolve(recipe_of(base, way), share_out(8.0, 1.0, 1, 1, "auto"))
        found = at_scale(found, "eurosat")
        if found.source:
            found = replace(found, gallery_images=1_281_167)
        petaflops, hours = petaflops_and_hours(found)
        assert [float(text.replace(",", "")) for text in told[name].split(" | ")] == pytest.approx(petaflops, rel=0.05)
        assert [float(text) for text in timed[name].split(" | ")] == pytest.approx(hours, rel=0.05, abs=0.006)
