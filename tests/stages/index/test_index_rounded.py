"""What INDEX tells about embeddings that a GPU computes in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktray.data.decode import MAX_PIXELS
from ktray.distributed.device_work import in_this_process
from ktray.models.teacher.families.base import TeacherSource
from ktray.models.teacher.spec import TeacherSpec, tower_flops
from ktray.retrieval.crops import Crops
from ktray.retrieval.index_dir import IndexDir
from ktray.stages.index.decode import DecodeGallery
from ktray.stages.index.stage import EmbedGallery, IndexPiece


@pytest.mark.parametrize("rounded", [False, True])
def test_a_piece_has_the_cosines_of_its_first_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounded: bool
) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32)).save(path)
    spec = TeacherSpec.of(TeacherSource("miniverse"))
    if rounded:
        monkeypatch.setattr("ktray.models.teacher.teacher.products_on", lambda gpu: "bf16")
    item = {"name": "x", "source": "here", "uris": [str(path) for path in paths]}
    (columns,) = DecodeGallery([], spec.preprocess, Crops(), MAX_PIXELS)(item)
    work = EmbedGallery(spec, IndexDir(str(tmp_path / "index")))
    tower = spec.tower()
    piece = IndexPiece.from_json(in_this_process(work, tower)(item, columns))
    assert piece.rows == 40
    assert len(piece.cosine) == (32 if rounded else 0)
    assert piece.flops == tower_flops(tower) * (40 + len(piece.cosine)), "the comparison is counted"
    assert all(0.99 < one < 1 for one in piece.cosine)
