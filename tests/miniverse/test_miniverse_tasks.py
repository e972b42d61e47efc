"""The built-in tasks: labels name what is drawn, the long tail is one, and maps agree with the pictures."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktray.miniverse import TASKS, ensure_task
from ktray.miniverse.scenes import scene
from ktray.miniverse.tasks import DrawnExample, tail
from ktray.miniverse.vocabulary import COLOURS, STREAMS
from ktray.miniverse.world import sample

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict[str, list[DrawnExample]]]:
    return {name: TASKS[name].splits() for name in ("textures", "colours", "marks", "shapes")}


def _counts(examples: list[DrawnExample]) -> list[int]:
    return sorted(Counter(example.label for example in examples).values(), reverse=True)


def test_tail_by_hand() -> None:
    assert tail(80, 10, 4) == [80, 40, 20, 10]
    assert tail(60, 3, 8)[::7] == [60, 3]


def test_tasks_are_whole() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert set(task.class_names) == set(task.classes)
        assert all(prompt.count("{}") == 1 for prompt in task.prompts)
        assert (task.metric == "miou") == (task.kind == "segmentation")
        assert (task.metric == "map") == (task.kind == "multilabel") == task.sets
        if task.kind == "classification":  # readers of folders number the classes in this order
            assert list(task.classes) == sorted(task.classes)
    counterparts = [task.counterpart.split(":")[0] for task in TASKS.values() if task.counterpart]
    assert sorted(counterparts) == ["ADE20K", "EuroSAT", "HAM10K", "ImageNet", "Places365"]


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [("textures", 5, (5, 5, 120)), ("colours", 12, (10, 5, 80)), ("shapes", 12, (10, 5, 50))],
)
def test_even_tasks(
    drawn: dict[str, dict[str, list[DrawnExample]]], name: str, classes: int, counts: tuple[int, int, int]
) -> None:
    for split, each in zip(SPLITS, counts, strict=True):
        assert _counts(drawn[name][split]) == [each] * classes
    assert TASKS[name].labels_per_class == counts[0]


def test_marks_have_a_long_tail(drawn: dict[str, dict[str, list[DrawnExample]]]) -> None:
    for split in SPLITS:
        counts = _counts(drawn["marks"][split])
        assert len(counts) == 8
        assert 10 < counts[0] / counts[-1] <= 20
        ratios = [a / b for a, b in itertools.pairwise(counts)]
        assert 1.2 < min(ratios) <= max(ratios) < 1.8
    test = _counts(drawn["marks"]["test"])
    assert 1400 < sum(test) < 1600
    assert test[-1] == 35
    order = [sorted(Counter(e.label for e in drawn["marks"][s]).items(), key=lambda x: -x[1]) for s in SPLITS]
    assert len({tuple(label for label, _ in one) for one in order}) == 1  # the same classes are rare in each split
    # One guess for all images is far better by top-1 than by the mean of the classes' accuracies (1 / 8).
    assert test[0] / sum(test) > 0.3


def test_splits_share_no_image(drawn: dict[str, dict[str, list[DrawnExample]]]) -> None:
    for name, splits in drawn.items():
        images = [example.image.tobytes() for split in SPLITS for example in splits[split]]
        assert len(set(images)) == len(images), name
    every = [e.image.tobytes() for splits in drawn.values() for examples in splits.values() for e in examples]
    every += [sample(stream, i).image.tobytes() for stream in ("gallery", "generic-labelled") for i in range(300)]
    assert len(set(every)) == len(every)


def test_labels_name_what_is_drawn(drawn: dict[str, dict[str, list[DrawnExample]]]) -> None:
    for name in ("textures", "colours", "marks", "shapes"):
        task, pictures = TASKS[name], {}
        for index in range(200):
            one = sample(f"{name}-train", index)
            pictures[one.image.tobytes()] = one.facts.colour if name == "colours" else one.facts.name
        named = [
            (task.class_names[task.classes[e.label]], pictures[e.image.tobytes()])
            for e in drawn[name]["train"]
            if e.image.tobytes() in pictures
        ]
        assert len(named) >= 25
        assert all(told == shown for told, shown in named)


def test_colours_come_with_every_thing() -> None:
    pictures = [sample("colours-test", index) for index in range(240)]
    assert Counter(p.facts.colour for p in pictures) == dict.fromkeys(COLOURS, 20)
    assert len({p.subject for p in pictures if p.facts.colour == "red"}) > 10
    assert {p.subject.kind for p in pictures} == set(STREAMS["colours-test"].mix)


def test_maps_agree_with_pictures(drawn: dict[str, dict[str, list[DrawnExample]]]) -> None:
    gaps, shares, rims = [], [], []
    for example in drawn["shapes"]["test"]:
        mask = example.mask
        assert mask is not None
        assert mask.dtype == np.uint8
        assert mask.shape == example.image.shape[:2]
        assert set(np.unique(mask).tolist()) == {0, example.label, 255}
        inside, outside = example.image[mask == example.label], example.image[mask == 0]
        gaps.append(np.linalg.norm(inside.mean(0) - outside.mean(0)))
        shares.append(len(inside) / mask.size)
        rims.append(float((mask == 255).mean()))
    assert min(shares) > 0.02
    assert max(shares) < 0.95  # a square that fills the frame
    assert 0.1 < np.median(shares) < 0.5
    assert max(rims) < 0.25
    assert np.median(rims) < 0.1
    # The colours on the two sides differ in nearly all pictures: the map lies where the shape does.
    assert np.mean(np.array(gaps) > 40) > 0.97
    shifted = []
    for example in drawn["shapes"]["test"][:100]:
        assert example.mask is not None
        away = np.roll(example.mask, (16, 16), (0, 1))
        inside, outside = example.image[away == example.label], example.image[away == 0]
        shifted.append(np.linalg.norm(inside.mean(0) - outside.mean(0)))
    assert np.median(shifted) < np.median(gaps) / 2


def test_map_parts_the_two_sides_better_than_any_shift() -> None:
    """Variance of the picture that two mean colours explain is greatest where the map lies."""

    def explained(image: np.ndarray, mask: np.ndarray) -> float:
        known = mask != 255
        pixels, side = image[known].astype(float), mask[known] == 1
        rest = sum(pixels[s].var(0).sum() * s.mean() for s in (side, ~side))
        return 1 - rest / pixels.var(0).sum()

    wins = 0
    for index in range(60):
        one = sample("shapes-val", index)
        here = explained(one.image, one.mask)
        moved = [explained(one.image, np.roll(one.mask, step, axis)) for step in (-3, 3) for axis in (0, 1)]
        wins += here > max(moved)
    assert wins >= 54


def test_mask_of_texture_is_whole() -> None:
    assert (sample("textures-val", 3).mask == 1).all()


def test_segmentation_folder(tmp_path: Path, drawn: dict[str, dict[str, list[DrawnExample]]]) -> None:
    folder = ensure_task(tmp_path, "shapes")
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert (about["kind"], about["metric"]) == ("segmentation", "miou")
    names = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert names == about["classes"]
    assert names[0] == "background"
    assert len(names) == 13
    for split, count in {"train": 120, "val": 60, "test": 600}.items():
        images, masks = (sorted(p.name for p in (folder / split / part).iterdir()) for part in ("images", "masks"))
        assert images == masks
        assert len(images) == count
    for number in (0, 17, 599):
        image, mask = (Image.open(folder / "test" / part / f"{number:05d}.png") for part in ("images", "masks"))
        assert (image.mode, mask.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(image), drawn["shapes"]["test"][number].image)
        expected = drawn["shapes"]["test"][number].mask
        assert expected is not None
        assert np.array_equal(np.asarray(mask), expected)


def test_imbalanced_folder(tmp_path: Path) -> None:
    folder = ensure_task(tmp_path, "marks")
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert (about["kind"], about["metric"]) == ("classification", "mean_class_accuracy")
    counts = {name: len(list((folder / "train" / name).iterdir())) for name in about["classes"]}
    assert (counts["ampersand"], counts["equals_sign"]) == (60, 3)


def test_scenes_show_the_classes_that_their_list_names(tmp_path: Path) -> None:
    folder = ensure_task(tmp_path, "scenes")
    about = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert (about["kind"], about["metric"], about["image_size"]) == ("multilabel", "map", 64)
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["split"] for row in rows) == {"train": 320, "val": 160, "test": 1000}
    named = [set(filter(None, row["label"].split("|"))) for row in rows]
    assert set().union(*named) == set(about["classes"])
    assert 0.1 < np.mean([not names for names in named]) < 0.2
    assert 0.3 < np.mean([len(names) > 1 for names in named]) < 0.6
    for number in (0, 7, 999):
        row, drawn = rows[480 + number], scene("scenes-test", number)
        assert row["path"] == f"test/{number:05d}.png"
        assert np.array_equal(np.asarray(Image.open(folder / row["path"])), drawn.image)
        assert named[480 + number] == {s.name for s in drawn.subjects if s.name in about["classes"]}


def test_scenes_have_their_subjects_in_cells_and_a_gallery() -> None:
    one = scene("scenes-gallery", 3)
    assert one.image.shape == (64, 64, 3)
    assert np.array_equal(one.image, scene("scenes-gallery", 3).image)
    assert not np.array_equal(one.image, scene("scenes-gallery", 3, seed=1).image)
    drawn = [scene("scenes-gallery", index) for index in range(400)]
    assert set(Counter(len(s.subjects) for s in drawn)) == {1, 2, 3}
    assert all(s.caption.count("the ") == len({t.name for t in s.subjects}) for s in drawn)
    share = np.mean([t.kind == "shape" for s in drawn for t in s.subjects])
    assert share == pytest.approx(0.30, abs=0.05)
