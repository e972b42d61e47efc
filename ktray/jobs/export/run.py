"""jobs/export.py: writes the student of a run as files, and checks, measures, describes and registers them."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ktray import __version__
from ktray.accounting.device import describe_device, versions
from ktray.data.labelled.labelled_set import LabelledSet
from ktray.errors import KtrayError
from ktray.jobs.bench.machine import busy_cores
from ktray.jobs.export import agreement, card, confidence, hub, latency, predict, registry
from ktray.jobs.export.agreement import PYTORCH, AgreementScores, Scorer
from ktray.jobs.export.run_source import find
from ktray.jobs.export.targets.base import ExportTarget, ExportWork, all_targets, serving, wanted_targets
from ktray.models.flops import forward_flops
from ktray.models.student.classifier import Student
from ktray.pipeline.finished_run import FinishedRun
from ktray.recipe.export import ExportConfig
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.progress import Progress
from ktray.reporting.result import SCHEMA, ExportResult, write_result
from ktray.storage.clock import day
from ktray.storage.lease import Lease
from ktray.storage.store import Dir

logger = logging.getLogger("ktray")

VERSION = 3  # 2: temperature; 3: further targets
FOLDER, RESULT = "export", "export.json"
LIBRARIES = ("torch", "timm", "numpy", "pillow")
# On the same images, a metric may differ by this from the run's result (other device, other precision).
_SAME = 0.005


def export(requested: Recipe, debug: bool = False) -> dict[str, Any]:
    """Export a run's student into the run's folder; returns the content of ``export.json``, and ``folder``.

    A second call reuses the export. With other options, on another machine or with other versions, it is written again.

    Raises:
        KtrayError: the run does not exist, its student or images are damaged, the predictions of PyTorch and ONNX
            differ, or MLflow or the hub did not accept the model (then the export is complete).
    """
    source = find(requested)
    part = source.recipe.export
    _require(part)
    served = serving(part)
    if served is None or served not in [target for _, target in wanted_targets(part)]:
        raise KtrayError(
            f"export.serve={part.serve} needs {served.file if served else 'a file'}, which this export does not have",
            f"Set {served.asked_by} as well." if served else "Set export.serve=float.",
        )
    task = source.task()
    key = _key(source, task)
    target = source.folder.sub(FOLDER)
    # One job at a time. The lease is in the run's folder, since everything in the export's own folder is shipped.
    with Lease(source.folder):
        content = _whole(target, key)
        if content is not None:
            logger.info(f"export    reused {target.uri}")
        else:
            with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
                content = _make(source, task, key, Path(scratch))
                target.delete()
                target.put(Path(scratch) / FOLDER)
            content = write_result(target, ExportResult(**content), RESULT)
        with target.local() as folder:
            logged = registry.log(source, folder, content)
        if logged != content.get("mlflow"):
            content = write_result(target, ExportResult(**{**content, "mlflow": logged}), RESULT)
        if source.recipe.export.push:
            with target.local() as folder:
                pushed = hub.push(source.recipe.export, folder, content)
            content = write_result(target, ExportResult(**{**content, "hub": pushed}), RESULT)
    return {**content, "folder": target.uri}


def show(requested: Recipe) -> None:
    """Log the plan: which run would be exported, whether the export exists, and how much would be computed."""
    source = find(requested)
    _require(source.recipe.export)
    task, student, part = source.task(), source.student(), source.recipe.export
    stored = _whole(source.folder.sub(FOLDER), _key(source, task)) is not None
    logger.info(f"run       {source.folder.uri}")
    logger.info(f"student   {student.name}, {_parameters(student):,} parameters, {len(task.classes)} classes")
    logger.info(f"export    {'in the store' if stored else 'to be written'}: {source.folder.uri}/{FOLDER}")
    targets = [target for _, target in wanted_targets(part)]
    passes = len(task.val) + len(task.test) + sum(target.passes(part, task) for target in targets)
    if source.kind.image_classes and any(target.confident(part) for target in targets):
        passes += len(task.val)
    flops = forward_flops(student.model, (3, *student.preprocess.size)) * passes
    more = "".join(target.plan(part) for target in targets)
    logger.info(
        f"          {len(task.val):,} validation and {len(task.test):,} test images{more}: at most {flops / 1e12:.3g} "
        "TFLOP on this machine's processor, and about a minute to measure latencies"
    )
    if part.push:
        logger.info(f"hub       to be uploaded to {part.push}")
    if part.register_as:
        logger.info(f"mlflow    a new version of '{part.register_as}' with the alias '{part.alias}'")


def _require(part: ExportConfig) -> None:
    """Raise `KtrayError` if a requested target does not exist, or its packages are not installed."""
    for _, target in wanted_targets(part):
        target.require()


def _key(source: FinishedRun, task: LabelledSet) -> str:
    part = source.recipe.export
    weights = {
        name: hashlib.sha256(source.folder.read(f"student/{name}")).hexdigest() for name in _student_files(source)
    }
    options = [[name, *target.options(part)] for name, target in wanted_targets(part)] + [part.batch]
    libraries = _libraries(part)
    parts = [VERSION, __version__, weights, source.result, task.fingerprint, options, libraries, describe_device()]
    return digest(FOLDER, parts)


def _student_files(source: FinishedRun) -> list[str]:
    """Return the names of the files of the student, from which `ktray.load_student` loads it."""
    weights = [name for name in source.folder.sub("student").names() if name.endswith(".safetensors")]
    return sorted({"config.json", *weights, *filter(None, [source.kind.student_file])})


def _libraries(part: ExportConfig) -> dict[str, str]:
    """Return the versions of the packages that the files depend on."""
    more = [name for _, target in wanted_targets(part) for name in target.libraries]
    return {name: metadata.version(name) for name in (*more, *LIBRARIES)}


def _whole(target: Dir, key: str) -> dict[str, Any] | None:
    """Return ``export.json`` of an export with this key if all its files exist, otherwise None."""
    try:
        content: dict[str, Any] = target.read_json(RESULT)
        sizes = target.names()
        same = content["key"] == key and all(sizes.get(n) == f["bytes"] for n, f in content["files"].items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if same else None


def _make(source: FinishedRun, task: LabelledSet, key: str, scratch: Path) -> dict[str, Any]:
    folder = scratch / FOLDER
    part, student = source.recipe.export, source.student()
    with source.folder.local("student") as weights:
        folder.mkdir()
        for name in _student_files(source):
            shutil.copyfile(weights / name, folder / name)
    shutil.copyfile(predict.__file__, folder / "predict.py")
    work = ExportWork(source, student, task, folder, scratch)
    targets = wanted_targets(part)
    exact = [(name, target) for name, target in targets if target.exact]
    kind, val, test = source.kind, work.split("val", task.val), work.split("test", task.test)
    if kind.image_classes and any(target.confident(part) for _, target in targets):
        # The images of validation are read twice: some files contain what was fitted on them.
        work.confidence = confidence.fitted(agreement.score(student, kind, {}, val.batches()), part.abstain)
    facts, files = {name: target.write(work) for name, target in exact}, _opened(folder, exact)
    on_val = work.on_val = agreement.score(student, kind, files, val.batches())
    checked = {name: {"val": _checked(on_val, name, target)} for name, target in exact if name in files}
    for name, target in targets:
        if not target.exact:
            facts[name] = target.write(work)
            files |= _opened(folder, [(name, target)])
            on_val.outputs[name] = agreement.outputs(kind, files[name], work.validation.batches())
    values: dict[str, Any] = {
        "name": source.metric,
        "val": agreement.metrics(on_val, source.kind, student, source.metric),
    }
    on_test: AgreementScores | None = None
    if task.test:
        on_test = agreement.score(student, kind, files, test.batches())
        for name, target in exact:
            if name in files:
                checked[name]["test"] = _checked(on_test, name, target)
    values["test"] = agreement.metrics(on_test, source.kind, student, source.metric) if on_test else None
    honesty: dict[str, Any] | None = None
    if source.kind.image_classes:
        honesty = confidence.calibrated(on_val, on_test)
        honesty["files"] = [t.file for _, t in targets if t.calibrate(folder / t.file, honesty["temperature"])]
    logger.info(f"export    latency and memory of {', '.join((PYTORCH, *files))}")
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "key": key,
        "time": time.time(),
        "date": day(),
        "run_id": source.run_id,
        "student": {
            "name": student.name,
            "kwargs": student.kwargs,
            "parameters": _parameters(student),
            "size": list(student.preprocess.size),
            "classes": len(task.classes),
        },
        **{name: facts.get(name) for name, _ in all_targets()},
        **{name: {**facts[name], "agreement": checked.get(name, {})} for name, _ in exact},
        "preprocessing": {
            "levels": max(s.levels for s in (on_val, on_test) if s),
            "images": sum(s.differing for s in (on_val, on_test) if s),
        },
        "metric": values,
        "calibration": honesty,
        "unusable": {"val": val.unusable, "test": test.unusable},
        "latency": _latency(folder, part.batch, [(name, target) for name, target in targets if name in files]),
        "device": describe_device(),
        "versions": {**versions(), **_libraries(part)},
        "mlflow": None,
    }
    content["notes"] = notes(source.result, content)
    content["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    card.write(folder, source, student, task, content)
    text = (folder / "README.md").read_bytes()
    content["files"]["README.md"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    for line in content["notes"]:
        logger.info(f"note      {line}")
    return content


def _opened(folder: Path, targets: list[tuple[str, ExportTarget]]) -> dict[str, Scorer]:
    loaded = {name: target.load(folder / target.file) for name, target in targets}
    return {name: scorer for name, scorer in loaded.items() if scorer is not None}


_ROUNDING_LEVELS = 2  # levels by which resized pixels may differ between versions of Pillow


def _checked(scores: AgreementScores, name: str, target: ExportTarget) -> dict[str, Any]:
    """Compare a file's logits with those of the student; raises KtrayError if they differ by more than rounding."""
    comparison = scores.compared[name]
    try:
        agreement.require(comparison, target.file)
    except KtrayError as error:
        if scores.levels <= _ROUNDING_LEVELS:
            raise
        raise KtrayError(
            f"predict.py prepares {scores.differing} images otherwise than they were prepared for training (by up to "
            f"{scores.levels} of 255 levels), so that {target.file} cannot be compared with the PyTorch model",
            "Report one of these images: the model is not to blame.",
        ) from error
    return comparison


def _latency(folder: Path, batch: int, targets: list[tuple[str, ExportTarget]]) -> dict[str, Any]:
    busy = busy_cores()
    with Progress("export", len(targets) + 1, "model") as progress:
        models = {PYTORCH: latency.measure(folder, batch)}
        progress.update(1)
        for done, (name, target) in enumerate(targets, 2):
            if result := target.latency(folder / target.file, batch):
                models[name] = result
            progress.update(done)
    return {"batch": batch, "busy_cores": busy, "models": models}


def _parameters(student: Student) -> int:
    return sum(p.numel() for p in student.model.parameters())


def notes(result: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Return what a user should know about an export, in one sentence each; empty if everything is as expected.

    Args:
        result: the content of the run's ``result.json``.
        content: the content of ``export.json``.
    """
    sentences: list[str] = []
    values = content["metric"]
    for split, what in (("val", "validation"), ("test", "test")):
        for name, target in all_targets():
            if target.exact:
                sentences += target.notes(name, content, split, what)
        before, now = (result.get("metric") or {}).get(split), (values[split] or {}).get(PYTORCH)
        if before is not None and now and abs(before - now["metric"]) > _SAME:
            sentences.append(
                f"The PyTorch model reaches {now['metric']:.1%} on {what} here, but the result of the run was "
                f"{before:.1%}: its images, its labels or its weights have changed."
            )
        for name, target in all_targets():
            if not target.exact:
                sentences += target.notes(name, content, split, what)
    if content["preprocessing"]["images"]:
        sentences.append(
            f"predict.py prepares {content['preprocessing']['images']} images differently from training, by at most "
            f"{content['preprocessing']['levels']} of 255 levels."
        )
    for split, what in (("val", "validation"), ("test", "test")):
        if content["unusable"][split]:
            sentences.append(f"{content['unusable'][split]} {what} images cannot be used and are not counted.")
    if values["test"] is None:
        sentences.append("There is no test split, so nothing was checked on test images.")
    return sentences
