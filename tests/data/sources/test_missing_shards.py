"""Shards whose names say that there are more."""

from __future__ import annotations

import pytest

from ktray.data.sources.missing_shards import missing_shards


def parts(count: int, *without: int, first: int = 0, form: str = "/d/train-{:05d}-of-{:05d}.parquet") -> list[str]:
    return [form.format(i, count) for i in range(first, first + count) if i not in without]


@pytest.mark.parametrize(
    "whole",
    [
        parts(2),
        parts(1),
        parts(3, first=1),  # some writers count from 1
        parts(2) + parts(3, form="/d/test-{:05d}-of-{:05d}.parquet"),
        parts(2) + parts(2, form="/e/train-{:05d}-of-{:05d}.parquet"),
        ["/d/train-00000-of-00002-0123456789abcdef.parquet", "/d/train-00001-of-00002-fedcba9876543210.parquet"],
        ["/d/00000.tar", "/d/a.jpg", "/d/part-1-of-2.tar"],
        [],
    ],
)
def test_a_whole_set_has_no_note(whole: list[str]) -> None:
    assert missing_shards(whole) == []


def test_missing_ones_are_named() -> None:
    assert missing_shards(parts(2, 1)) == ["WARNING: 1 of 2 shards are missing in '/d': train-00001-of-00002.parquet."]
    tars = "s3://b/x/{:06d}-of-{:06d}.tar"
    assert missing_shards(parts(9, 0, 2, 3, 4, form=tars)) == [
        "WARNING: 4 of 9 shards are missing in 's3://b/x': 000000-of-000009.tar, 000002-of-000009.tar, "
        "000003-of-000009.tar and 1 more."
    ]
    assert len(missing_shards(parts(2, 1) + parts(4, 0, form="/d/test-{:05d}-of-{:05d}.parquet"))) == 2
    assert missing_shards(parts(3, 2, first=1, form="/d/{:03d}-of-{:03d}.tar")) == [
        "WARNING: 1 of 3 shards are missing in '/d': 002-of-003.tar."
    ]
