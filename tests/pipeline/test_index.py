"""The gallery's index: grows by its new shards, mends broken ones, refuses another encoder, and jobs/index.py."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from heard import heard
from PIL import Image
from results import check_result
from small_task import CLASSES, SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.pipeline.run import curate_only, index_only

ROWS = 60


@pytest.fixture(scope="module")
def world(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    write_task(root / "task")
    write_gallery(root / "gallery", 60)
    return root


def keys(world, *more):
    data = [f"store={world / 'store'}", f"task.data={world / 'task'}", f"gallery.data={world / 'gallery'}"]
    return recipes.load(None, [*SMALL, *data, "transfer.size=20", *more])


def index(world, *more, lines=None):
    data = [f"store={world / 'store'}", f"gallery.data={world / 'gallery'}", "teacher.name=miniverse"]
    return heard((lines if lines is not None else []), index_only, recipes.load(None, [*data, *more]))


def transfer(world, result, name="transfer.parquet"):
    return pq.read_table(world / "store" / "runs" / result["run_id"] / name).to_pylist()


@pytest.fixture(scope="module")
def folder(world):
    """An index of its own with 60 images, and what making it said."""
    place = world / "index"
    return place, index(world, f"gallery.index={place}")


def test_the_job_says_what_the_index_holds(world, folder):
    place, result = folder
    check_result("index", world / "store" / "runs" / result["run_id"] / "result.json")
    assert result["index"]["rows"] == result["index"]["images"] == ROWS
    assert result["index"]["folder"] == str(place)
    assert result["cost"]["flops"]["index"] > 0
    assert json.loads((place / "index.json").read_text())["teacher"] == "miniverse"
    vectors = np.concatenate([np.load(file) for file in sorted((place / "shards").glob("*.npy"))])
    assert vectors.dtype == np.float16
    assert np.linalg.norm(vectors.astype(np.float32), axis=1) == pytest.approx(np.ones(ROWS), abs=2e-3)


def test_only_what_is_new_is_embedded_and_a_run_searches_it(world, folder):
    place, _ = folder
    more = world / "more"
    write_gallery(more, 7)
    result = index(world, f"gallery.index={place}", f"gallery.data=[{world / 'gallery'}, {more}]")
    assert result["index"]["rows"] == ROWS + 7
    # Shards are cut by content: the 60 stay, or their last group takes the new ones in.
    flops = result["cost"]["flops"]["index"] / folder[1]["cost"]["flops"]["index"]
    assert flops <= 1.2
    again = index(world, f"gallery.index={place}", f"gallery.data=[{world / 'gallery'}, {more}]")
    assert again["cost"]["flops"]["index"] == 0
    found = curate_only(keys(world, f"gallery.index={place}"))
    assert found["transfer_set"]["kept"] == 20
    assert found["cost"]["flops"]["index"] == 0
    whole = curate_only(keys(world, f"gallery.index={place}", "gallery.data=null"))
    assert whole["transfer_set"]["gallery"] >= ROWS + 7


def test_an_index_alone_must_be_one_and_be_whole(world, folder):
    with pytest.raises(KtrayError, match="There is no index in"):
        curate_only(keys(world, f"gallery.index={world / 'nothing'}", "gallery.data=null"))
    with pytest.raises(KtrayError, match="no teacher to search it with"):
        curate_only(keys(world, f"gallery.index={folder[0]}", "gallery.data=null", "objective.name=dino"))


@pytest.mark.parametrize(("damage", "problem"), [("cut", "has 100 bytes"), ("gone", "is missing")])
def test_a_truncated_and_a_missing_file_are_named_and_made_again(world, damage, problem):
    place = world / damage
    index(world, f"gallery.index={place}")
    (file,) = (place / "shards").glob("*.npy")
    before = file.read_bytes()
    if damage == "cut":
        file.write_bytes(before[:100])
    else:
        file.unlink()
    lines: list[str] = []
    index(world, f"gallery.index={place}", lines=lines)
    (mended,) = (line for line in lines if file.name in line)
    assert problem in mended
    assert "indexed again" in mended
    assert file.read_bytes() == before


def test_changed_bytes_are_found_when_the_index_is_to_be_verified(world):
    place = world / "changed"
    index(world, f"gallery.index={place}")
    file = sorted((place / "shards").glob("*.npy"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    index(world, f"gallery.index={place}")
    with pytest.raises(KtrayError, match="checksum differs"):
        index(world, f"gallery.index={place}", "gallery.verify=true")


def test_other_crops_in_the_same_folder_are_refused(world, folder):
    with pytest.raises(KtrayError, match="was made with crops None instead of"):
        index(world, f"gallery.index={folder[0]}", "gallery.crops=grid")


def test_compressed_search_says_its_recall_and_is_what_is_searched(world):
    more = ["gallery.search=compressed", "gallery.factory=IVF4,PQ16x4", "gallery.recall=0.5"]
    result = index(world, *more)
    made = result["index"]["search"]
    assert made["rows"] == ROWS
    assert made["recall"]["10"] >= 0.5
    (saved,) = Path(result["index"]["folder"]).glob("search/*/search.json")
    assert json.loads(saved.read_text()) == made
    found = curate_only(keys(world, *more))
    assert found["transfer_set"]["kept"] == 20
    exact = curate_only(keys(world, "gallery.search=exact"))
    both = [{row["uri"] for row in transfer(world, one)} for one in (found, exact)]
    assert len(both[0] & both[1]) >= 8


def test_crops_are_candidates_and_their_pixels_are_what_is_taught(world):
    found = curate_only(keys(world, "gallery.crops=grid", "transfer.repeat_similarity=null"))
    assert found["transfer_set"]["gallery"] == 5 * ROWS
    uris = [row["uri"] for row in transfer(world, found)]
    cut = [uri for uri in uris if "#xywh=" in uri]
    assert cut
    assert all(len(uri.rpartition("=")[2].split(",")) == 4 for uri in cut)


def test_a_list_is_a_transfer_set_without_held_out_copies(world):
    test_image = sorted((world / "task" / "test" / CLASSES[0]).glob("*.png"))[0]
    gallery = sorted((world / "gallery").glob("*.jpg"))[:9]
    (world / "mine.txt").write_text("\n".join([*map(str, gallery), str(test_image)]))
    found = curate_only(
        keys(world, "transfer.source=list", f"transfer.list={world / 'mine.txt'}", "transfer.size=null")
    )
    assert [row["uri"] for row in transfer(world, found)] == [str(path) for path in gallery]
    assert found["transfer_set"]["dropped"]["identical"] == 1
    (dropped,) = transfer(world, found, "dropped.parquet")
    assert (dropped["uri"], dropped["copy_of"]) == (str(test_image), str(test_image))


def test_list_and_its_file_go_together(world):
    with pytest.raises(KtrayError, match="must be set together"):
        curate_only(keys(world, "transfer.source=list"))
    with pytest.raises(KtrayError, match="must be set together"):
        curate_only(keys(world, "transfer.list=x.txt"))


@pytest.mark.parametrize(
    ("more", "queries"),
    [
        (["transfer.queries=text"], {f"text:{name}" for name in CLASSES}),
        (["transfer.per=class"], {f"class:{name}" for name in CLASSES}),
        (["transfer.queries=both", "transfer.per=class"], {f"class:{name}" for name in CLASSES}),
    ],
)
def test_names_and_classes_are_queries(world, more, queries):
    found = curate_only(keys(world, "transfer.repeat_similarity=null", "transfer.size=21", *more))
    assert {row["query"] for row in transfer(world, found)} == queries
    covered = found["transfer_set"]["coverage"]
    assert {one["images"] for one in covered["classes"].values()} == {7}


def test_crops_of_the_labelled_images_are_queries_beside_them(world):
    more = ["transfer.query_crops=random", "gallery.crop_count=2", "transfer.repeat_similarity=null"]
    found = curate_only(keys(world, "transfer.size=45", *more))
    rows = transfer(world, found)
    assert found["transfer_set"]["coverage"]["queries"]["count"] == 45
    assert any("#xywh=" in row["query"] for row in rows)
    assert any("#xywh=" not in row["query"] for row in rows)


def photo(rng, side=48):
    """Noise whose contrast falls with its frequency, as a photo's does."""
    total = np.zeros((side, side, 3))
    for cells in (3, 6, 12, 24):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / cells
    return Image.fromarray((total * 255 / total.max()).astype(np.uint8))


def test_planted_copies_of_held_out_images_never_come_in(world):
    """Resized, re-encoded, flipped and slightly cropped copies of test images, each the best hit there could be."""
    rng = np.random.default_rng(9)
    task, planted = world / "photos", world / "planted"
    for split, count in (("train", 3), ("val", 3), ("test", 5)):
        for name in ("a", "b"):
            (task / split / name).mkdir(parents=True)
            for i in range(count):
                photo(rng).save(task / split / name / f"{i}.png")
    planted.mkdir()
    for i in range(30):
        photo(rng).save(planted / f"other {i}.jpg", quality=92)
    tests = sorted((task / "test").glob("*/*.png"))
    for number, path in enumerate(tests):
        image = Image.open(path).convert("RGB")
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=70)
        copies = {
            "same": image,
            "jpeg": Image.open(encoded),
            "larger": image.resize((144, 144), Image.Resampling.BICUBIC),
            "flipped": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            "cropped": image.crop((1, 1, 46, 46)),
        }
        for how, copy in copies.items():
            copy.save(planted / f"planted {number} {how}.png")
    more = [f"task.data={task}", f"gallery.data={planted}", "transfer.size=25"]
    found = curate_only(keys(world, *more))
    rows = transfer(world, found, "dropped.parquet")
    caught = {row["uri"].rpartition("/")[2]: row["copy_of"] for row in rows if row["reason"] != "repeated"}
    assert caught == {f"planted {n} {how}.png": str(path) for n, path in enumerate(tests) for how in copies}
    assert found["transfer_set"]["dropped"]["identical"] == len(tests)
    assert all("/other " in row["uri"] for row in transfer(world, found))


@pytest.fixture(scope="module")
def embedded(world):
    """The gallery as clip-retrieval leaves it: the miniverse teacher's embeddings in half precision, and names."""
    from ktray.models.teacher.load import load_teacher

    files = sorted((world / "gallery").glob("*.jpg"))
    teacher = load_teacher("miniverse")
    pixels = np.stack([teacher.preprocess.eval_transform(Image.open(file)) for file in files])
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(teacher.embed(torch.from_numpy(pixels)), dim=1).numpy()
    place = world / "clip-retrieval"
    for part in ("img_emb", "metadata"):
        (place / part).mkdir(parents=True)
    for number, rows in enumerate((slice(0, 40), slice(40, None))):
        np.save(place / "img_emb" / f"img_emb_{number}.npy", vectors[rows].astype(np.float16))
        names = pa.table({"image_path": [file.name for file in files[rows]]})
        pq.write_table(names, place / "metadata" / f"metadata_{number}.parquet")
    return place


def test_embeddings_of_others_are_an_index_without_the_teachers_work(world, folder, embedded):
    place = world / "given"
    keys_ = [f"gallery.data={embedded}", f"gallery.images={world / 'gallery'}"]
    result = index(world, f"gallery.index={place}", *keys_)
    assert result["index"]["rows"] == ROWS
    # A few images of each partition are embedded to see that it is the same encoder.
    assert 0 < result["cost"]["flops"]["index"] < 0.3 * folder[1]["cost"]["flops"]["index"]

    def table(where):
        found = {}
        for name in sorted((where / "shards").glob("*.parquet")):
            uris = pq.read_table(name).column("uri").to_pylist()
            found.update(zip(uris, np.load(name.with_suffix(".npy")).astype(np.float32), strict=True))
        return found

    own, given = table(folder[0]), table(place)
    assert len(given) == ROWS
    assert all(np.allclose(own[uri], given[uri], atol=2e-3) for uri in given)
    sets = [
        {row["uri"] for row in transfer(world, curate_only(keys(world, f"gallery.index={where}", *more)))}
        for where, more in ((place, keys_), (world / "index-again", []))
    ]
    assert len(sets[0] & sets[1]) >= 19  # of 20: rounding may swap neighbours


def test_embeddings_of_another_encoder_are_refused(world, embedded):
    vectors = embedded / "img_emb" / "img_emb_0.npy"
    before = vectors.read_bytes()
    try:
        np.save(vectors, np.random.default_rng(0).normal(size=np.load(vectors).shape).astype(np.float16))
        with pytest.raises(Exception, match="embeddings of another encoder than miniverse"):
            index(
                world,
                f"gallery.index={world / 'wrong'}",
                f"gallery.data={embedded}",
                f"gallery.images={world / 'gallery'}",
            )
    finally:
        vectors.write_bytes(before)
    with pytest.raises(KtrayError, match="has only those of whole images"):
        index(world, f"gallery.data={embedded}", "gallery.crops=grid")


def test_a_corrupt_tar_is_named_and_the_rest_is_indexed(world):
    place = world / "tars"
    place.mkdir()
    files = sorted((world / "gallery").glob("*.jpg"))
    for number in range(3):
        with tarfile.open(place / f"{number}.tar", "w") as tar:
            for file in files[20 * number : 20 * number + 20]:
                tar.add(file, file.name)
    whole = (place / "1.tar").read_bytes()
    (place / "1.tar").write_bytes(whole[: len(whole) // 2])
    keys_ = [f"store={world / 'store'}", f"gallery.data={place}", "teacher.name=miniverse"]
    with pytest.raises(
        KtrayError, match=r"1\.tar' \(the tar shard is broken or truncated"
    ):  # too much for the default share
        index_only(recipes.load(None, [*keys_, "data.max_bad_images=0"]))
    result = index_only(recipes.load(None, [*keys_, "data.max_bad_fraction=0.1"]))
    assert 40 < result["index"]["images"] < 60
    (bad,) = pq.read_table(result["data"]["quarantine_list"]).to_pylist()
    assert bad["uri"].startswith(str(place / "1.tar"))
    assert "broken or truncated" in bad["reason"]
