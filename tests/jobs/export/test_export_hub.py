"""An export on a hub on the loopback, which timm and transformers load from there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from fake_hub import COMMIT, FakeHub, fake_hub
from pydantic import ValidationError

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.jobs.export import hub as module
from ktray.jobs.export.run import export
from ktray.models.student.classifier import Student
from ktray.models.student.classifier_io import save_student
from ktray.recipe.export import ExportConfig

CONTENT: dict[str, Any] = {"student": {"name": "test_resnet"}, "run_id": "run-1"}
CARD = "---\nlicense: unknown\nlibrary_name: timm\npipeline_tag: image-classification\n---\n\n# Stripes\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with fake_hub(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(student: Student, tmp_path: Path) -> Path:
    place = tmp_path / "export"
    save_student(student, place, student.classes)
    (place / "README.md").write_text(CARD)
    (place / "export.json").write_text("{}")
    return place


def test_all_files_are_in_one_commit_with_the_card(hub: FakeHub, folder: Path) -> None:
    done = module.push(ExportConfig(push="me/stripes"), folder, CONTENT)
    assert done == {
        "repository": "me/stripes", "revision": "main", "commit": COMMIT, "url": f"{hub.endpoint}/me/stripes",
    }  # fmt: skip
    files = hub.files["models/me/stripes"]
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.uploads == ["test_resnet, run run-1, exported by ktray"]
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["library_name"] == "timm"
    assert "POST /api/repos/create" in hub.asked


def test_timm_loads_it_from_the_hub(hub: FakeHub, folder: Path, student: Student) -> None:
    module.push(ExportConfig(push="me/stripes"), folder, CONTENT)
    model = timm.create_model("hf-hub:me/stripes", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == student.classes
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), student(x))


def test_transformers_loads_the_folder(folder: Path, student: Student) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert [model.config.id2label[i] for i in range(3)] == student.classes
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(x).logits, student(x))


def test_without_a_token_or_with_a_wrong_one(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reads_only")
    with pytest.raises(KtrayError, match=r"is written, but not uploaded to me/stripes.*Set HF_TOKEN") as raised:
        module.push(ExportConfig(push="me/stripes"), folder, CONTENT)
    assert "hf_reads_only" not in str(raised.value)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(KtrayError, match=r"there is no token\. Set HF_TOKEN"):
        module.push(ExportConfig(push="me/stripes"), folder, CONTENT)
    assert "models/me/stripes" not in hub.files


def test_a_hub_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KtrayError, match=r"not uploaded to me/stripes: .*Check the network and HF_ENDPOINT"):
        module.push(ExportConfig(push="me/stripes"), folder, CONTENT)


@pytest.mark.parametrize("name", ["stripes", "me/stripes/more", "https://hub/me/x", "../x", "me/"])
def test_what_is_not_a_repository(name: str) -> None:
    with pytest.raises(ValidationError, match="push"):
        ExportConfig(push=name)


def test_the_folder_needs_nothing_of_ktray(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """What arrives is enough for timm: a copy in another place, with the files of the repository only."""
    module.push(ExportConfig(push="me/stripes"), folder, CONTENT)
    shutil.rmtree(folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in hub.files["models/me/stripes"].items():
        (copy / name).write_bytes(data)
    assert timm.create_model(f"local-dir:{copy}", pretrained=True).num_classes == 3


@pytest.mark.slow
def test_the_job_pushes_what_it_wrote_and_a_second_call_pushes_it_again(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"store={run.parents[1]}", f"export.run={run.name}", "export.push=me/stripes"]
    content = export(recipes.load(None, overrides))
    assert content["hub"]["commit"] == COMMIT
    files = hub.files["models/me/stripes"]
    assert {"README.md", "config.json", "model.safetensors", "student.onnx", "predict.py", "export.json"} <= set(files)
    assert files["README.md"] == (run / "export" / "README.md").read_bytes()
    assert "hf-hub:ORG/NAME" in files["README.md"].decode()
    text = (run / "export" / "export.json").read_text() + (run / "recipe.yaml").read_text()
    assert "hf_test" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_reads_only")
    with pytest.raises(KtrayError, match="The export is written, but not uploaded"):
        export(recipes.load(None, overrides))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert export(recipes.load(None, overrides))["hub"] == content["hub"]
    assert len(hub.uploads) >= 1
