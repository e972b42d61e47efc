import pyarrow.parquet as pq
import pytest
from image_zoo import write_zoo

from ktray.data.decode import decode_rgb
from ktray.data.quarantine import Bad, BadLimit, Quarantine
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import BadImage, KtrayError


def test_zoo_is_quarantined_image_by_image(tmp_path):
    """Reading, decoding and collecting together: every bad animal is named, every good one decodes."""
    kinds = write_zoo(tmp_path / "zoo")
    quarantine = Quarantine()
    decoded = set()
    for shard in list_shards(str(tmp_path / "zoo"), rows_per_shard=7):
        for record in read_shard(shard):
            name = record.uri.rpartition("/")[2]
            try:
                decode_rgb(record.data)
                decoded.add(name)
            except BadImage as bad:
                quarantine.add(record.uri, bad.reason, "teach")
    assert decoded == {name for name, kind in kinds.items() if kind == "ok"}
    assert {row.uri.rpartition("/")[2] for row in quarantine} == {n for n, kind in kinds.items() if kind == "bad"}
    assert len(decoded) + len(quarantine) == len(kinds)
    assert all(row.reason for row in quarantine)


def test_an_image_counts_once_a_stage_and_once_in_the_share():
    one = Quarantine([Bad("a", "x", "teach"), Bad("a", "y", "teach"), Bad("b", "x", "teach")])
    two = Quarantine([Bad("a", "z", "index"), Bad("b", "other", "teach")])
    one.merge(two)
    assert list(one) == [Bad("a", "x", "teach"), Bad("a", "z", "index"), Bad("b", "x", "teach")]
    assert len(one) == 3
    assert one.images() == 2


@pytest.mark.parametrize(("bad", "read", "limit", "fails"), [
    (0, 0, 0.0, False), (0, 100, 0.0, False), (1, 100, 0.01, False), (2, 100, 0.01, True),
    (1, 1000, 0.0, True), (5, 5, 1.0, False), (1, 0, 0.5, True),
])  # fmt: skip
def test_limit(bad, read, limit, fails):
    quarantine = Quarantine(Bad(f"{i}.jpg", f"reason {i}", "index") for i in range(bad))
    if not fails:
        quarantine.check(read, BadLimit(limit))
        return
    with pytest.raises(KtrayError, match="cannot be used"):
        quarantine.check(read, BadLimit(limit))


@pytest.mark.parametrize(("read", "allowed"), [(6, 0.6), (20, 2), (30, 3), (200, 3), (300, 3), (1000, 10), (0, 0)])
def test_a_few_images_are_accepted_whatever_their_share(read, allowed):
    assert BadLimit(0.01, 3).allowed(read) == pytest.approx(allowed)
    assert BadLimit(0, 3).allowed(read) == 0  # unless none is
    one = Quarantine([Bad("a.jpg", "truncated", "labels")])
    assert one.exceeds(20, BadLimit(0.01))
    assert not one.exceeds(20, BadLimit(0.01, 3))


def test_the_value_to_set_accepts_what_was_seen():
    quarantine = Quarantine(Bad(f"{i}.jpg", "truncated", "index") for i in range(30))
    with pytest.raises(KtrayError, match=r"set data\.max_bad_fraction=0\.04\.") as caught:
        quarantine.check(1000, BadLimit(0.01))
    value = float(str(caught.value).rpartition("=")[2].rstrip("."))
    quarantine.check(1000, BadLimit(value))


def test_error_names_count_share_limit_examples_and_key():
    quarantine = Quarantine(Bad(f"{i}.jpg", f"reason {i}", stage) for i in range(5) for stage in ("index", "teach"))
    with pytest.raises(KtrayError) as caught:
        quarantine.check(200, BadLimit(0.01))
    text = str(caught.value)
    for part in ("5 of 200", "2.5%", "1.0%", "'0.jpg' (reason 0)", "'1.jpg'", "'2.jpg'", "data.max_bad_fraction"):
        assert part in text
    assert "3.jpg" not in text


@pytest.mark.parametrize("rows", [[], [Bad("ü b.jpg", "größer", "teach"), Bad("a", "r", "s")]])
def test_parquet_round_trip(tmp_path, rows):
    path = tmp_path / "deep" / "quarantine.parquet"
    Quarantine(rows).write(str(path))
    assert list(Quarantine.read(str(path))) == sorted(rows)
    assert pq.read_table(path).column_names == ["uri", "reason", "stage"]


def test_names_that_are_no_text_can_be_written(tmp_path):
    quarantine = Quarantine()
    quarantine.add("caf\udce9.jpg", "bad \udcff", "index")
    quarantine.write(str(tmp_path / "q.parquet"))
    assert [row.uri for row in Quarantine.read(str(tmp_path / "q.parquet"))] == ["caf\\udce9.jpg"]
