import json

from ktray.jobs.tune import figure, space


def test_choices_of_several_keys_are_told_apart_by_what_differs():
    drawn = [{"source": "retrieved", "strategy": s} for s in ("query_balanced", "class_balanced")]
    drawn.append({"source": "generic", "strategy": "query_balanced"})
    found = figure.labels([space.label(choice) for choice in drawn])
    assert list(found.values()) == [f"{c['source']}\n{c['strategy']}" for c in drawn]
    students = [{"name": "test_resnet", "kwargs": {"output_stride": stride}} for stride in (8, 16)]
    assert set(figure.labels([space.label(s) for s in students]).values()) == {"output_stride 8", "output_stride 16"}


def test_the_only_choice_and_a_missing_key_are_named():
    assert figure.labels([json.dumps({"name": "a", "n": None})]) == {'{"name": "a", "n": null}': "a\nn None"}
    found = figure.labels([json.dumps({"name": "a"}), json.dumps({"name": "a", "size": 3})])
    assert list(found.values()) == ["a", "size 3"]


def test_long_names_that_are_cut_to_the_same_stay_apart():
    found = figure.labels(["x" * 60 + "1", "x" * 60 + "2"])
    assert len(set(found.values())) == 2
    assert all(len(text) <= figure.LONGEST + 2 for text in found.values())


def test_each_choice_has_a_height_of_its_own():
    choices = [space.label({"name": "a" * 30, "kwargs": {"n": n}}) for n in (1, 2, 3)]
    heights, texts = figure._column([*choices, None])
    assert list(heights) == [0.0, 0.5, 1.0, -0.12]
    assert [text for _, text in texts] == ["n 1", "n 2", "n 3"]


def test_plain_values_are_written_short():
    assert figure.labels([0.98, 0.123456, "oriented", True, 3]) == {
        "0.98": "0.98",
        "0.123456": "0.123",
        "oriented": "oriented",
        "True": "True",
        "3": "3",
    }
