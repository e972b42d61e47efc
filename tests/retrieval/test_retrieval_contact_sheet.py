"""The sheet holds every picture, unharmed and where it belongs, and survives odd input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ktray.retrieval.contact_sheet import THUMB, SheetRow, _font, _wrap, contact_sheet


def plain(colour: tuple[int, int, int], height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def render(rows: list[SheetRow], title: str = "title", subtitle: str = "") -> np.ndarray:
    buffer = io.BytesIO()
    contact_sheet(rows, buffer, title, subtitle)
    picture = Image.open(buffer)
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB"))


def box(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width, height of what has this colour."""
    y, x = np.nonzero((sheet == colour).all(-1))
    return int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1


COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 10, 250), (10, 250, 250), (250, 130, 10)]


def test_queries_stand_left_and_hits_right_in_order() -> None:
    a, b, c, d, e, f = COLOURS
    rows = [
        SheetRow(plain(a), "first", [(plain(b), 0.9), (plain(c), 0.8)]),
        SheetRow(plain(d, 64, 64), "second", [(plain(e, 500, 500), 0.7), (plain(f), 0.6)]),
    ]
    sheet = render(rows, subtitle="2 queries")
    boxes = [box(sheet, colour) for colour in COLOURS]
    assert {size for _, _, *size in boxes for size in [tuple(size)]} == {(THUMB, THUMB)}
    (ax, ay, *_), (bx, by, *_), (cx, cy, *_), (dx, dy, *_), (ex, ey, *_), (fx, fy, *_) = boxes
    assert ax == dx < bx == ex < cx == fx
    assert ay == by == cy < dy == ey == fy
    assert dy - ay > THUMB + 15  # room for the number under each picture


def test_small_pictures_keep_their_pixels() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    sheet = render([SheetRow(plain((1, 2, 3)), "x", [(image, 1.0)])])
    left, top, _, _ = box(sheet, (1, 2, 3))
    row = sheet[top : top + THUMB]
    enlarged = image.repeat(THUMB // 32, 0).repeat(THUMB // 32, 1)
    assert any(np.array_equal(row[:, x : x + THUMB], enlarged) for x in range(left + THUMB, row.shape[1] - THUMB))


def test_the_number_under_a_picture_is_its_similarity() -> None:
    def numbers(similarity: float) -> np.ndarray:
        sheet = render([SheetRow(plain(COLOURS[0]), "x", [(plain(COLOURS[1]), similarity)])])
        left, top, width, height = box(sheet, COLOURS[1])
        return sheet[top + height + 2 : top + height + 18, left : left + width]

    assert np.array_equal(numbers(0.8471), numbers(0.8469))  # three decimals
    assert not np.array_equal(numbers(0.847), numbers(0.848))
    assert (numbers(0.5) < 128).any()


def test_odd_rows_and_titles(tmp_path: Path) -> None:
    rows = [
        SheetRow(plain(COLOURS[0], 10, 300), "Größe mit Leerzeichen " * 9, []),
        SheetRow(plain(COLOURS[1], 300, 10), "", [(plain(COLOURS[2], 1, 1), 0.1)] * 5),
    ]
    sheet = render(rows, title="a title that is much wider than its rows " * 4)
    assert box(sheet, COLOURS[0])[2] == THUMB
    assert sheet.shape[1] > 1500
    contact_sheet([], tmp_path / "empty.png", "nothing")
    assert Image.open(tmp_path / "empty.png").size[0] > 100


def test_rows_without_queries_show_neither_query_nor_number() -> None:
    sheet = render([SheetRow(None, "random", [(plain(COLOURS[1]), float("nan"))] * 3)])
    _, top, width, height = box(sheet, COLOURS[1])
    assert width > 3 * THUMB
    assert height == THUMB
    below = sheet[top + height + 2 : top + height + 18]
    assert len(np.unique(below.reshape(-1, 3), axis=0)) == 1
    assert not (sheet == (0, 90, 181)).all(-1).any()


def test_labels_are_wrapped_at_spaces_and_cut_where_they_do_not_fit() -> None:
    font = _font(14, True)
    assert _wrap("capital letter A", 1000, font, 3) == ["capital letter A"]
    assert _wrap("capital letter A", font.getlength("capital"), font, 3) == ["capital", "letter", "A"]
    lines = _wrap("w" * 200, 80, font, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 80 for line in lines)
    assert "".join(_wrap("ab cd" * 3, 40, font, 9)).replace(" ", "") == "abcd" * 3
    assert _wrap("", 80, font, 3) == []
