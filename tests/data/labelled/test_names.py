import pickle
import tracemalloc

import pytest

from ktray.data.labelled.names import Names

WORDS = ["a/1.jpg", "", "ä/2.jpg", "b/3.jpg"]


def test_names_are_a_sequence_of_the_same_strings():
    names = Names(word for word in WORDS)
    assert len(names) == 4
    assert list(names) == WORDS
    assert [names[i] for i in range(4)] == WORDS
    assert names[-1] == WORDS[-1]
    assert names[1:3] == WORDS[1:3]
    assert names[::-2] == WORDS[::-2]
    assert "ä/2.jpg" in names
    assert "c" not in names
    assert pickle.loads(pickle.dumps(names)) == names
    with pytest.raises(IndexError):
        names[4]


def test_names_are_equal_to_sequences_of_the_same_strings_only():
    assert Names(WORDS) == WORDS
    assert Names(WORDS) == tuple(WORDS)
    assert Names(WORDS) == Names(WORDS)
    assert Names([]) == []
    assert Names(WORDS) != WORDS[:3]
    assert Names(WORDS) != [*WORDS[:3], "b/4.jpg"]
    assert Names(WORDS) != Names(WORDS[:3])
    assert Names(["1"]) != [1]
    assert Names(["1"]) != 1


def test_names_of_many_pieces_are_read_in_order():
    many = [f"{i}" for i in range(200_000)]
    assert list(Names(many)) == many


def test_a_read_does_not_make_all_strings_at_once():
    names = Names(f"train/{i:07d}.jpg" for i in range(300_000))
    tracemalloc.start()
    try:
        assert sum(map(len, names)) == 300_000 * 17
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 65_536 * 100  # a piece: 65,536 strings of 66 bytes, with their list
