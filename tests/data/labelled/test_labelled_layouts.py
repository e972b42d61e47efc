"""Small copies of the paper's data sets as their hosts lay them out, with lists in the official format."""

import os
import random
from collections import Counter

import pyarrow.fs as pafs
import pytest

from ktray.data import filesystem
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.errors import KtrayError


def put(root, *names):
    """Files that differ; nothing here decodes them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def write_lists(folder, lists):
    """Lists of (file, class), or of file names alone."""
    folder.mkdir(exist_ok=True)
    for name, lines in lists.items():
        text = "\n".join(line if isinstance(line, str) else ",".join(line) for line in lines)
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def inside(root, uris):
    return {uri.removeprefix(f"{root}/") for uri in uris}


def labelled(found, examples):
    """File below the data to class."""
    return {e.uri: found.classes[e.label] for e in examples}


# ImageNet

TENCH, CRANE, CRANE2 = "n01440764", "n02012849", "n03126707"
IMAGENET_TRAIN = [(f"{c}_{i}.JPEG", c) for i in range(10) for c in (CRANE2, TENCH, CRANE)]
IMAGENET_LISTS = {
    "train_full": IMAGENET_TRAIN,
    "train_50percent": IMAGENET_TRAIN[:15],
    "train_10percent": IMAGENET_TRAIN[:12],
    "train_1percent": IMAGENET_TRAIN[:6],
    "val": [(f"ILSVRC2012_val_{i:08d}.JPEG", c) for i, c in enumerate((CRANE2, TENCH, CRANE, TENCH))],
}


@pytest.mark.parametrize("top", ["", "ILSVRC/Data/CLS-LOC/"])
@pytest.mark.parametrize("flat", [True, False])
def test_imagenet_flat_or_sorted_val_is_the_test_set(tmp_path, top, flat):
    root = put(tmp_path / "d", *(f"{top}train/{c}/{name}" for name, c in IMAGENET_TRAIN))
    put(root, *(f"{top}val/{name}" if flat else f"{top}val/{c}/{name}" for name, c in IMAGENET_LISTS["val"]))
    put(root, f"{top}test/ILSVRC2012_test_00000001.JPEG")
    (root / "LOC_synset_mapping.txt").write_text(
        f"{TENCH} tench, Tinca tinca\n{CRANE} crane\n{CRANE2} crane, big one\nn00000001 other\n"
    )
    splits = write_lists(tmp_path / "s", IMAGENET_LISTS)
    at = str(root) if not top else f"{root}/ILSVRC/Data/CLS-LOC"
    for data in {str(root), at}:  # the archive's top, or the folder that holds train and val
        found = read_labelled(data, splits=splits, seed=0, train_list="train_1percent", val_fraction=0.4)
        assert found.classes == [TENCH, CRANE, CRANE2]
        assert found.names == ["tench", "crane", "crane, big one"]
        chosen = {uri.rpartition("/")[2]: c for uri, c in labelled(found, found.train + found.val).items()}
        assert chosen == dict(IMAGENET_TRAIN[:6])
        assert Counter(e.label for e in found.val) == {0: 1, 1: 1, 2: 1}
        tested = {uri.rpartition("/")[2]: c for uri, c in labelled(found, found.test).items()}
        assert tested == dict(IMAGENET_LISTS["val"])
        assert {u.rpartition("/")[2] for u in found.unlabeled} == {name for name, _ in IMAGENET_TRAIN[6:]}
        assert "Layout: imagenet." in found.notes
        assert any("val.txt is the test set" in note for note in found.notes)


def test_draws_do_not_depend_on_where_the_archive_was_unpacked(tmp_path):
    splits = write_lists(tmp_path / "s", IMAGENET_LISTS)
    drawn = []
    for top in ("a/train", "b/ILSVRC/Data/CLS-LOC/train"):
        put(tmp_path / top, *(f"{c}/{name}" for name, c in IMAGENET_TRAIN))
        put(tmp_path / top / "../val", *(name for name, _ in IMAGENET_LISTS["val"]))
        found = read_labelled(str(tmp_path / top[0]), splits=splits, seed=3, train_list="train_full.txt")
        drawn.append([[e.uri.rpartition("/")[2] for e in part] for part in (found.train, found.val)])
    assert drawn[0] == drawn[1]
    assert [len(part) for part in drawn[0]] == [24, 6]


def test_train_lists_by_name(tmp_path):
    root = put(tmp_path / "d", *(f"train/{c}/{name}" for name, c in IMAGENET_TRAIN))
    put(root, *(f"val/{name}" for name, _ in IMAGENET_LISTS["val"]))
    splits = write_lists(tmp_path / "s", IMAGENET_LISTS)
    sizes = {
        name: len(read_labelled(str(root), splits=splits, seed=0, train_list=name, val_fraction=0.2).unlabeled)
        for name in ("train_1percent", "train_10percent", "train_50percent", "train_full")
    }
    assert sizes == {"train_1percent": 24, "train_10percent": 18, "train_50percent": 15, "train_full": 0}
    with pytest.raises(
        KtrayError, match=r"'train_1_percent' is not in the folder task\.splits.*Did you mean 'train_1percent'"
    ):
        read_labelled(str(root), splits=splits, seed=0, train_list="train_1_percent")
    with pytest.raises(KtrayError, match=r"task\.train_list=train_full is a list in the folder task\.splits"):
        read_labelled(str(root), seed=0, train_list="train_full")


# Places365: equal bare names in all classes, nested classes, and classes whose name ends in another's

PLACES = {  # class in the lists to its folder in data_256, and in the small "easyformat" archive
    "airfield": ("a/airfield", "airfield"),
    "arcade": ("a/arcade", "arcade"),
    "amusement_arcade": ("a/amusement_arcade", "amusement_arcade"),
    "bar": ("b/bar", "bar"),
    "sushi_bar": ("s/sushi_bar", "sushi_bar"),
    "hunting_lodge_outdoor": ("h/hunting_lodge/outdoor", "hunting_lodge-outdoor"),
    "library_indoor": ("l/library/indoor", "library-indoor"),
    "library_outdoor": ("l/library/outdoor", "library-outdoor"),
}
PLACES_LISTS = {
    "train_2img_per_class": [(f"{i:08d}.jpg", c) for c in PLACES for i in (1, 2)],
    "train_full": [(f"{i:08d}.jpg", c) for c in PLACES for i in (1, 2, 3)],
    "val": [(f"Places365_val_{i:08d}.jpg", c) for i, c in enumerate(PLACES)],
    "test": [(f"Places365_val_{i + 50:08d}.jpg", c) for i, c in enumerate(PLACES)],
}


@pytest.mark.parametrize("easy", [False, True])
def test_places365_large_and_easy_format(tmp_path, easy):
    places = {c: f"train/{folders[1]}" if easy else f"data_256/{folders[0]}" for c, folders in PLACES.items()}
    held = PLACES_LISTS["val"] + PLACES_LISTS["test"]
    root = put(tmp_path / "d", *(f"{folder}/{i:08d}.jpg" for folder in places.values() for i in (1, 2, 3)))
    put(root, *(f"val/{PLACES[c][1]}/{name}" if easy else f"val_256/{name}" for name, c in held))
    put(root, "test_256/Places365_test_00000001.jpg")
    found = read_labelled(str(root), splits=write_lists(tmp_path / "s", PLACES_LISTS), seed=0, labels_per_class=2)
    assert found.classes == sorted(PLACES)
    assert found.names[found.classes.index("hunting_lodge_outdoor")] == "hunting lodge outdoor"
    assert labelled(found, found.train) == {
        f"{root}/{folder}/{i:08d}.jpg": c for c, folder in places.items() for i in (1, 2)
    }
    assert inside(root, found.unlabeled) == {f"{folder}/00000003.jpg" for folder in places.values()}
    for part in ("val", "test"):
        got = {uri.rpartition("/")[2]: c for uri, c in labelled(found, getattr(found, part)).items()}
        assert got == dict(PLACES_LISTS[part])
    assert "Layout: places365." in found.notes


def test_an_image_in_the_folder_of_another_class_is_missing(tmp_path):
    root = put(tmp_path / "d", *(f"data_256/{folders[0]}/{i:08d}.jpg" for folders in PLACES.values() for i in (1, 3)))
    put(
        root, "data_256/a/arcade/00000002.jpg", *(f"val_256/{n}" for n, _ in PLACES_LISTS["val"] + PLACES_LISTS["test"])
    )
    with pytest.raises(KtrayError, match=r"7 images of the lists .*'00000002.jpg,airfield'.* and 4 more") as caught:
        read_labelled(str(root), splits=write_lists(tmp_path / "s", PLACES_LISTS), seed=0, labels_per_class=2)
    assert caught.value.remedy


def test_a_class_without_a_folder_is_unknown(tmp_path):
    root = put(
        tmp_path / "d", *(f"data_256/{folders[0]}/{i:08d}.jpg" for folders in PLACES.values() for i in (1, 2, 3))
    )
    put(root, *(f"val_256/{n}" for n, _ in PLACES_LISTS["val"] + PLACES_LISTS["test"]))
    lists = {**PLACES_LISTS, "val": [(n, c.replace("arcade", "arkade")) for n, c in PLACES_LISTS["val"]]}
    with pytest.raises(KtrayError, match=r"2 lines .* have 2 classes that places365 .*: 'arkade', 'amusement_arkade'"):
        read_labelled(str(root), splits=write_lists(tmp_path / "s", lists), seed=0, labels_per_class=2)


# HAM10K

HAM = ["AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC"]
HAM_TRAIN = [(f"ISIC_{24306 + i:07d}.jpg", HAM[i % 7] if i < 21 else "NV") for i in range(40)]
HAM_LISTS = {
    "train_2img_max_per_class": [(n, c) for i, (n, c) in enumerate(HAM_TRAIN) if i < 14 and (c != "DF" or i < 7)],
    "train_full": HAM_TRAIN,
    "val": [(f"ISIC_{34000 + i:07d}.jpg", c) for i, c in enumerate(HAM)],
    "test": [(f"ISIC_{35000 + i:07d}.jpg", c) for i, c in enumerate(HAM)],
}


def ham(tmp_path):
    root = put(tmp_path / "d", *(f"HAM10000_images_part_{1 + i % 2}/{name}" for i, (name, _) in enumerate(HAM_TRAIN)))
    put(root, *(f"ISIC2018_Task3_Validation_Input/{name}" for name, _ in HAM_LISTS["val"]))
    put(root, *(f"ISIC2018_Task3_Test_Input/{name}" for name, _ in HAM_LISTS["test"]))
    return put(root, "HAM10000_metadata.csv", "ISIC2018_Task3_Test_Input/ATTRIBUTION.txt")


def test_ham10k_by_unique_names_with_fewer_images_than_the_budget(tmp_path):
    root = ham(tmp_path)
    found = read_labelled(str(root), splits=write_lists(tmp_path / "s", HAM_LISTS), seed=0, labels_per_class=2)
    assert found.classes == HAM
    assert found.names[4] == "melanoma"
    counts = Counter(found.classes[e.label] for e in found.train)
    assert counts == {c: 1 if c == "DF" else 2 for c in HAM}
    assert {uri.rpartition("/")[2]: c for uri, c in labelled(found, found.train).items()} == dict(
        HAM_LISTS["train_2img_max_per_class"]
    )
    assert len(found.unlabeled) == 40 - 13
    assert all("Test_Input/" in e.uri for e in found.test)
    assert any("fewer than 2 training images: 'DF'" in note for note in found.notes)
    assert "Layout: ham10k." in found.notes


def test_ham10k_twice_and_unknown_lesions(tmp_path):
    root = ham(tmp_path)
    put(root, *(f"ISIC2018_Task3_Training_Input/{name}" for name, _ in HAM_TRAIN[:5]))
    with pytest.raises(
        KtrayError, match=r"5 images .* can be one of several files .* and 2 more \(the first one is in 'HAM"
    ):
        read_labelled(str(root), splits=write_lists(tmp_path / "s", HAM_LISTS), seed=0)
    lists = {**HAM_LISTS, "test": [(n, "SCC" if c == "BCC" else c) for n, c in HAM_LISTS["test"]]}
    with pytest.raises(KtrayError, match=r"1 lines .* have 1 class that ham10k .*: 'SCC'"):
        read_labelled(str(root), splits=write_lists(tmp_path / "s", lists), seed=0)


@pytest.mark.parametrize(
    ("change", "number", "where"),
    [
        ({"val": HAM_TRAIN[:7]}, 7, "train, val"),
        ({"test": HAM_LISTS["test"] + HAM_TRAIN[:2]}, 2, "test, train"),
        ({"test": HAM_LISTS["test"] + HAM_LISTS["val"][:4]}, 4, "test, val"),
        # Only the larger list overlaps: those images would be pretrained on.
        ({"test": HAM_LISTS["test"] + HAM_TRAIN[20:25]}, 5, "larger train lists, test"),
    ],
)
def test_overlapping_lists(tmp_path, change, number, where):
    splits = write_lists(tmp_path / "s", {**HAM_LISTS, **change})
    with pytest.raises(KtrayError, match=rf"{number} images are in two splits: .*\({where}\)") as caught:
        read_labelled(str(ham(tmp_path)), splits=splits, seed=0, labels_per_class=2)
    assert str(caught.value).count(".jpg'") == min(3, number)
    assert ("more" in str(caught.value)) == (number > 3)


# EuroSAT


@pytest.mark.parametrize("top", ["2750", "EuroSAT/2750", "EuroSAT_RGB", ""])
def test_eurosat(tmp_path, top):
    kinds = ["AnnualCrop", "SeaLake", "Forest"]
    root = put(tmp_path / "d", *(f"{top}/{c}/{c}_{i}.jpg".strip("/") for c in kinds for i in range(1, 8)))
    lists = {
        "train_1img_per_class": [(f"{c}_1.jpg", c) for c in kinds],
        "train_2img_per_class": [(f"{c}_{i}.jpg", c) for c in kinds for i in (1, 2)],
        "train_full": [(f"{c}_{i}.jpg", c) for c in kinds for i in (1, 2, 3)],
        "val": [(f"{c}_{i}.jpg", c) for c in kinds for i in (4, 5)],
        "test": [(f"{c}_{i}.jpg", c) for c in kinds for i in (6, 7)],
    }
    found = read_labelled(str(root), splits=write_lists(tmp_path / "s", lists), seed=0, labels_per_class=1)
    assert found.classes == ["AnnualCrop", "Forest", "SeaLake"]
    assert found.names == ["annual crop land", "forest", "sea or lake"]
    assert {u.rpartition("/")[2] for u in labelled(found, found.train)} == {f"{c}_1.jpg" for c in kinds}
    assert (len(found.val), len(found.test), len(found.unlabeled)) == (6, 6, 6)
    assert "Layout: eurosat." in found.notes


def test_linked_folders_are_entered_and_circles_are_not(tmp_path):
    put(tmp_path / "elsewhere", *(f"{c}/{c}_{i}.jpg" for c in ("Forest", "River") for i in range(4)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/2750").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/Forest/up").symlink_to(tmp_path / "d")
    splits = write_lists(
        tmp_path / "s", {"train": [(f"{c}_{i}.jpg", c) for c in ("Forest", "River") for i in range(4)]}
    )
    found = read_labelled(str(tmp_path / "d"), splits=splits, seed=0)
    assert len(found.train + found.val + found.test) == 8


# Anybody's lists


def test_paths_in_lists_say_where_and_folder_names_do_not_mislead(tmp_path):
    # A class called "train", one that another's name ends with, and equal names in all folders.
    root = put(tmp_path / "d", *(f"train/{c}/{i}.jpg" for c in ("train", "bus", "mini bus") for i in range(3)))
    lists = {
        "train": [(f"{i}.jpg", c) for c in ("train", "bus", "mini bus") for i in (0, 1)],
        "test": [(f"train/{c}/2.jpg", c) for c in ("train", "bus")] + [("train/bus/../mini bus/2.jpg", "mini bus")],
    }
    with pytest.raises(KtrayError, match=r"1 image .*'train/bus/../mini bus/2.jpg,mini bus'"):
        read_labelled(str(root), splits=write_lists(tmp_path / "s", lists), seed=0)
    lists["test"][2] = ("mini bus/2.jpg", "mini bus")
    found = read_labelled(str(root), splits=write_lists(tmp_path / "s", lists), seed=0)
    for uri, name in labelled(found, found.train + found.val + found.test).items():
        assert uri.split("/")[-2] == name
    assert found.names == []
    assert not any("Layout" in note for note in found.notes)


def test_lists_that_cannot_be_read(tmp_path):
    root = str(put(tmp_path / "d", "a/0.jpg", "b/0.jpg"))
    with pytest.raises(KtrayError, match="is not a folder"):
        read_labelled(root, splits=str(tmp_path / "none"), seed=0)
    with pytest.raises(KtrayError, match=r"has no train\*\.txt"):
        read_labelled(root, splits=write_lists(tmp_path / "s", {"val": [("0.jpg", "a")]}), seed=0)
    with pytest.raises(KtrayError, match="no 'file,class' in line 2"):
        read_labelled(root, splits=write_lists(tmp_path / "s", {"train": [("0.jpg", "a"), "0.jpg"]}), seed=0)
    empty = write_lists(tmp_path / "t", {"train": [("a/0.jpg", "a"), ("b/0.jpg", "b")], "val": []})
    with pytest.raises(KtrayError, match=r"val\.txt' is empty"):
        read_labelled(root, splits=empty, seed=0)
    with pytest.raises(KtrayError, match=r"layout=eurosat needs its split lists"):
        read_labelled(root, layout="eurosat", seed=0)
    with pytest.raises(KtrayError, match=r"is a layout with masks.*task\.kind=segmentation"):
        read_labelled(root, layout="ade20k", splits=str(tmp_path / "s"), seed=0)


def test_names_are_found_in_any_order_of_the_lists(tmp_path):
    root = str(ham(tmp_path))
    one = read_labelled(root, splits=write_lists(tmp_path / "s", HAM_LISTS), seed=0, labels_per_class=2)
    mixed = {name: random.Random(1).sample(lines, len(lines)) for name, lines in HAM_LISTS.items()}
    two = read_labelled(root, splits=write_lists(tmp_path / "t", mixed), seed=0, labels_per_class=2)
    assert (one.train, one.val, one.test, one.unlabeled) == (two.train, two.val, two.test, two.unlabeled)
    assert one.fingerprint == two.fingerprint


def test_lists_on_s3(tmp_path, monkeypatch):
    ham(tmp_path / "bucket")
    write_lists(tmp_path / "bucket/s", HAM_LISTS)
    fake = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda name: {"s3://bucket": fake}[name])
    far = read_labelled("s3://bucket/d/", splits="s3://bucket/s", seed=0, labels_per_class=2)
    near = read_labelled(f"{tmp_path}/bucket/d", splits=f"{tmp_path}/bucket/s", seed=0, labels_per_class=2)
    for part in ("train", "val", "test"):
        uris = [e.uri for e in getattr(far, part)]
        assert uris
        assert [u.removeprefix("s3://") for u in uris] == [
            e.uri.removeprefix(f"{tmp_path}/") for e in getattr(near, part)
        ]
        assert all(error is None for _, _, error in fetch(uris))


def test_only_what_the_lists_name_is_looked_at(tmp_path, monkeypatch):
    root = ham(tmp_path)
    put(root, *(f"HAM10000_images_part_1/ISIC_{90000 + i:07d}.jpg" for i in range(50)))
    splits = write_lists(tmp_path / "s", HAM_LISTS)
    seen = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: (seen.append(str(path)), stat(path, *a, **k))[1])
    read_labelled(str(root), splits=splits, seed=0, labels_per_class=2)
    looked = [path for path in seen if path.endswith(".jpg")]
    assert len(looked) == len(set(looked)) == sum(len(HAM_LISTS[name]) for name in ("train_full", "val", "test"))
