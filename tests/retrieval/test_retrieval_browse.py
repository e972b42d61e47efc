"""The page holds what it was given, whatever the names are."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from ktray.retrieval.browse import SIDE, Match, Query, choose, page


def image(value, height=100, width=50):
    return np.full((height, width, 3), value, np.uint8)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_it_holds_queries_and_images():
    queries = [Query("a/q.png", 1, image(10)), Query("", None, None)]
    images = [Match("g/1.jpg", 0, 0.75, image(200)), Match("g/2.jpg", 1, float("nan"), image(90))]
    html = page("letters", "two", ["x", "y"], queries, images)
    found = data_of(html)
    assert found["classes"] == ["x", "y"]
    assert [(q["uri"], q["class"]) for q in found["queries"]] == [("a/q.png", 1), ("", None)]
    assert [(i["uri"], i["query"], i["similarity"]) for i in found["images"]] == [
        ("g/1.jpg", 0, 0.75), ("g/2.jpg", 1, None),
    ]  # fmt: skip
    thumb = Image.open(io.BytesIO(base64.b64decode(found["images"][0]["thumb"])))
    assert thumb.size == (SIDE // 2, SIDE)
    assert abs(int(np.asarray(thumb).mean()) - 200) < 3
    assert "http" not in html


def test_it_says_which_strategies_take_an_image():
    images = [Match("1.jpg", 0, 0.5, image(1), ("diverse", "best_first")), Match("2.jpg", 0, 0.4, image(1))]
    found = data_of(page("letters", "two", ["x"], [Query("q.png", 0, None)], images))
    assert [i["strategies"] for i in found["images"]] == [["diverse", "best_first"], []]


def test_names_cannot_break_out():
    wicked = "</script><script>alert(1)</script>"
    html = page(wicked, wicked, [wicked], [Query(wicked, 0, None)], [Match(wicked, 0, 0.5, image(1))])
    assert "<script>alert" not in html
    assert data_of(html)["classes"] == [wicked]
    assert html.count("<script") == 2


def test_every_query_keeps_its_first_images():
    query = np.array([0, 0, 0, 1, 2, 1, 2, 0])
    assert choose(query, 3).tolist() == [0, 3, 4]
    assert choose(query, 5).tolist() == [0, 1, 3, 4, 5]
    assert choose(query, 100).tolist() == list(range(8))
