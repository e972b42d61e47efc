"""What a run leaves that fails, is interrupted, or has no test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pictures import picture
from results import check_result

from ktray import recipe as recipes
from ktray.cli import main
from ktray.distributed.explain import FAULT, INPUT, INTERRUPTED, RESOURCES, exit_code
from ktray.errors import KtrayError, ResourceError
from ktray.jobs.definitions import JOBS
from ktray.pipeline.failure import failure_recorded
from ktray.pipeline.run import run
from ktray.storage.store import Dir

KEYS = [
    "teacher.name=miniverse", "teacher.adapt=probe", "image_size=32", "train.steps=4", "finetune.steps=2",
    "baselines.scratch=false", "train.batch_size=8", "teach.views=1",
]  # fmt: skip


def fill(folder: Path, each: int) -> str:
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}.jpg").write_bytes(picture(f"{name}{i}", size=(64, 64)))
    return str(folder)


def test_a_run_without_a_test_split_ends_with_its_student(tmp_path: Path, cluster: Any) -> None:
    data = fill(tmp_path / "data", 2)
    result = run(recipes.load(None, [*KEYS, f"task.data={data}", f"store={tmp_path / 'store'}"]))
    assert result["metric"]["test"] is None
    assert result["metric"]["test_images"] == 0
    assert result["status"] == "finished"
    assert result["started"] <= result["ended"]
    folder = Path(result["folder"])
    assert (folder / "student/model.safetensors").exists()
    assert "validation" in (folder / "report.html").read_text()
    check_result("distill", folder / "result.json")
    from ktray.reporting.report import closing_table

    assert "no test split" in closing_table(result)


def test_a_failed_run_says_why_and_what_to_do(tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = fill(tmp_path / "data", 6)
    for i in range(3):
        Path(data, "b", f"{i}.jpg").write_bytes(b"not an image")
    words = [*KEYS, f"task.data={data}", f"store={tmp_path / 'store'}"]
    assert main(JOBS["distill"], words) == INPUT
    (folder,) = (tmp_path / "store/runs").iterdir()
    result = check_result("failed", folder / "result.json")
    assert result["status"] == "failed"
    assert result["exit_code"] == INPUT
    assert result["stage"] == "labels"
    assert "images cannot be used" in result["error"]
    assert "data.max_bad_fraction" in result["remedy"]
    assert result["started"] <= result["ended"]
    page = (folder / "report.html").read_text()
    assert "images cannot be used" in page
    assert "data.max_bad_fraction" in page
    for i in range(3):
        Path(data, "b", f"{i}.jpg").write_bytes(picture(f"again {i}", size=(64, 64)))
    assert main(JOBS["distill"], words) == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / "store/runs").glob("*/result.json")]
    assert sorted(result["status"] for result in results) == ["failed", "finished"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KtrayError("x", "y"), INPUT),
        (ResourceError("x", "y"), RESOURCES),
        (FileNotFoundError(2, "no such file"), INPUT),
        (OSError(28, "No space left on device"), RESOURCES),
        (ConnectionError("gone"), RESOURCES),
        (MemoryError(), RESOURCES),
        (IndexError("list index out of range"), FAULT),
        (RuntimeError("Traceback ... ktray.errors.KtrayError: bad value. Change it."), INPUT),
        (RuntimeError("Traceback ... ktray.errors.ResourceError: lost. Wait."), RESOURCES),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
)
def test_exit_codes(tmp_path: Path, error: BaseException, code: int) -> None:
    assert exit_code(error) == code
    folder = Dir(str(tmp_path / "run"))
    with pytest.raises(type(error)), failure_recorded(folder, "r1", 0.0):
        raise error
    result = check_result("failed", folder.read_json("result.json"))
    assert result["exit_code"] == code
    assert result["status"] == ("interrupted" if code == INTERRUPTED else "failed")
    assert result["started"] == "1970-01-01T00:00:00Z"
    if isinstance(error, KtrayError):
        assert (result["error"], result["remedy"]) == ("x", "y")


def test_a_store_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IndexError), failure_recorded(Dir(str(tmp_path / "file/run")), "r1", 0.0):
        raise IndexError("x")
