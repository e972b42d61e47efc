"""What is said of a path that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktray.data import filesystem


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("photso", "Did you mean '{root}/Photos'?"),
        ("PHOTOS", "Did you mean '{root}/Photos'?"),
        ("Photos/lists.csv", "Did you mean '{root}/Photos/list.csv'?"),
        ("photos/cats/1.jpg", "Did you mean '{root}/Photos'?"),  # the first part of the way that is wrong
        ("Photos/dogs/1.jpg", "Folder '{root}/Photos' has no 'dogs'."),
        ("elsewhere", "Folder '{root}' has no 'elsewhere'."),
    ],
)
def test_a_missing_path_is_told_with_the_nearest_name(tmp_path: Path, asked: str, told: str) -> None:
    (tmp_path / "Photos").mkdir()
    (tmp_path / "Photos" / "list.csv").write_text("path,label\n")
    (tmp_path / "ümläut").mkdir()
    assert filesystem.missing(f"{tmp_path}/{asked}") == told.format(root=tmp_path)


def test_the_root_has_names_too() -> None:
    assert filesystem.missing("/nowhere-at-all/x") == "Folder '/' has no 'nowhere-at-all'."


def test_a_remote_path_is_told_by_its_scheme() -> None:
    assert "AWS" in filesystem.missing("s3://bucket/gone")
