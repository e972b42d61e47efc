"""Task kinds: what holds for all of them, and that nothing outside of their folder asks for one by its name."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.recipe.registries import TASKS
from ktray.recipe.schema import TaskConfig, TeacherConfig
from ktray.tasks.base import metric_label, task_kind

PACKAGE = Path(__file__).resolve().parents[2] / "ktray"
OWN = ("classification", "segmentation")
# A model's output for two images, and their targets.
EXAMPLES = {
    "classification": (torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])),
    "segmentation": (torch.randn(2, 2, 3, 3), torch.tensor([0, 1], dtype=torch.uint8)[:, None, None].expand(2, 6, 6)),
}


def comparisons(source: str, names: tuple[str, ...]) -> list[int]:
    """Lines that compare something with one of the names, by an operator or in a ``match``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        inside = [leaf for part in parts for leaf in ast.walk(part)]
        if any(isinstance(leaf, ast.Constant) and leaf.value in names for leaf in inside):
            found.append(node.lineno)
    return found


def test_a_comparison_is_found():
    source = (
        "if kind == 'segmentation': pass\nx = kind in ('classification',)\nmatch kind:\n  case 'segmentation': pass\n"
    )
    assert comparisons(source + "name = 'segmentation'\n", OWN) == [1, 2, 4]


def test_nothing_outside_their_folder_compares_the_name_of_a_task_kind():
    files = [path for path in PACKAGE.rglob("*.py") if "tasks" not in path.relative_to(PACKAGE).parts[:1]]
    assert len(files) > 200
    found = {str(path.relative_to(PACKAGE)): lines for path in files if (lines := comparisons(path.read_text(), OWN))}
    assert found == {}


def test_the_default_kind_is_there():
    assert TaskConfig().kind in TASKS
    assert set(OWN) <= set(TASKS.names())


@pytest.mark.parametrize("name", OWN)
def test_a_kind_travels_to_workers_and_its_scores_are_its_metrics(name):
    kind = pickle.loads(pickle.dumps(task_kind(name)))
    out, targets = EXAMPLES[name]
    total = kind.tally(out, targets)
    scores = kind.scores(total[:-2].numpy())
    assert set(kind.metrics) <= set(scores)
    assert all(0 <= value <= 1 for value in scores.values())
    assert (total[-2] / total[-1]).item() == pytest.approx(kind.loss(out, targets).item(), rel=1e-5)
    parts = sum(kind.tally(out[i : i + 1], targets[i : i + 1]) for i in range(2))
    np.testing.assert_allclose(parts.numpy(), total.numpy(), rtol=1e-6)


def test_an_unknown_kind_is_named_with_the_nearest():
    with pytest.raises(KtrayError, match=r"No task kind is named 'segmentatoin' \(task\.kind\).*'segmentation'\?"):
        task_kind("segmentatoin")
    with pytest.raises(KtrayError, match=r"No task kind is named 'segmentatoin' \(task\.kind\)"):
        recipes.load(None, ["task.kind=segmentatoin"])


def test_metrics_have_words_and_unknown_ones_keep_their_name():
    assert metric_label("miou") == "mean IoU"
    assert metric_label("r2") == "r2"


@pytest.mark.parametrize("keys", [{"adapt": "text"}, {"adapt": "auto", "candidates": ["text"]}])
def test_a_head_from_class_names_is_for_classification(keys):
    with pytest.raises(KtrayError, match=r"teacher\.adapt=text needs a classification task"):
        task_kind("segmentation").candidates(TeacherConfig(**keys), has_text=True)
    assert task_kind("classification").candidates(TeacherConfig(**keys), has_text=True) == ["text"]
    with pytest.raises(KtrayError, match="'timm:x' has no text tower"):
        task_kind("classification").candidates(TeacherConfig(name="timm:x", **keys), has_text=False)
    assert task_kind("segmentation").candidates(TeacherConfig(), has_text=True) == ["probe", "finetune"]
