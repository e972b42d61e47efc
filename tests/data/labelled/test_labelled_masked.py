"""Images with masks: ADE20K as its host lays it out, and ktray's own folders."""

import numpy as np
import pyarrow.fs as pafs
import pytest
from image_zoo import encode, photo
from PIL import Image

from ktray.data import filesystem
from ktray.data.labelled.masked import read_masked
from ktray.data.sources.fetch import fetch
from ktray.errors import KtrayError
from ktray.recipe.schema import TaskConfig
from ktray.tasks.base import task_kind


def write_lists(folder, lists):
    """Lists of file names."""
    folder.mkdir(exist_ok=True)
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return str(folder)


# ADE20K


def mask(seed, values, size=(24, 20)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.choice(np.array(values, dtype=np.uint8), size[::-1]))


def pair(image, label, seed, values, size=(24, 20)):
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(encode(photo(seed, *size), "JPEG" if image.suffix == ".jpg" else "PNG"))
    mask(seed, values, size).save(label)


def ade(tmp_path, train=8, val=3):
    root = tmp_path / "d/ADEChallengeData2016"
    for part, short, number in (("training", "train", train), ("validation", "val", val)):
        for i in range(1, number + 1):
            name = f"ADE_{short}_{i:08d}"
            pair(root / f"images/{part}/{name}.jpg", root / f"annotations/{part}/{name}.png", i, [0, 1, 2, 3])
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n"
        "2 \t0.1072\t6046\t612\t1\tbuilding, edifice\n3\t0.0878\t8265\t796\t1\tsky\n"
    )
    return root


ADE_LISTS = {
    "train_2img": [f"ADE_train_{i:08d}.jpg" for i in (5, 3)],
    "train_4img": [f"ADE_train_{i:08d}.jpg" for i in (5, 3, 1, 2)],
    "train_full": [f"ADE_train_{i:08d}.jpg" for i in range(1, 7)],
    "val": [f"ADE_train_{i:08d}.jpg" for i in (7, 8)],
    "test": [f"ADE_val_{i:08d}.jpg" for i in (1, 2, 3)],
    "yfcc_retrieved_images_with_2query": ["1234.jpg"],
}


@pytest.mark.parametrize("budget", [{"labels": 2}, {"train_list": "train_2img"}])
def test_ade20k(tmp_path, budget):
    root = ade(tmp_path)
    splits = write_lists(tmp_path / "s", ADE_LISTS)
    for data in (root, root.parent):
        found = read_masked(str(data), splits=splits, seed=0, **budget)
        assert found.classes == ["wall", "building, edifice", "sky"]
        assert found.names == ["wall", "building", "sky"]
        assert found.mask_offset == 1
        names = [[e.uri.rpartition("/")[2] for e in part] for part in (found.train, found.val, found.test)]
        assert [sorted(part) for part in names] == [sorted(ADE_LISTS[k]) for k in ("train_2img", "val", "test")]
        assert {u.rpartition("/")[2] for u in found.unlabeled} == {f"ADE_train_{i:08d}.jpg" for i in (1, 2, 4, 6)}
        for e in found.train + found.val + found.test:
            assert e.label == 0
            assert e.mask == e.uri.replace("images/", "annotations/").replace(".jpg", ".png")
            with Image.open(e.mask) as one:
                assert set(np.unique(one)) <= {0, 1, 2, 3}


def test_ade20k_without_lists_tests_on_its_validation_images(tmp_path):
    found = read_masked(str(ade(tmp_path)), seed=0, val_fraction=0.25, layout="ade20k")
    assert (len(found.train), len(found.val), len(found.test)) == (6, 2, 3)
    assert all("/validation/" in e.uri for e in found.test)


def test_ade20k_lists_that_do_not_fit(tmp_path):
    root = str(ade(tmp_path))
    lists = {**ADE_LISTS, "val": [f"ADE_train_{i:08d}.jpg" for i in (7, 19211, 19212, 19213, 19214)]}
    with pytest.raises(KtrayError, match=r"4 images of the lists .*'ADE_train_00019211.jpg'.* and 1 more"):
        read_masked(root, splits=write_lists(tmp_path / "s", lists), seed=0, labels=2)
    lists = {**ADE_LISTS, "test": ADE_LISTS["test"] + ADE_LISTS["train_4img"]}
    with pytest.raises(KtrayError, match=r"4 images are in two splits: .* and 1 more \(larger train lists, test, tr"):
        read_masked(root, splits=write_lists(tmp_path / "s", lists), seed=0, labels=2)
    splits = write_lists(tmp_path / "t", {k: v for k, v in ADE_LISTS.items() if k != "train_full"})
    with pytest.raises(KtrayError, match=r"several lists for one split.*task\.train_list.*task\.labels "):
        read_masked(root, splits=splits, seed=0, labels=3)
    with pytest.raises(KtrayError, match=r"no images/training"):
        read_masked(str(tmp_path), seed=0, layout="ade20k")
    (tmp_path / "d/ADEChallengeData2016/objectInfo150.txt").write_text("Idx Name\n")
    with pytest.raises(KtrayError, match=r"does not number the classes"):
        read_masked(root, seed=0)


# ktray's own segmentation folders


def own(root, classes=("sky", "Baum", "道"), values=(0, 1, 2, 255), **counts):
    counts = counts or {"train": 12, "val": 3, "test": 4}
    seeds = iter(range(1000))
    for split, number in counts.items():
        for i in range(number):
            suffix = ".png" if i % 2 else ".jpg"
            pair(root / split / f"images/shot {i}{suffix}", root / split / f"masks/shot {i}.png", next(seeds), values)
    (root / "classes.txt").write_text("\n".join(classes) + "\n\n", "utf-8-sig")
    return str(root)


def test_own_masks(tmp_path):
    root = own(tmp_path / "d", train=12, validation=3, test=4)
    found = read_masked(root, seed=0)
    assert found.classes == ["sky", "Baum", "道"]
    assert (found.mask_offset, found.names, found.notes) == (0, [], [])
    assert (len(found.train), len(found.val), len(found.test)) == (12, 3, 4)
    for e in found.train:
        assert e.mask == e.uri.replace("/images/", "/masks/")[:-4] + ".png"
        assert e.label == 0
    before = found.fingerprint
    assert read_masked(root, seed=0).fingerprint == before
    mask(77, [0, 1, 2]).save(found.train[0].mask)
    changed = read_masked(root, seed=0).fingerprint
    assert changed != before
    (tmp_path / "d/classes.txt").write_text("sky\nBaum\nroad")
    assert read_masked(root, seed=0).fingerprint not in (before, changed)


def test_own_masks_splits_and_budgets_are_drawn_and_nested(tmp_path):
    root = own(tmp_path / "d", train=20)
    sets = {n: read_masked(root, seed=4, labels=n) for n in (1, 3, 9, None)}
    for found in sets.values():
        assert (len(found.val), len(found.test)) == (4, 4)
        assert found.val == sets[None].val
    assert [len(found.train) for found in sets.values()] == [1, 3, 9, 12]
    assert set(sets[1].train) < set(sets[3].train) < set(sets[9].train) < set(sets[None].train)
    assert {e.uri for e in sets[3].train} | set(sets[3].unlabeled) == {e.uri for e in sets[None].train}
    assert any("0.2 and 0.2 of the images is split off" in note for note in sets[3].notes)
    assert set(read_masked(root, seed=5, labels=9).train) != set(sets[9].train)
    many = read_masked(root, seed=4, labels=50)
    assert any("fewer than 50 training images: 12" in note for note in many.notes)


@pytest.mark.parametrize("number", [1, 5])
def test_images_and_masks_that_do_not_pair(tmp_path, number):
    root = own(tmp_path / "d", train=8)
    for i in range(number):
        (tmp_path / f"d/train/masks/shot {i}.png").unlink()
    mask(0, [0]).save(tmp_path / "d/train/masks/alone.png")
    images = "1 image" if number == 1 else "5 images"
    with pytest.raises(
        KtrayError, match=rf"{images} in .*without mask: 'shot 0'.*; 1 mask in .*without image: 'alone'"
    ) as e:
        read_masked(root, seed=0)
    assert str(e.value).count("'shot") == min(3, number)
    assert ("and 2 more" in str(e.value)) == (number == 5)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, r"classes\.txt' does not exist"),
        ("sky", r"has 1 class: 'sky'"),
        ("", r"has 0 classes: none"),
        ("sky\n\nroad\n", r"has 1 empty lines: 'line 2'"),
        ("sky\nroad\nsky\nroad\n", r"has 2 repeated names: 'sky', 'road'"),
        ("\n".join(map(str, range(256))), r"has 256 classes: '0', '1', '2' and 253 more"),
        ("sky\nroad", r"4 of 4 checked masks have values beyond the 2 classes: 'shot \d.png \(value 2\)'"),
    ],
)
def test_wrong_class_lists(tmp_path, text, what):
    root = own(tmp_path / "d", train=4)
    path = tmp_path / "d/classes.txt"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(KtrayError, match=what) as caught:
        read_masked(root, seed=0)
    assert caught.value.remedy


def test_masks_that_are_no_label_maps(tmp_path):
    root = own(tmp_path / "d", train=4)
    masks = tmp_path / "d/train/masks"
    mask(0, [0, 1], (10, 10)).save(masks / "shot 0.png")
    with pytest.raises(
        KtrayError, match=r"1 of 4 .* have different sizes: 'shot 0.png \(10 x 10, but the image is 24 x 20"
    ):
        read_masked(root, seed=0)
    mask(0, [0, 1]).convert("RGB").save(masks / "shot 0.png")
    (masks / "shot 1.png").write_bytes(b"nothing")
    with pytest.raises(KtrayError, match=r"2 of 4 .* not label maps: .*shot 0.png \(the mask contains colours \(RGB\)"):
        read_masked(root, seed=0)


def test_a_rare_broken_mask_is_left_to_quarantine(tmp_path):
    root = own(tmp_path / "d", train=16)
    for name in ("shot 0", "shot 1"):
        (tmp_path / f"d/train/masks/{name}.png").write_bytes(b"nothing")
    found = read_masked(root, seed=0)
    assert len(found.train + found.val + found.test) == 16
    (tmp_path / "d/train/masks/shot 2.png").write_bytes(b"nothing")
    with pytest.raises(KtrayError, match="3 of 16 checked masks are not label maps"):
        read_masked(root, seed=0)


def test_palette_masks_and_turned_photos(tmp_path):
    root = own(tmp_path / "d", train=4)
    coloured = mask(0, [0, 1, 2])
    coloured.putpalette(list(range(256)) * 3)
    coloured.save(tmp_path / "d/train/masks/shot 0.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "d/train/images/shot 0.jpg").write_bytes(encode(photo(0, 20, 24), "JPEG", exif=turned))
    assert len(read_masked(root, seed=0).train) == 2


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"labels_per_class": 3}, r"labels_per_class cannot be used with task\.kind=segmentation.*task\.labels=N"),
        ({"layout": "eurosat"}, r"layout=eurosat is a layout without masks"),
        ({"splits": "somewhere"}, r"task\.splits is only for the layout of ADE20K"),
        ({"kind": "classification", "labels": 3}, r"task\.labels is the label budget .*task\.labels_per_class"),
    ],
)
def test_keys_that_do_not_go_with_the_kind(tmp_path, keys, what):
    root = own(tmp_path / "d", train=4)
    part = TaskConfig(**{"kind": "segmentation", **keys})
    with pytest.raises(KtrayError, match=what):
        task_kind(part.kind).read(root, part)


def test_folders_that_are_no_segmentation_set(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n")
    (tmp_path / "d/train/a").mkdir(parents=True)
    with pytest.raises(KtrayError, match="is a file, but a segmentation data set is a folder"):
        read_masked(str(tmp_path / "list.csv"), seed=0)
    (tmp_path / "d/classes.txt").write_text("a\nb")
    with pytest.raises(KtrayError, match="has no folder 'images'"):
        read_masked(str(tmp_path / "d"), seed=0)
    with pytest.raises(KtrayError, match="has no train folder"):
        read_masked(str(tmp_path), seed=0)
    root = own(tmp_path / "e", train=2)
    (tmp_path / "e/train/images/shot 0.png").write_bytes(b"")
    with pytest.raises(KtrayError, match=r"1 name in .* with two files: 'shot 0'"):
        read_masked(root, seed=0)


def test_masks_on_s3(tmp_path, monkeypatch):
    own(tmp_path / "bucket/d", train=4)
    fake = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda name: {"s3://bucket": fake}[name])
    far = read_masked("s3://bucket/d/", seed=0, labels=1)
    near = read_masked(f"{tmp_path}/bucket/d", seed=0, labels=1)
    for part in ("train", "val", "test"):
        assert [(e.uri.removeprefix("s3://"), e.mask.removeprefix("s3://")) for e in getattr(far, part)] == [
            (e.uri.removeprefix(f"{tmp_path}/"), e.mask.removeprefix(f"{tmp_path}/")) for e in getattr(near, part)
        ]
    assert all(error is None for _, _, error in fetch([e.mask for e in far.train]))
