"""jobs/export.py: the student of a run, as files that are checked, measured, described and registered."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ktray import __version__
from ktray.accounting.device import describe_device, versions
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.errors import KtrayError
from ktray.jobs.bench.machine import busy_cores
from ktray.jobs.export import agreement, card, latency, onnx_file, predict, quantise, registry
from ktray.jobs.export.agreement import PYTORCH, AgreementScores
from ktray.jobs.export.images import Split
from ktray.jobs.export.predict import Classifier
from ktray.jobs.export.run_source import Source, find
from ktray.models.flops import forward_flops
from ktray.models.student.classifier import Student
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.result import SCHEMA, ExportResult, write_result
from ktray.storage.lease import Lease
from ktray.storage.store import Dir
from ktray.tasks import classification

VERSION = 1
FOLDER, RESULT = "export", "export.json"
ONNX, INT8 = "student.onnx", "student.int8.onnx"
LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "torch", "timm", "numpy", "pillow")
# A metric on the same images may differ by this from what the run found (another device, another precision).
_SAME = 0.005


def export(asked: Recipe, say: Callable[[str], None], debug: bool = False) -> dict[str, Any]:
    """Export a run's student into its folder; returns the content of ``export.json``, and ``folder``.

    The same call again reuses what is there; other options, another machine or other versions make it anew.

    Raises:
        KtrayError: there is no such run, its student or images are damaged, PyTorch's and ONNX's predictions differ,
            or MLflow could not register it (the export is whole then).
    """
    source = find(asked, say)
    part = source.recipe.export
    if part.serve == "int8" and not part.int8:
        raise KtrayError("export.serve=int8 needs the 8-bit file", "Set export.int8=true too.")
    task = source.task(say)
    key = _key(source, task)
    target = source.folder.sub(FOLDER)
    # One job at a time; it is the run's folder that is held, since what is in the export's own is shipped.
    with Lease(source.folder, say):
        found = _whole(target, key)
        if found is not None:
            say(f"export    reused {target.uri}")
        else:
            with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
                found = _make(source, task, key, Path(scratch), say)
                target.delete()
                target.put(Path(scratch) / FOLDER)
            found = write_result(target, ExportResult(**found), RESULT)
        with target.local() as folder:
            logged = registry.log(source, folder, found, say)
        if logged != found.get("mlflow"):
            found = write_result(target, ExportResult(**{**found, "mlflow": logged}), RESULT)
    return {**found, "folder": target.uri}


def show(asked: Recipe, say: Callable[[str], None]) -> None:
    """``--plan``: which run would be exported, what is there, and how much is computed."""
    source = find(asked, say)
    task, student, part = source.task(say), source.student(), source.recipe.export
    there = _whole(source.folder.sub(FOLDER), _key(source, task)) is not None
    say(f"run       {source.folder.uri}")
    say(f"student   {student.name}, {_parameters(student):,} parameters, {len(task.classes)} classes")
    say(f"export    {'in the store' if there else 'to be made'}: {source.folder.uri}/{FOLDER}")
    passes = 2 * (len(task.val) + len(task.test))
    tried = len(quantise.FIRST) + len(quantise.then(quantise.FIRST[0]))
    if part.int8:
        passes += tried * (len(task.val) + part.calibration) + len(task.test)
    flops = forward_flops(student.model, (3, *student.preprocess.size)) * passes
    int8 = f", {part.calibration} training images to measure ranges, at most {tried} settings" if part.int8 else ""
    say(
        f"          {len(task.val):,} validation and {len(task.test):,} test images{int8}: at most {flops / 1e12:.3g} "
        "TFLOP on this machine's processor, and a minute for latencies"
    )
    if part.register_as:
        say(f"mlflow    a new version of '{part.register_as}' with the alias '{part.alias}'")


def _key(source: Source, task: LabelledSet) -> str:
    part = source.recipe.export
    weights = {
        name: hashlib.sha256(source.folder.read(f"student/{name}")).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    options = [part.int8, part.calibration if part.int8 else 0, part.batch]
    parts = [VERSION, __version__, weights, source.result, task.fingerprint, options, libraries, describe_device()]
    return digest(FOLDER, parts)


def _whole(target: Dir, key: str) -> dict[str, Any] | None:
    """``export.json`` of an export with this key whose files are all there, else None."""
    try:
        found: dict[str, Any] = target.read_json(RESULT)
        sizes = target.names()
        same = found["key"] == key and all(sizes.get(n) == f["bytes"] for n, f in found["files"].items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if same else None


def _make(source: Source, task: LabelledSet, key: str, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    folder = scratch / FOLDER
    part, student = source.recipe.export, source.student()
    with source.folder.local("student") as weights:
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(weights / name, folder / name)
    shutil.copyfile(predict.__file__, folder / "predict.py")
    say(f"export    {student.name} of {source.run_id} to ONNX, opset {onnx_file.OPSET}")
    onnx_file.write(student, folder / ONNX)
    files = {"onnx": Classifier(folder / ONNX)}
    val, test = _split(source, student, "val", task.val), _split(source, student, "test", task.test)
    on_val = agreement.score(student, files, val.batches())
    checked = {"val": agreement.compare(on_val.logits[PYTORCH], on_val.logits["onnx"])}
    agreement.require(checked["val"], ONNX)
    int8 = None
    if part.int8:
        int8 = _quantised(source, student, task, on_val, folder, scratch, say)
        files["int8"] = Classifier(folder / INT8)
    values: dict[str, Any] = {"name": source.metric, "val": agreement.metrics(on_val, task.classes, source.metric)}
    on_test: AgreementScores | None = None
    if task.test:
        on_test = agreement.score(student, files, test.batches())
        checked["test"] = agreement.compare(on_test.logits[PYTORCH], on_test.logits["onnx"])
        agreement.require(checked["test"], ONNX)
    values["test"] = agreement.metrics(on_test, task.classes, source.metric) if on_test else None
    say(f"export    latency and memory of {', '.join((PYTORCH, *files))}")
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "key": key,
        "time": time.time(),
        "date": time.strftime("%Y-%m-%d"),
        "run_id": source.run_id,
        "student": {
            "name": student.name,
            "kwargs": student.kwargs,
            "parameters": _parameters(student),
            "size": list(student.preprocess.size),
            "classes": len(task.classes),
        },
        "onnx": {**onnx_file.signature(onnx.load(str(folder / ONNX))), "agreement": checked},
        "preprocessing": {
            "levels": max(s.levels for s in (on_val, on_test) if s),
            "images": sum(s.differing for s in (on_val, on_test) if s),
        },
        "int8": int8,
        "metric": values,
        "unusable": {"val": val.unusable, "test": test.unusable},
        "latency": _latency(folder, part.batch, list(files)),
        "device": describe_device(),
        "versions": {**versions(), **{name: metadata.version(name) for name in LIBRARIES}},
        "mlflow": None,
    }
    found["notes"] = notes(source.result, found)
    found["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    card.write(folder, source, student, task, found)
    text = (folder / "README.md").read_bytes()
    found["files"]["README.md"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    for line in found["notes"]:
        say(f"note      {line}")
    return found


def _quantised(
    source: Source,
    student: Student,
    task: LabelledSet,
    on_val: AgreementScores,
    folder: Path,
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the 8-bit file; its scores on validation are added to ``on_val``."""
    part, metric = source.recipe.export, source.metric
    # Evenly over the classes, in whose order they lie; test images are never among them.
    spread = np.linspace(0, len(task.train) - 1, min(part.calibration, len(task.train))).round().astype(int)
    chosen = [task.train[i] for i in spread.tolist()]
    calibration, _ = _split(source, student, "train", chosen).held(scratch / "train.npy")
    pixels, labels = _split(source, student, "val", task.val).held(scratch / "val.npy")

    def accuracy(model: Classifier) -> float:
        return float(classification.metrics(agreement.logits(model, pixels), labels, task.classes)[metric])

    reference = float(classification.metrics(on_val.logits["onnx"], on_val.labels, task.classes)[metric])
    found = quantise.choose(student, folder / ONNX, folder / INT8, calibration, accuracy, reference, say)
    on_val.logits["int8"] = agreement.logits(Classifier(folder / INT8), pixels)
    return found


def _split(source: Source, student: Student, name: str, examples: list[LabelledExample]) -> Split:
    return Split(name, examples, student.preprocess, source.recipe.data.max_pixels)


def _latency(folder: Path, batch: int, names: list[str]) -> dict[str, Any]:
    places = {PYTORCH: folder, "onnx": folder / ONNX, "int8": folder / INT8}
    busy = busy_cores()
    return {
        "batch": batch,
        "busy_cores": busy,
        "models": {name: latency.measure(places[name], batch) for name in (PYTORCH, *names)},
    }


def _parameters(student: Student) -> int:
    return sum(p.numel() for p in student.model.parameters())


def notes(result: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What a person should know of an export, one sentence each; empty where all is as it should be.

    Args:
        result: the run's ``result.json``.
        found: what ``export.json`` holds.
    """
    said = []
    values = found["metric"]
    for split, what in (("val", "validation"), ("test", "test")):
        checked = found["onnx"]["agreement"].get(split)
        if checked and checked["top1_differs"]:
            said.append(
                f"{ONNX} names another class than PyTorch for {checked['top1_differs']} of {checked['images']} {what} "
                f"images, whose first two classes lie at most {checked['widest_margin']:.2g} apart."
            )
        before, now = (result.get("metric") or {}).get(split), (values[split] or {}).get(PYTORCH)
        if before is not None and now and abs(before - now["metric"]) > _SAME:
            said.append(
                f"The PyTorch model has {now['metric']:.1%} on {what} here, and the run found {before:.1%}: its "
                "images, its labels or its weights are not what they were."
            )
        if values[split] and "int8" in values[split]:
            drop = values[split]["onnx"]["metric"] - values[split]["int8"]["metric"]
            if drop > quantise.NOTABLE:
                eight, full = (values[split][name]["metric"] for name in ("int8", "onnx"))
                said.append(
                    f"The 8-bit file loses {100 * drop:.1f} points on {what} ({eight:.1%} for {full:.1%}), more than "
                    f"one: {ONNX} is the better choice unless size or speed decide."
                )
    if found["preprocessing"]["images"]:
        said.append(
            f"predict.py prepares {found['preprocessing']['images']} images otherwise than in training, by at most "
            f"{found['preprocessing']['levels']} of 255 levels."
        )
    for split, what in (("val", "validation"), ("test", "test")):
        if found["unusable"][split]:
            said.append(f"{found['unusable'][split]} {what} images cannot be used and are in no figure.")
    if values["test"] is None:
        said.append("There is no test split, so nothing was checked on one.")
    return said
