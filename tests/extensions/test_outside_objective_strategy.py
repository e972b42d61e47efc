"""A package outside ktray adds an objective and a strategy; no file of ktray knows of either."""

import json
from pathlib import Path

import pytest
from outside import installed, run_job, write_package
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.accounting.device import describe_device
from ktray.accounting.ledger import Ledger
from ktray.errors import KtrayError
from ktray.jobs.compare.figure import styles
from ktray.jobs.compare.methods import default_methods
from ktray.pipeline import run as pipeline
from ktray.pipeline.graph import stages
from ktray.pipeline.plan import this_machine
from ktray.pipeline.resolve import resolve
from ktray.recipe.choice import objectives, strategies
from ktray.recipe.registries import OBJECTIVES, STRATEGIES
from ktray.stages.speed import StageLook
from ktray.storage.store import Store

HUBER = '''
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from ktray.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, Traits


@OBJECTIVES.register("huber")
class HuberConfig(ObjectiveConfig):
    """The student's logits match the teacher's by the Huber loss."""

    name: Literal["huber"] = "huber"
    delta: float = Field(1.0, gt=0, description="difference of logits from which the loss is linear")

    colour: ClassVar[str] = "#123456"

    @property
    def traits(self):
        return Traits(frozenset({"logits"}))

    def build(self, *, hflip=0.5):
        return Huber(self.delta)


class Huber(Objective):
    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def loss(self, student_out, batch):
        return {"loss": F.huber_loss(student_out.float(), batch["logits"].float(), delta=self.delta)}
'''

EVERY = '''
from typing import Literal

from pydantic import Field

from ktray.retrieval.strategies.base import STRATEGIES, StrategyConfig, in_turn


@STRATEGIES.register("every_nth")
class EveryNth(StrategyConfig):
    """Each query's hits at places 0, n, 2n, ..."""

    name: Literal["every_nth"] = "every_nth"
    n: int = Field(2, ge=1, description="distance of the places")

    def select(self, candidates, size, exclude=()):
        return in_turn(candidates.similarity[:, :: self.n], candidates.index[:, :: self.n], size, exclude=exclude)
'''

POINTS = {"ktray.objectives": {"huber": "toyway.huber"}, "ktray.strategies": {"every_nth": "toyway.every"}}


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    return write_package(tmp_path / "site", "toyway", {"huber.py": HUBER, "every.py": EVERY}, POINTS)


def test_the_whole_job_runs_with_both(toys: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    store = tmp_path / "store"
    arguments = [
        f"store={store}",
        *SMALL,
        f"task.data={tmp_path / 'task'}",
        f"gallery.data={tmp_path / 'gallery'}",
        "objective.name=huber",
        "objective.delta=0.5",
        "transfer.strategy={name: every_nth, n: 3}",
        "train.steps=8",
        "baselines.scratch=false",
    ]
    done = run_job("distill", arguments, [toys])
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (store / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["objective"] == "huber"
    assert result["transfer_set"]["strategy"] == "every_nth"
    assert result["transfer_set"]["kept"] > 0
    assert result["cost"]["flops"]["transfer"] > 0
    with installed(toys, OBJECTIVES, STRATEGIES):
        saved = recipes.load(str(file.parent / "recipe.yaml"), [])
        assert saved.objective.model_dump() == {"name": "huber", "delta": 0.5}
        assert saved.transfer.strategy == {"name": "every_nth", "n": 3}
    with pytest.raises(KtrayError, match="No objective is named 'huber'"):  # its package is gone
        recipes.load(str(file.parent / "recipe.yaml"), [])
    with pytest.raises(KtrayError, match="No objective is named 'huber'"):
        recipes.load(None, ["objective.name=huber", "objective.delta=0.5"])


def test_an_outside_objective_is_like_the_built_in_ones(toys: Path) -> None:
    built_in = [config.objective_name() for config in objectives()]
    with installed(toys, OBJECTIVES, STRATEGIES):
        assert [config.objective_name() for config in objectives()] == [*built_in, "huber"]
        rows = {row[0]: row for row in recipes.schema()}
        assert rows["objective.delta"] == (
            "objective.delta",
            1.0,
            "float",
            "huber: difference of logits from which the loss is linear",
        )
        assert rows["objective.name"][2].endswith("|huber")
        assert rows["transfer.strategy"][2].endswith("|every_nth")
        found = recipes.load(None, ["objective.name=huber", "objective.delta=0.25"])
        assert (found.objective.traits.reads, found.objective.build().delta) == ("logits", 0.25)
        with pytest.raises(KtrayError, match=r"'objective\.delta' does not accept -1"):
            recipes.override(found, {"objective.delta": -1})
        with pytest.raises(KtrayError, match=r"objective\.delta belongs to huber; objective\.name is dual"):
            recipes.override(found, {"objective.name": "dual", "objective.delta": 2.0})
        keys, _ = default_methods(recipes.load(None, []))
        assert keys["huber retrieved"] == {"objective.name": "huber", "transfer.source": "retrieved"}
        row = {"name": "huber retrieved", "family": "huber retrieved", "objective": "huber", "source": "retrieved"}
        assert styles([row])["huber retrieved"] == ("#123456", "o", True)
    assert [config.objective_name() for config in objectives()] == built_in
    assert "delta" not in {key.rpartition(".")[2] for key, *_ in recipes.schema()}


def test_an_outside_strategy_has_its_own_keys(toys: Path) -> None:
    with installed(toys, OBJECTIVES, STRATEGIES):
        assert strategies()[-1].strategy_name() == "every_nth"
        plain = recipes.load(None, ["transfer.strategy=every_nth"])
        assert plain.transfer.strategy == {"name": "every_nth", "n": 2}, "its keys are in what a stage's key reads"
        assert recipes.override(plain, {}).transfer == plain.transfer
        assert recipes.load(None, ["transfer.strategy={name: every_nth, n: 3}"]).transfer.chosen_strategy.n == 3
        for wrong, message in (("{name: every_nth, n: 0}", "n: Input"), ("{name: every_nth, m: 1}", "m: Extra")):
            with pytest.raises(KtrayError, match=rf"'transfer\.strategy' does not accept .*{message}"):
                recipes.load(None, [f"transfer.strategy={wrong}"])


def transfer_key(store: Path, *overrides: str) -> str:
    """The key of TRANSFER under a recipe; nothing is run."""
    recipe = recipes.load(None, [f"store={store}", *SMALL, "train.steps=8", "baselines.scratch=false", *overrides])
    plan = this_machine(recipe)
    found = resolve(recipe, plan)
    context = pipeline._context(Store(str(store)), found, plan, Ledger(describe_device()), None, "plan")
    context.runtime.planned = StageLook()
    made = stages(context).transfer
    assert made is not None
    return made.key


def test_a_stored_transfer_is_untouched_by_other_objectives(toys: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    data = [f"task.data={tmp_path / 'task'}", f"gallery.data={tmp_path / 'gallery'}"]
    oriented = transfer_key(tmp_path / "store", *data)
    assert transfer_key(tmp_path / "store", *data, "objective.temperature=3.0") != oriented
    more = HUBER.replace("    delta:", '    floor: float = Field(0.0, description="least loss")\n    delta:', 1)
    newer = write_package(tmp_path / "newer", "toyway", {"huber.py": more, "every.py": EVERY}, POINTS)
    huber = []
    for folder in (toys, newer):
        with installed(folder, OBJECTIVES, STRATEGIES):
            assert transfer_key(tmp_path / "store", *data) == oriented
            huber.append(transfer_key(tmp_path / "store", *data, "objective.name=huber"))
    assert huber[0] != huber[1], "its own new key enters its own stage"
