"""A package outside ktray adds a teacher family and a source of images; no file of ktray knows of either."""

import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from outside import installed, run_job, write_package
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.data.sources.fetch import decode_image, fetch
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.data.sources.uris import ImageRef
from ktray.errors import KtrayError
from ktray.jobs.export import licences
from ktray.models.teacher.load import build_teacher, load_teacher, teacher_fingerprint
from ktray.models.teacher.teacher import TeacherSource
from ktray.recipe.registries import SOURCES, TEACHERS

TEACHER = '''
import torch
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.teacher.families.base import ResolvedTeacher, TeacherFamily, TeacherParts, model_of
from ktray.recipe.registries import TEACHERS

MODELS = {"mean": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}


class Toy(TeacherFamily):
    """Fixed random filters, pooled."""

    syntax = "toy:mean"

    def resolve(self, source):
        if model_of(source.name) not in MODELS:
            raise KtrayError(f"No toy is named '{source.name}'", "Set teacher.name=toy:mean or toy:max.")
        return ResolvedTeacher(source, "toy", model_of(source.name), tag="first")

    def build(self, found, weights, published, device):
        tower = nn.Sequential(nn.Conv2d(3, 24, 5, 2), nn.ReLU(), MODELS[found.model](2), nn.Flatten())
        if published:
            generator = torch.Generator().manual_seed(0)
            for parameter in tower.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        size = found.source.image_size or 32
        return TeacherParts(tower, Preprocess((size, size), (0.5,) * 3, (0.25,) * 3), 96)

    def licence(self, model):
        return "public domain"


TEACHERS.register("toy")(Toy())
'''

SOURCE = '''
import zipfile
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ktray.data.sources.base import Shard, Source, fingerprint
from ktray.data.sources.records import ImageRecord
from ktray.data.sources.uris import ImageRef
from ktray.recipe.registries import SOURCES


@dataclass(frozen=True, kw_only=True)
class Entry(ImageRef):
    entry: str
    kind: ClassVar[str] = "zip"

    @property
    def fragment(self):
        return f"entry={self.entry}"


class Zip(Source):
    """Zip archives of images."""

    noun, accepts, pattern = "zip archives", ".zip archives", "*.zip"

    def fits(self, path):
        return path.endswith(".zip")

    def shards(self, files, cut):
        return [Shard("zip", (file.path,), fingerprint([file]), len(names(file.path))) for file in files]

    def read(self, shard):
        for name in names(shard.paths[0]):
            ref = Entry(shard.paths[0], entry=name)
            yield ImageRecord(str(ref), *content([ref])[ref][:1])

    def parse(self, uri):
        path, mark, entry = uri.partition(".zip#entry=")
        return Entry(path + ".zip", entry=entry) if mark else None

    def fetch(self, path, refs):
        return [partial(content, refs)]


def names(path):
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def content(refs):
    with zipfile.ZipFile(refs[0].path) as archive:
        return {ref: (archive.read(ref.entry), None) for ref in refs}


SOURCES.register("zip")(Zip())
'''

POINTS = {"ktray.teachers": {"toy": "toyplaces.teacher"}, "ktray.sources": {"zip": "toyplaces.source"}}


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    return write_package(tmp_path / "site", "toyplaces", {"teacher.py": TEACHER, "source.py": SOURCE}, POINTS)


def write_zip(folder: Path, count: int) -> Path:
    path = folder / "gallery.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(write_gallery(folder / "unpacked", count).iterdir()):
            archive.write(file, f"deep/{file.name}")
    return path


@pytest.mark.long
def test_the_whole_job_runs_with_both(toys: Path, tmp_path: Path) -> None:
    task, gallery, store = write_task(tmp_path / "task"), write_zip(tmp_path, 90), tmp_path / "store"
    data = [f"store={store}", *SMALL, f"task.data={task}", f"gallery.data={gallery}", "teacher.name=toy:mean"]
    more = ["train.steps=8", "baselines.scratch=false"]
    planned = run_job("distill", ["--plan", *data, *more], [toys])
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert "90 gallery images" in planned.stdout
    done = run_job("distill", [*data, *more], [toys])
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (store / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["teacher"] == "toy:mean"
    assert result["transfer_set"]["kept"] == 60
    (chosen,) = (store / "stages/curate").glob("*/transfer.parquet")
    uris = pq.read_table(chosen, columns=["uri"]).column("uri").to_pylist()
    assert len(uris) == 60
    assert all(uri.startswith(f"{gallery}#entry=deep/") for uri in uris)
    crash = run_job("distill", [*data, *more], [])  # its package is gone
    assert crash.returncode != 0
    assert "has an unsupported file type" in crash.stderr + crash.stdout


def test_an_outside_family_is_like_the_built_in_ones(toys: Path) -> None:
    with installed(toys, TEACHERS):
        teacher = load_teacher("toy:mean")
        batch = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
        assert teacher.embed(batch).shape == (2, 96)
        assert teacher.embed(batch).std() > 0
        assert (teacher.has_text, teacher.patch_dim, teacher.preprocess.size) == (False, None, (32, 32))
        assert teacher.fingerprint == teacher_fingerprint("toy:mean")
        assert len({teacher.fingerprint, teacher_fingerprint("toy:max"), teacher_fingerprint("miniverse")}) == 3
        assert load_teacher("toy:mean", image_size=48).preprocess.size == (48, 48)
        assert next(build_teacher(TeacherSource("toy:max"), "meta").parameters()).is_meta
        assert [len(layer) for layer in teacher.blocks()] == [2]
        recipe = recipes.override(recipes.Recipe(), {"teacher.name": "toy:mean"})
        assert licences.of_teacher(recipe) == "public domain"
        with pytest.raises(KtrayError, match="No toy is named 'toy:median'"):
            load_teacher("toy:median")
        with pytest.raises(KtrayError, match=r"has no patch embeddings"):
            teacher.patch_embeddings(batch)
        with pytest.raises(KtrayError, match="or toy:mean;"):
            load_teacher("nothing")
    with pytest.raises(KtrayError, match="'toy:mean' is not the name of a teacher"):
        load_teacher("toy:mean")
    assert licences.of_teacher(recipe) == "unknown: check"


def test_an_outside_source_is_like_the_built_in_ones(toys: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path, 5)
    loose = tmp_path / "unpacked"
    with installed(toys, SOURCES):
        shards = gallery_shards([str(path), str(loose)], "auto", None)
        assert [(s.kind, s.count) for s in shards] == [("files", 5), ("zip", 5)]
        records = list(read_shard(shards[1]))
        assert [r.data for r in records] == [file.read_bytes() for file in sorted(loose.iterdir())]
        uri = records[3].uri
        crop = str(ImageRef.parse(uri).crop((1, 2, 20, 30)))
        assert crop == f"{uri}&xywh=1,2,20,30"
        for name, data, error in fetch([crop, str(loose / "0000.jpg"), uri]):
            assert decode_image(name, data, error, max_pixels=10_000).shape == (
                (30, 20, 3) if name == crop else (40, 36, 3)
            )
        with pytest.raises(KtrayError, match=r"contains 5 image files and 1 zip archives.*\*\*/\*\.zip"):
            gallery_shards(str(tmp_path), "auto", None)
        with pytest.raises(KtrayError, match=r"\.parquet files.* \.zip archives"):
            gallery_shards(str(toys / "toyplaces" / "source.py"), "auto", None)
    with pytest.raises(KtrayError, match="unsupported file type"):
        gallery_shards(str(path), "auto", None)
    assert ImageRef.parse(uri) == ImageRef(uri)
