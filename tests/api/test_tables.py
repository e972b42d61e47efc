"""Images in memory become Parquet files that ktray reads as any other: the same images, labels and splits."""

import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from small_task import CLASSES, write_task

from ktray.api import tables
from ktray.api.asked import asked
from ktray.data.decode import decode_rgb
from ktray.data.labelled.forms import read_rows
from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch_images
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = write_task(tmp_path_factory.mktemp("tables") / "task", 3, 2, 2)
    return sorted(folder.rglob("*.png"))


def facts(path: Path) -> tuple[str, str]:
    """Label and split of a file."""
    return path.parts[-2], path.parts[-3]


def pixels(path: Path) -> bytes:
    return decode_rgb(path.read_bytes()).tobytes()


def check_labelled(address: str, files: list[Path], splits: bool = True) -> None:
    """The list has the pixels, the label and the split of every file, and nothing else."""
    found = read_labelled(address, seed=0)
    rows = {}
    for split, examples in zip(SPLITS, (found.train, found.val, found.test), strict=True):
        images = fetch_images([e.uri for e in examples], max_pixels=10**6)
        for example, (_, image, _) in zip(examples, images, strict=True):
            rows[image.tobytes()] = (found.classes[example.label], split if splits else "")
    expected = {pixels(path): (facts(path)[0], facts(path)[1] if splits else "") for path in files}
    assert rows == expected


def check_unlabelled(addresses: list[str], files: list[Path]) -> list[str | None]:
    """The gallery has the pixels of every file once; returns the captions."""
    records = [r for shard in gallery_shards(addresses, "auto", None) for r in read_shard(shard)]
    assert sorted(decode_rgb(r.data).tobytes() for r in records) == sorted(map(pixels, files))
    return [r.caption for r in records]


def arrays(files: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in files]


def forms(files: list[Path]) -> dict[str, object]:
    labels, splits = ([facts(path)[i] for path in files] for i in (0, 1))
    relative = [os.path.relpath(path) for path in files]
    opened = [Image.open(path) for path in files]
    struct = [{"bytes": path.read_bytes() if i % 2 else None, "path": str(path)} for i, path in enumerate(files)]
    return {
        "triples of paths": list(zip(files, labels, splits, strict=True)),
        "triples of arrays": list(zip(arrays(files), labels, splits, strict=True)),
        "pandas with relative paths": pd.DataFrame({"path": relative, "label": labels, "split": splits, "n": 1}),
        "pandas with PIL images and categories": pd.DataFrame(
            {"image": opened, "label": pd.Categorical(labels), "Split": splits, "model": [object()] * len(files)}
        ),
        "pyarrow with bytes": pa.table(
            {"id": range(len(files)), "img": [p.read_bytes() for p in files], "label": labels, "split": splits}
        ),
        "pyarrow with dictionaries": pa.table(
            {"path": list(map(str, files)), "label": pa.array(labels).dictionary_encode(), "split": splits}
        ),
        "pyarrow with structs": pa.table({"image": struct, "label": labels, "split": splits}),
    }


FORMS = (
    "triples of paths",
    "triples of arrays",
    "pandas with relative paths",
    "pandas with PIL images and categories",
    "pyarrow with bytes",
    "pyarrow with dictionaries",
    "pyarrow with structs",
)


@pytest.mark.parametrize("form", FORMS)
def test_labelled_images_in_every_form(form, files, tmp_path) -> None:
    address = tables.labelled(forms(files)[form], str(tmp_path))
    check_labelled(address, files)
    before = os.stat(address).st_mtime_ns
    assert tables.labelled(forms(files)[form], str(tmp_path)) == address
    assert os.stat(address).st_mtime_ns == before, "stages would not be found again"
    assert len(list((tmp_path / "tables").iterdir())) == 1


def test_pairs_leave_the_split_to_ktray_and_groups_are_kept(files, tmp_path) -> None:
    pairs = [(path, facts(path)[0]) for path in files]
    check_labelled(tables.labelled(pairs, str(tmp_path)), files, splits=False)
    columns = {"path": list(map(str, files)), "label": [facts(p)[0] for p in files]}
    table = pa.table({**columns, "group": [f"g{i // 3}" for i in range(len(files))]})
    rows = read_rows(tables.labelled(table, str(tmp_path)), [])
    assert [row.group for row in rows] == [f"g{i // 3}" for i in range(len(files))]


def test_unlabelled_images_in_every_form(files, tmp_path) -> None:
    store = str(tmp_path)
    check_unlabelled(tables.unlabelled(files, store), files)
    check_unlabelled(tables.unlabelled(list(map(str, files)), store), files)
    check_unlabelled(tables.unlabelled(arrays(files), store), files)
    check_unlabelled(tables.unlabelled([path.read_bytes() for path in files], store), files)
    table = pa.table(
        {"image": [p.read_bytes() for p in files], "Caption": [p.stem for p in files], "x": [0] * len(files)}
    )
    assert set(check_unlabelled(tables.unlabelled(table, store), files)) == {p.stem for p in files}
    places = ["some/folder", "s3://bucket/a.tar", str(files[0])]
    assert tables.unlabelled(places, store) == places
    (held,) = tables.unlabelled(arrays(files), store)
    rows = [f"{held}#row={i}" for i in range(len(files))]  # addresses that labelled sets and predictions have
    for again in (rows, pa.table({"path": rows})):
        check_unlabelled(tables.unlabelled(again, store), files)
    assert tables.unlabelled(["some/*.png"], store) == ["some/*.png"]


def test_a_ray_dataset_and_its_tensors(cluster, files, tmp_path) -> None:
    import ray

    rows = [{"image": p.read_bytes(), "label": facts(p)[0], "split": facts(p)[1]} for p in files]
    dataset = ray.data.from_items(rows, override_num_blocks=3)
    check_labelled(tables.labelled(dataset, str(tmp_path)), files)
    addresses = tables.unlabelled(dataset, str(tmp_path / "gallery"))
    assert len(addresses) == 3
    check_unlabelled(addresses, files)
    assert tables.unlabelled(dataset, str(tmp_path / "gallery")) == addresses
    pictures = ray.data.read_images([str(path) for path in files])
    check_unlabelled(tables.unlabelled(pictures, str(tmp_path / "read")), files)


def test_hugging_face_datasets(files, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    parts = {}
    for split in SPLITS:
        own = [path for path in files if facts(path)[1] == split]
        content = {"image": list(map(str, own)), "label": [CLASSES.index(facts(p)[0]) for p in own]}
        parts[split] = datasets.Dataset.from_dict(content, features)
    recipe = asked(None, {"store": str(tmp_path)}, task=datasets.DatasetDict(parts), gallery=parts["val"])
    check_labelled(recipe.task.data, files)
    check_unlabelled(recipe.gallery.data, [path for path in files if facts(path)[1] == "val"])
    with pytest.raises(KtrayError, match="A streamed Hugging Face dataset is not in memory"):
        tables.labelled(parts["train"].to_iterable_dataset(), str(tmp_path))
    train = [path for path in files if facts(path)[1] == "train"]
    shuffled = parts["train"].shuffle(seed=0)
    check_labelled(tables.labelled(shuffled, str(tmp_path)), train, splits=False)
    two = shuffled.select(range(2))
    paths = [Path(row["path"]) for row in two.cast_column("image", datasets.Image(decode=False))["image"]]
    check_unlabelled(tables.unlabelled(two, str(tmp_path)), paths)


def test_a_remote_store_gets_the_images_themselves(s3, files) -> None:
    address = tables.labelled([(path, *facts(path)) for path in files], s3.home)
    assert address.startswith(s3.home)
    check_labelled(address, files)


def test_a_file_that_is_gone_is_left_to_the_quarantine(files, tmp_path) -> None:
    (address,) = tables.unlabelled([*files[:2], tmp_path / "gone.png"], str(tmp_path))
    records = [r for shard in gallery_shards(address, "auto", None) for r in read_shard(shard)]
    assert [r.error is None for r in records] == [True, True, False]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([("a.png", "x"), ("b.png", "x", "val")], "its rows have 2 and 3 entries"),
        ([("a.png", "x"), "b.png"], "its rows have 1 and 2 entries"),
        (pa.table({"path": ["a.png"]}), "no column 'label', only path"),
        (
            pa.table({"number": [1], "label": ["x"]}),
            "no column that is recognised as the images; its columns are number",
        ),
        (pa.table({"path": pa.array([], pa.string()), "label": []}), "are empty"),
        ([], "are empty"),
        (7, "Images cannot be read from a int"),
        ([(np.zeros((2, 2)), "x")], r"An array of type float64 and shape \(2, 2\) is not an image"),
    ],
)
def test_other_values_are_refused_in_one_line(value, message, tmp_path) -> None:
    with pytest.raises(KtrayError, match=message):
        tables.labelled(value, str(tmp_path))
    assert not (tmp_path / "tables").exists()


def test_pixels_of_arrays_and_images_are_exact(tmp_path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (address,) = tables.unlabelled([array, Image.fromarray(array[::-1])], str(tmp_path))
    first, second = (decode_rgb(r.data) for s in gallery_shards(address, "auto", None) for r in read_shard(s))
    assert np.array_equal(first, array)
    assert np.array_equal(second, array[::-1])
    assert Image.open(io.BytesIO(next(read_shard(gallery_shards(address, "auto", None)[0])).data)).format == "PNG"
