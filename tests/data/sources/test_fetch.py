import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives import tar_bytes, write_parquet
from image_zoo import jpeg

from ktray.data import filesystem
from ktray.data.sources import fetch as reading
from ktray.data.sources.fetch import fetch
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard


def records(spec, **options):
    return [record for shard in list_shards(spec, **options) for record in read_shard(shard)]


@pytest.fixture
def mixed(tmp_path):
    """Every uri of every kind of container, with its bytes."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "b c.png").write_bytes(jpeg(1))
    members = [(f"{i:02d}.jpg", jpeg(10 + i)) for i in range(6)]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    (tmp_path / "y.tar.gz").write_bytes(tar_bytes(members, "w:gz"))
    write_parquet(tmp_path / "p.parquet", {"image": pa.array([jpeg(20 + i) for i in range(7)])}, 3)
    hf = pa.array([{"bytes": jpeg(30), "path": "n"}, {"bytes": None, "path": "a.jpg"}, None])
    write_parquet(tmp_path / "h.parquet", {"image": hf, "label": [0, 1, 2]})
    write_parquet(tmp_path / "l.parquet", {"uri": ["a.jpg", str(tmp_path / "b c.png")]})
    names = ["a.jpg", "b c.png", "x.tar", "y.tar.gz", "p.parquet", "h.parquet", "l.parquet"]
    return tmp_path, {r.uri: r for r in records([str(tmp_path / n) for n in names])}


def test_every_container_is_read(mixed):
    folder, found = mixed
    good = {u.removeprefix(f"{folder}/").partition("&")[0]: r.data for u, r in found.items() if not r.error}
    expected = {"a.jpg": jpeg(0), "b c.png": jpeg(1), "h.parquet#row=0": jpeg(30)}
    expected |= {f"{n}#member={i:02d}.jpg": jpeg(10 + i) for n in ("x.tar", "y.tar.gz") for i in range(6)}
    expected |= {f"p.parquet#row={i}": jpeg(20 + i) for i in range(7)}
    assert good == expected
    assert {u: r.error for u, r in found.items() if r.error} == {f"{folder}/h.parquet#row=2": "the cell is empty"}


def test_fetch_gives_what_reading_gave_in_the_order_asked(mixed, monkeypatch):
    _, found = mixed
    uris = list(found) * 2
    random.Random(0).shuffle(uris)
    opened = []
    for name in ("open_random", "open_stream"):
        real = getattr(filesystem, name)
        monkeypatch.setattr(filesystem, name, lambda path, real=real: opened.append(path) or real(path))
    got = list(fetch(uris))
    assert [u for u, _, _ in got] == uris
    for uri, data, error in got:
        assert (data, error) == (found[uri].data, found[uri].error)
    assert sum(path.endswith((".tar", ".gz")) for path in opened) == 2


def test_named_column_travels_in_the_uri(tmp_path):
    columns = {"left": pa.array([jpeg(1)]), "right eye": pa.array([jpeg(2)])}
    path = write_parquet(tmp_path / "x.parquet", columns)
    (record,) = records(path, column="right eye")
    assert record.uri == f"{path}#row=0&column=right%20eye"
    assert record.data == jpeg(2)
    assert list(fetch([record.uri])) == [(record.uri, jpeg(2), None)]


def test_fetch_reports_what_is_gone_or_changed(mixed):
    folder, found = mixed
    member = next(u for u in found if "x.tar#member=03" in u)
    row = f"{folder}/p.parquet#row=6"
    write_parquet(folder / "p.parquet", {"image": pa.array([jpeg()])})
    (folder / "x.tar").write_bytes(tar_bytes([("other.jpg", b"1" * 9000)]))
    (folder / "y.tar.gz").unlink()
    zipped = next(u for u in found if "y.tar.gz" in u)
    asked = [member, row, zipped, str(folder / "gone.jpg"), str(folder), "", str(folder / "a.jpg"), "\0.jpg"]
    errors = [(data, error) for _, data, error in fetch(asked)]
    assert errors[6] == (jpeg(0), None)
    for (data, error), part in zip(
        errors[:6], ["changed", "changed", "no such file", "no such file", "not entered", "path is empty"], strict=True
    ):
        assert data is None
        assert part in error
    assert errors[7][0] is None
    assert errors[7][1]


def test_too_large_files_are_not_read(mixed, monkeypatch):
    folder, _ = mixed
    monkeypatch.setattr(filesystem, "MAX_FILE_BYTES", 100)
    ((_, data, error),) = fetch([str(folder / "a.jpg")])
    assert data is None
    assert "MiB" in error


def test_parquet_without_footer_is_one_error_and_ends_nothing(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": pa.array([jpeg(1)])})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    got = records(str(tmp_path))
    assert [r.error is None for r in got] == [True, False]
    assert "broken Parquet file" in got[1].error


def test_parquet_with_a_broken_page_counts_every_lost_row(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"image": pa.array([jpeg(i, 200, 150) for i in range(9)])}, 3)
    chunk = pq.read_metadata(path).row_group(1).column(0)
    at = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    got = records(str(path))
    assert [r.uri for r in got] == [f"{path}#row={i}" for i in range(9)]
    assert [r.error is None for r in got] == [True] * 3 + [False] * 6


def test_parquet_cell_that_names_itself_ends(tmp_path):
    path = str(tmp_path / "a.parquet")
    write_parquet(path, {"path": [f"{path}#row=0"]})
    (record,) = records(path)
    assert record.data is None
    assert "refers to another cell" in record.error


def test_parquet_cells_that_name_cells_of_other_tables_and_files_keep_their_order(tmp_path):
    images, names = str(tmp_path / "images.parquet"), str(tmp_path / "names.parquet")
    write_parquet(images, {"image": pa.array([jpeg(i) for i in range(40)])}, 7)
    (tmp_path / "x.jpg").write_bytes(jpeg(99))
    wanted = [f"{images}#row={i}" for i in range(39, -1, -1)]
    wanted[3:3] = [str(tmp_path / "x.jpg"), str(tmp_path / "gone.jpg"), ""]
    write_parquet(names, {"path": wanted})
    got = records(names)
    assert [r.uri for r in got if r.data] == [uri for uri in wanted if uri and "gone" not in uri]
    assert [r.data for r in got if "#row=" in r.uri and r.data] == [jpeg(i) for i in range(39, -1, -1)]
    assert [(r.uri, r.error) for r in got if not r.data] == [
        (f"{tmp_path}/gone.jpg", "no such file"),
        (f"{names}#row=5", "the cell is empty"),
    ]
    assert got[3].data == jpeg(99)
    assert list(fetch([f"{names}#row=0"])) == [
        (f"{names}#row=0", None, "the cell of a table refers to a cell that refers to another cell")
    ]


def test_read_file_understands_members_in_lists(mixed):
    folder, found = mixed
    member = next(u for u in found if "x.tar#member=03" in u)
    (folder / "list.csv").write_text(f"path\n{member}\n")
    assert records(str(folder / "list.csv"))[0].data == jpeg(13)
    assert reading.read_file("")[1] == "the path is empty"


def test_images_on_s3_come_in_order_by_one_read_each(s3):
    images = [jpeg(number) for number in range(40)]
    filesystem.write_bytes(f"{s3.home}/t.tar", tar_bytes([(f"{n}.jpg", data) for n, data in enumerate(images[:20])]))
    for number, data in enumerate(images[20:], 20):
        filesystem.write_bytes(f"{s3.home}/files/{number}.jpg", data)
    shards = list_shards([f"{s3.home}/t.tar", f"{s3.home}/files"])
    found = [record for shard in shards for record in read_shard(shard)]
    assert sorted(record.data for record in found) == sorted(images)
    asked = [found[(7 * number) % 40] for number in range(40)] + found[3:5]
    gone = f"{s3.home}/files/gone.jpg"
    s3.seen.clear()
    got = list(fetch([*(record.uri for record in asked), gone]))
    assert got == [*((record.uri, record.data, None) for record in asked), (gone, None, "no such file")]
    # A plain file that is asked for twice is read twice.
    assert s3.seen["GET", ""] <= 42
