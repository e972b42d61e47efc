"""Which ways are compared, and which are left out with what reason."""

import pytest
from heard import heard
from PIL import Image

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.compare.methods import default_methods, list_methods, recipe_of, unavailable
from ktray.recipe.registries import OBJECTIVES


@pytest.fixture
def captioned(tmp_path):
    """A CSV gallery with captions."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(f"path,caption\n{tmp_path / 'a.png'},a black square\n")
    return tmp_path / "list.csv"


@pytest.fixture
def bare(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def test_default_ways_follow_the_data(bare, captioned):
    keys, missing = default_methods(recipes.load(None, ["task.data=x"]))
    assert {"oriented target", "agnostic target", "scratch"} <= set(keys)
    assert not any(k.get("transfer.source") in ("retrieved", "generic") for k in keys.values())
    assert set(missing) == {"agnostic_then_oriented", "clip generic", "supervised generic"}
    plain = recipes.load(None, ["task.data=x", f"gallery.data={bare}"])
    keys, missing = default_methods(plain)
    for objective, sources in {
        "oriented": {"retrieved", "generic", "target"},
        "agnostic": {"retrieved", "generic"},
    }.items():
        assert {name.split()[1] for name in keys if name.split()[0] == objective} == sources
    assert next(iter(keys)) == "oriented retrieved"
    assert list(keys)[-1] == "scratch"
    assert {"clip generic", "supervised generic"} <= set(missing)
    assert "captions" in unavailable(plain)["clip"]
    assert "clip" not in unavailable(recipes.load(None, ["task.data=x", f"gallery.data={captioned}"]))
    assert "supervised" not in unavailable(recipes.load(None, ["task.data=x", "supervised.data=y"]))
    keys, missing = default_methods(recipes.load(None, []))
    assert missing == {"probe": "the student starts from random weights"}
    assert {k["objective.name"] for k in keys.values()} == set(OBJECTIVES.names()) - {"probe"}


def test_objectives_of_classes_are_left_out_for_maps(bare):
    base = recipes.load(None, ["task.data=x", f"gallery.data={bare}", "task.kind=segmentation"])
    keys, missing = default_methods(base)
    of_classes = {"dual", "oriented_features", "mtkd", "consistency", "probe"}
    assert not of_classes & {way["objective.name"] for way in keys.values()}
    assert of_classes <= set(unavailable(base))
    assert all("no classes of images" in missing[name] for name in missing if name.split()[0] in of_classes)
    assert {"oriented retrieved", "agnostic retrieved", "specmatch retrieved"} <= set(keys)


def test_a_baseline_without_a_teacher_is_compared_on_both_sets(bare):
    keys, _ = default_methods(recipes.load(None, ["task.data=x", f"gallery.data={bare}"]))
    assert [name for name in keys if name.startswith("consistency")] == [
        "consistency generic",
        "consistency retrieved",
    ]


def test_what_is_left_out_is_said(bare):
    lines = []
    heard(lines, list_methods, recipes.load(None, ["task.data=x", f"gallery.data={bare}"]))
    assert any(line.startswith("method    supervised generic: omitted, ") for line in lines)


def test_ways_by_name(bare):
    base = recipes.load(None, ["compare.ways=[scratch, oriented retrieved]", "compare.budgets=[]"])
    assert list(list_methods(base)) == ["scratch", "oriented retrieved", "oriented generic"]
    alone = recipes.override(base, {"compare.random": False})
    assert list(list_methods(alone)) == ["scratch", "oriented retrieved"]
    with pytest.raises(KtrayError, match="'oriented retrieved'"):
        list_methods(recipes.load(None, ["compare.ways=[orientd retrieved]"]))
    own = ["task.data=x", f"gallery.data={bare}"]
    with pytest.raises(KtrayError, match=r"supervised generic.*cannot be run"):
        list_methods(recipes.load(None, [*own, "compare.ways=[supervised generic]"]))


def test_sizes_and_budgets_are_runs_of_their_way():
    base = recipes.load(
        None,
        [
            "compare.ways=[oriented retrieved, agnostic retrieved, oriented generic, scratch]",
            "compare.sizes=[500, 1000]",
            "compare.budgets=[0.125, 0.5]",
        ],
    )
    methods = list_methods(base)
    families = {}
    for name, method in methods.items():
        families.setdefault(method.family, []).append(name)
    assert {family: len(names) for family, names in families.items()} == {
        "oriented retrieved": 5,
        "agnostic retrieved": 3,
        "oriented generic": 3,
        "agnostic generic": 3,
        "scratch": 1,
    }
    assert methods["oriented generic, 500 images"].keys["transfer.source"] == "generic"
    assert methods["oriented generic, 500 images"].keys["transfer.size"] == 500
    assert methods["oriented generic, 500 images"].like == ("oriented retrieved, 500 images",)
    assert methods["oriented generic"].like == ("oriented retrieved",)
    assert methods["agnostic retrieved, 1,000 images"].keys["transfer.size"] == 1000
    assert methods["oriented retrieved, 1/8 steps"].share == 0.125
    for wrong in ("compare.budgets=[2]", "compare.sizes=[0]"):
        with pytest.raises(KtrayError, match=wrong.split("=")[0]):
            list_methods(recipes.load(None, [wrong]))


def test_a_way_with_an_unknown_key_names_its_nearest():
    base = recipes.load(None, [])
    with pytest.raises(KtrayError, match=r"objective\.match"):
        recipe_of(base, {"objective.mach": "mse"})
    with pytest.raises(KtrayError, match="compare"):
        recipe_of(base, {"compare.seeds": [1]})


STRATEGIES = """compare.ways={
    near: {transfer.source: retrieved, transfer.strategy: best_first},
    apart: {transfer.source: retrieved, transfer.strategy: diverse},
    floor: {transfer.source: retrieved, transfer.min_similarity: auto},
    mse: {objective.name: agnostic, objective.match: mse},
    own: {transfer.source: target},
    scratch: {objective.name: scratch}}"""


def test_strategies_have_a_random_draw_beside_them(bare):
    methods = list_methods(recipes.load(None, ["task.data=x", f"gallery.data={bare}", STRATEGIES]))
    assert list(methods) == [
        "near", "near, random", "apart", "floor", "floor, random", "mse", "mse, random", "own", "scratch",
    ]  # fmt: skip
    draw = methods["near, random"]
    assert draw.keys == {"transfer.source": "generic"}
    assert draw.like == ("near", "apart")
    assert draw.family == "near, random"
    assert methods["floor, random"].like == ("floor",)
    assert methods["mse, random"].keys == {
        "objective.name": "agnostic", "objective.match": "mse", "transfer.source": "generic",
    }  # fmt: skip
    assert not any(methods[name].like for name in ("near", "apart", "floor", "mse", "own", "scratch"))


def test_a_draw_that_the_user_names_is_the_one_beside_them(bare):
    ways = "compare.ways={a: {transfer.source: retrieved}, b: {transfer.source: generic}}"
    methods = list_methods(recipes.load(None, ["task.data=x", f"gallery.data={bare}", ways]))
    assert list(methods) == ["a", "b"]
    assert methods["b"].like == ("a",)


def test_without_a_gallery_nothing_is_drawn():
    methods = list_methods(recipes.load(None, ["task.data=x", "compare.ways={a: {objective.name: oriented}}"]))
    assert list(methods) == ["a"]


def test_the_default_methods_keep_the_draws_that_they_have(bare):
    methods = list_methods(recipes.load(None, ["task.data=x", f"gallery.data={bare}"]))
    likes = {name: method.like for name, method in methods.items() if method.like}
    assert likes == {f"{name} generic": (f"{name} retrieved",) for name in ("oriented", "agnostic", "consistency")}
    assert not [name for name in methods if name.endswith(", random")]


def test_a_draw_has_as_many_images_as_the_set_beside_it_really_has(bare):
    from ktray.jobs.compare.run import _run_all

    base = recipes.load(None, ["task.data=x", f"gallery.data={bare}", "transfer.size=100", STRATEGIES])
    methods = list_methods(base)
    kept = {"near": 90, "apart": 88, "floor": 31, "mse": 100}
    asked = []

    class Runs:
        def run(self, jobs):
            asked.append([name for name, _ in jobs])
            return [
                {"size": one.transfer.size, "transfer_set": {"kept": kept.get(name, 0) + one.seed}}
                for name, one in jobs
            ]

    given = {(name, seed): recipe_of(base, m.keys, seed=seed) for seed in (0, 1) for name, m in methods.items()}
    found = dict(zip(given, _run_all(Runs(), methods, given), strict=True))
    assert [found[name, 0]["size"] for name in ("near, random", "floor, random", "mse, random")] == [90, 31, 100]
    assert found["near, random", 1]["size"] == 91
    assert found["near", 0]["size"] == 100
    assert [len(names) for names in asked] == [12, 6]
    assert not [name for name in asked[0] if name.endswith("random")]
