"""Counts of a selection against counting by hand."""

import json

import numpy as np
import pytest

from ktray.retrieval.coverage import coverage, lines
from ktray.retrieval.select import Selection


def selection():
    query = np.array([0, 1, 0, 3, 0])
    similarity = np.array([0.9, 0.8, 0.7, 0.4, 0.6], dtype=np.float32)
    return Selection(np.arange(5), query, np.zeros(5, np.int64), similarity, 0, 0, 0)


def test_counts_by_query_and_class():
    found = coverage(selection(), np.array([0, 0, 1, 2]), ["ant", "bee", "cat"])
    assert found["queries"] == {"count": 4, "empty": 1, "least": 0, "median": 1.0, "most": 3}
    assert found["share"] == 1.25
    assert {name: (one["queries"], one["images"]) for name, one in found["classes"].items()} == {
        "ant": (2, 4), "bee": (1, 0), "cat": (1, 1),
    }  # fmt: skip
    assert found["classes"]["ant"]["similarity"] == pytest.approx(0.75)
    assert found["classes"]["bee"]["similarity"] is None
    histogram = found["similarity"]
    assert sum(histogram["counts"]) == 5
    assert (histogram["edges"][0], histogram["edges"][-1]) == pytest.approx((0.4, 0.9))
    assert json.loads(json.dumps(found)) == found


def test_lines_name_what_is_scarce_first():
    text = "\n".join(lines(coverage(selection(), np.array([0, 0, 1, 2]), ["ant", "bee", "cat"])))
    assert "4 queries contributed 0 to 3 images each" in text
    assert "1 contributed none" in text
    assert "bee 0, cat 1, ant 4" in text


def test_queries_without_classes_have_none_counted():
    found = coverage(selection(), np.zeros(4, np.int64), [])
    assert found["classes"] == {}
    assert not any("class" in line for line in lines(found))


def test_many_classes_are_cut():
    labels = np.arange(4)
    text = "\n".join(lines(coverage(selection(), labels, [f"c{i}" for i in range(30)])))
    assert "and 20 classes with more" in text
