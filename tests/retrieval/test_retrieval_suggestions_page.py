"""The page of suggestions shows the images by rank, whatever their names are."""

import math
import re

import numpy as np

from ktray.retrieval import suggestions_page
from ktray.retrieval.suggestions_page import Suggested, page

PICTURE = np.full((40, 60, 3), 128, np.uint8)


def one(rank, uri="a/b.jpg", label="cat", differs=math.nan):
    return Suggested(rank, uri, label, 0.414, 0.5, differs)


def test_it_shows_images_in_order_with_their_figures():
    html = page("pets", [one(1, "g/first.jpg", differs=0.25), one(2, "g/second.jpg")], {"g/first.jpg": PICTURE})
    assert html.index("first.jpg") < html.index("second.jpg")
    assert html.count("data:image/jpeg;base64,") == 1
    assert "<b>1</b> cat 41%" in html
    assert re.findall(r"disagreement (\S+?)</span>", html) == ["0.25"]
    assert "2 unlabelled images, the most valuable first" in html
    assert "http" not in html


def test_names_cannot_break_out():
    wicked = '"><script>alert(1)</script>'
    html = page(wicked, [one(1, wicked, wicked)], {wicked: PICTURE})
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_long_list_is_shown_in_part(monkeypatch):
    monkeypatch.setattr(suggestions_page, "MOST", 3)
    html = page("pets", [one(rank, f"{rank}.jpg") for rank in range(1, 6)], {})
    assert html.count("<li>") == 3
    assert "5 unlabelled images, the first 3 of them on this page" in html
