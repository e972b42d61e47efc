"""Export targets: those that ship, and one of another package, from its file to the card."""

import shutil
from pathlib import Path

import pytest
from outside import installed, write_package

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.export import card, latency, registry
from ktray.jobs.export import run as module
from ktray.jobs.export.targets.base import all_targets, serving, wanted_targets
from ktray.recipe.export import ExportConfig
from ktray.recipe.registries import EXPORTS

COPY = '''
import os
import shutil

from ktray.jobs.export.targets.base import ExportTarget
from ktray.recipe.registries import EXPORTS


class Lying:
    def __init__(self, model):
        self.model = model

    def logits(self, pixels):
        return -self.model.logits(pixels)


class Copy(ExportTarget):
    """The ONNX file once more, for a machine that knows another name."""

    file = "student.copy.onnx"
    use = "On the toy: `toy student.copy.onnx`."

    def wanted(self, part):
        return "TOY_TARGET" in os.environ

    def options(self, part):
        return ["copy"] if self.wanted(part) else []

    def write(self, work):
        shutil.copyfile(work.folder / "student.onnx", work.folder / self.file)
        return {"copied": True}

    def calibrate(self, path, temperature):
        shutil.copyfile(path.with_name("student.onnx"), path)
        return True

    def load(self, path):
        model = super().load(path)
        return Lying(model) if os.environ["TOY_TARGET"] == "lies" else model


EXPORTS.register("copy")(Copy())
'''


@pytest.fixture
def toy(tmp_path: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch):
    """The target's package; latencies and PyTorch's exporter have tests of their own."""
    rows = [{"batch": batch, "threads": 1, "median_ms": 1.0, "p90_ms": 2.0, "runs": 10} for batch in (1, 4)]
    monkeypatch.setattr(latency, "measure", lambda target, batch: {"rows": rows, "memory_bytes": 10**6})
    monkeypatch.setattr(module, "busy_cores", lambda: 0.25)
    monkeypatch.setattr("ktray.jobs.export.onnx_file.write", lambda student, path: shutil.copyfile(onnx_file, path))
    monkeypatch.setenv("TOY_TARGET", "yes")
    site = write_package(
        tmp_path / "site", "toytarget", {"copy.py": COPY}, {"ktray.exports": {"copy": "toytarget.copy"}}
    )
    with installed(site, EXPORTS):
        yield


def asked(run: Path, *more: str) -> recipes.Recipe:
    return recipes.load(None, [f"store={run.parents[1]}", f"export.run={run.name}", "export.batch=4", *more])


def test_the_targets_that_ship_are_in_order() -> None:
    names = [name for name, _ in all_targets()]
    assert names[0] == "onnx"  # the others may start from its file
    assert names[-1] == "int8"  # files that lose accuracy are compared with exact ones
    assert [name for name, _ in wanted_targets(ExportConfig())] == ["onnx"]
    assert [name for name, _ in wanted_targets(ExportConfig(int8=True))] == ["onnx", "int8"]
    assert [name for name, _ in wanted_targets(ExportConfig(targets=["int8"]))] == ["onnx", "int8"]
    files = [served.file for serve in ("float", "int8") if (served := serving(ExportConfig(serve=serve)))]
    assert files == ["student.onnx", "student.int8.onnx"]


def test_a_name_that_no_target_has_is_told_with_the_nearest_one(run: Path) -> None:
    with pytest.raises(KtrayError, match=r"No export target is named 'openvni' .* Did you mean 'openvino'"):
        module.export(asked(run, "export.targets=[openvni]"))


def test_a_missing_package_is_one_line_that_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(EXPORTS.get("openvino")), "libraries", ("a-package-that-nobody-has",))
    with pytest.raises(KtrayError, match=r"needs the package a-package.*pip install 'ktray\[openvino\]'"):
        module.export(asked(run, "export.targets=[openvino]"))
    with pytest.raises(KtrayError, match="which is not installed"):
        module.show(asked(run, "export.targets=[openvino]"))
    assert not (run / "export").exists()


def test_one_of_another_package_is_written_checked_measured_and_described(
    run: Path, toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = module.export(asked(run))
    assert found["copy"]["copied"]
    assert [found["copy"]["agreement"][split]["images"] for split in ("val", "test")] == [18, 60]
    assert found["calibration"]["files"] == ["student.onnx", "student.copy.onnx"]
    assert found["files"]["student.copy.onnx"]["sha256"] == found["files"]["student.onnx"]["sha256"]
    assert found["metric"]["test"]["copy"] == found["metric"]["test"]["onnx"]
    assert set(found["latency"]["models"]) == {"pytorch", "onnx", "copy"}
    text = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "`student.copy.onnx` gives the same class as PyTorch for 60 of 60 test images" in text
    assert "\n\nOn the toy: `toy student.copy.onnx`.\n" in text
    assert "student.copy.onnx" in card.closing(found)
    assert registry.metrics(found)["export.copy.bytes"] == found["files"]["student.copy.onnx"]["bytes"]
    monkeypatch.delenv("TOY_TARGET")
    without = module.export(asked(run))
    assert without["key"] != found["key"]
    assert "student.copy.onnx" not in without["files"]


def test_one_that_says_other_things_than_the_student_ends_the_export(
    run: Path, toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_TARGET", "lies")
    with pytest.raises(KtrayError, match=r"student\.copy\.onnx does not agree with the PyTorch model"):
        module.export(asked(run))
    assert not (run / "export").exists()
