"""The whole export of a trained student: what it leaves, reuse, and what goes wrong."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from heard import heard
from PIL import Image
from results import check_result
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from ktray import cli
from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.definitions import JOBS, Job
from ktray.jobs.export import card, latency, quantise
from ktray.jobs.export import run as module
from ktray.jobs.export.onnx_file import OPSET
from ktray.jobs.export.predict import Classifier
from ktray.storage import store
from ktray.storage.store import Dir


def export(run: Path, *overrides: str, lines: list[str] | None = None) -> dict[str, Any]:
    keys = [f"store={run.parents[1]}", f"export.run={run.name}", "export.batch=4", *overrides]
    return heard(lines if lines is not None else [], module.export, recipes.load(None, keys))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies are not what these tests are about: each takes a process that imports PyTorch."""
    row = {"median_ms": 1.0, "p90_ms": 2.0, "runs": 10}
    rows = [{"batch": batch, "threads": 1, **row} for batch in (1, 4)]
    monkeypatch.setattr(latency, "measure", lambda target, batch: {"rows": rows, "memory_bytes": 10**6})
    monkeypatch.setattr(module, "busy_cores", lambda: 0.25)


@pytest.fixture
def written(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's exporter, which takes seconds, has its own tests; this is what it wrote there."""
    monkeypatch.setattr("ktray.jobs.export.onnx_file.write", lambda student, path: shutil.copyfile(onnx_file, path))


def test_all_that_is_left_and_a_second_call(run: Path, stripes: Path, student, monkeypatch) -> None:
    calibrated: list[np.ndarray] = []
    choose = quantise.choose

    def watched(student, source, target, calibration, *rest):
        calibrated.append(np.array(calibration))
        return choose(student, source, target, calibration, *rest)

    monkeypatch.setattr(quantise, "choose", watched)
    monkeypatch.setattr(latency.measure, "__defaults__", (0.05,))
    lines: list[str] = []
    found = export(run, "export.int8=true", "export.calibration=6", "export.register_as=stripes", lines=lines)
    folder = run / "export"
    on_disk = check_result("export", folder / "export.json")
    assert {**on_disk, "folder": str(folder)} == json.loads(json.dumps(found))
    assert sorted(p.name for p in folder.iterdir()) == sorted([*found["files"], "export.json"])
    assert set(found["files"]) == {
        "README.md", "config.json", "model.safetensors", "predict.py", "student.int8.onnx", "student.onnx",
    }  # fmt: skip

    agreement = found["onnx"]["agreement"]
    assert [agreement[split]["images"] for split in ("val", "test")] == [18, 60]
    assert [agreement[split]["top1_equal"] for split in ("val", "test")] == [1, 1]
    assert found["onnx"]["opset"] == OPSET
    assert found["preprocessing"] == {"levels": 0, "images": 0}
    result = json.loads((run / "result.json").read_text())
    for split in ("val", "test"):
        assert found["metric"][split]["pytorch"]["metric"] == pytest.approx(result["metric"][split])
        assert set(found["metric"][split]) == {"pytorch", "onnx", "int8"}
    assert [set(one) for one in found["latency"]["models"].values()] == [{"rows", "memory_bytes"}] * 3
    assert found["mlflow"]["version"] == "1"

    # Ranges are measured on labelled training images: evenly over the classes, none of test.
    def pixels(split: str) -> set[bytes]:
        return {student.preprocess.eval_transform(Image.open(p)).tobytes() for p in (stripes / split).glob("*/*")}

    used = {one.tobytes() for one in calibrated[0]}
    assert len(used) == 6
    assert used <= pixels("train")
    assert not used & pixels("test")

    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(plain(x), student(x))

    # The temperature is the one of another optimiser, on validation; the files answer with it, and only with it.
    honesty = found["calibration"]
    assert honesty["files"] == ["student.onnx", "student.int8.onnx"]
    val = sorted((stripes / "val").glob("*/*"))
    with torch.inference_mode():
        raw = student.logits(
            torch.from_numpy(np.stack([student.preprocess.eval_transform(Image.open(p)) for p in val]))
        )
    truth = torch.tensor([student.classes.index(p.parent.name) for p in val])
    if not bool((raw.argmax(1) == truth).all()):  # otherwise the labels are smoothed
        grid = np.geomspace(0.01, 100, 20_001)
        losses = [float(torch.nn.functional.cross_entropy(raw.double() / t, truth)) for t in grid]
        assert honesty["temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
        assert honesty["val"]["nll"] == pytest.approx(min(losses), rel=1e-4)
    for file in honesty["files"]:
        shipped = Classifier(folder / file)
        assert shipped.temperature == honesty["temperature"]
        pixels = np.stack([student.preprocess.eval_transform(Image.open(p)) for p in val[:3]])
        expected = softmax(shipped.logits(pixels).astype(np.float64) / honesty["temperature"], axis=1)
        assert shipped.probabilities([p.read_bytes() for p in val[:3]]) == pytest.approx(expected)
    everything, *_, half = honesty["abstention"]
    assert everything["val_accuracy"] == pytest.approx(found["metric"]["val"]["pytorch"]["top1"])
    assert everything["test_accuracy"] == pytest.approx(found["metric"]["test"]["pytorch"]["top1"])
    assert (everything["test_share"], half["share"]) == (1.0, 0.5)

    text = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "timm"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(result["metric"]["test"], 4)
    for part in ("apache-2.0 (ships with ktray", "98 unlabelled images", "2 near test", "1.5 TFLOP", "5 a class"):
        assert part in text
    assert "格子" in text
    assert str(stripes.parent) not in text  # nobody's business where the card goes
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for block in tables:
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, block
    assert len(tables) == 6

    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    lines.clear()
    again = export(run, "export.int8=true", "export.calibration=6", "export.register_as=stripes", lines=lines)
    assert again == found
    assert lines[0] == f"export    reused {folder}"
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert card.closing(again).count("\n") == 4


def test_other_options_or_a_damaged_export_make_it_anew(run: Path, quick, written) -> None:
    first = export(run)
    assert first["int8"] is None
    (run / "export" / "student.onnx").write_bytes(b"cut short")
    second = export(run)
    assert second["files"] == {**first["files"], "README.md": second["files"]["README.md"]}
    assert (run / "export" / "student.onnx").stat().st_size == first["files"]["student.onnx"]["bytes"]
    (run / "export" / "left by nobody").touch()
    third = export(run, "export.batch=5")
    assert third["key"] != second["key"]
    assert not (run / "export" / "left by nobody").exists()


def test_weights_of_another_student_are_noticed(run: Path, quick, written) -> None:
    path = run / "student" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.startswith("fc"))
    weights[name] = -weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    # The ONNX file is that of the right weights, and so does not say what these do.
    with pytest.raises(KtrayError, match="does not agree with the PyTorch model"):
        export(run)
    assert not (run / "export").exists()


def test_what_a_person_should_know(run: Path, quick, written) -> None:
    path = run / "result.json"
    result = json.loads(path.read_text())
    result["metric"]["test"] -= 0.2
    path.write_text(json.dumps(result))
    lines: list[str] = []
    found = export(run, lines=lines)
    assert any("but the result of the run was" in note for note in found["notes"])
    assert f"note      {found['notes'][0]}" in lines
    assert "the result of the run was" in (run / "export" / "README.md").read_text(encoding="utf-8")

    poor = {"metric": found["metric"]["val"]["onnx"]["metric"] - 0.034}
    found["metric"]["val"]["int8"] = poor
    found["metric"]["test"] = None
    found["onnx"]["agreement"]["val"] |= {"top1_differs": 1, "widest_margin": 1e-6}
    found["preprocessing"] = {"images": 3, "levels": 2}
    found["unusable"]["val"] = 4
    notes = module.notes({}, found)
    assert [note for note in notes if "8-bit file loses 3.4 points on validation" in note]
    assert len(notes) == 5
    found["metric"]["val"]["int8"] = {"metric": poor["metric"] + 0.03}
    assert len(module.notes({}, found)) == 4


def test_on_s3(s3, run: Path, quick, written) -> None:
    Dir(s3.home).sub(f"runs/{run.name}").put(run)
    keys = [f"store={s3.home}", f"mlflow.uri=sqlite:///{run.parents[1]}/mlflow.db"]
    found = module.export(recipes.load(None, keys))
    there = Dir(f"{s3.home}/runs/{run.name}/export")
    assert set(there.names()) == {*found["files"], "export.json"}
    assert module.export(recipes.load(None, keys)) == found


def test_int8_cannot_be_served_without_being_made(run: Path) -> None:
    with pytest.raises(KtrayError, match=r"Set export\.int8=true"):
        export(run, "export.serve=int8")


def test_the_command_line(run: Path, quick, written, capsys, monkeypatch) -> None:
    def main(*words: str) -> int:
        argv = [f"store={run.parents[1]}", *words]
        return cli.main(JOBS["export"], argv)

    assert main("--plan", "export.int8=true", "export.register_as=stripes") == 0
    planned = capsys.readouterr().out
    for part in ("to be written", "18 validation and 60 test images", "TFLOP", "'stripes' with the alias 'champion'"):
        assert part in planned
    assert not (run / "export").exists()
    assert main() == 0
    assert "student.onnx" in capsys.readouterr().out
    assert main("--plan") == 0
    assert "in the store" in capsys.readouterr().out
    assert main("export.run=nothing") == 2
    assert "error: There is no run 'nothing'" in capsys.readouterr().err


def test_a_full_disk(run: Path, quick, written, monkeypatch, capsys) -> None:
    def full(target: str, source: object) -> object:
        if target.endswith("predict.py"):
            raise OSError(errno.ENOSPC, "No space left on device", target)
        return real(target, source)

    real = store._aside
    monkeypatch.setattr(store, "_aside", full)
    keys = [f"store={run.parents[1]}", f"export.run={run.name}"]

    def job(recipe: recipes.Recipe, debug: bool) -> None:
        module.export(recipe)

    assert cli.main(Job("export", "", job, print), keys) == 3
    assert "error: No space is left on the disk" in capsys.readouterr().err
    assert not (run / "export" / "export.json").exists()  # what is there is not taken for an export
    monkeypatch.setattr(store, "_aside", real)
    assert cli.main(Job("export", "", job, print), keys) == 0
