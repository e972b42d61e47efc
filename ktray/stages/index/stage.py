"""INDEX: embed the gallery with the frozen teacher, shard by shard, into a folder that grows with it.

The folder (`ktray.retrieval.index_dir`) is ``gallery.index``, or one in the store that all galleries of an encoder
share. What it holds already is not embedded again: a gallery that grows costs its new shards. A way of pretraining that
has no teacher draws its images at random, so that its index holds fingerprints alone. For ``supervised`` the gallery is
the labelled generic set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np

from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.base import Shard
from ktray.data.sources.lists import gallery_shards
from ktray.distributed.ray_data import Item, cpu_shards, map_shards
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec, embed_numpy, tower_flops
from ktray.recipe.schema import GalleryConfig, index_alone
from ktray.recipe.section import digest
from ktray.retrieval.crops import Crops
from ktray.retrieval.index_dir import IndexDir, IndexedShard, Part
from ktray.stages.base import Reporter, RunContext, Runtime, StageResult, run_stage
from ktray.stages.index.compress import compress, wanted
from ktray.stages.index.decode import DecodeGallery
from ktray.stages.index.gallery import Gallery
from ktray.stages.inputs import NotInKey, StageInputs
from ktray.stages.manifests import IndexClasses, IndexManifest
from ktray.stages.shard_summary import ShardSummary, pairs
from ktray.storage.columns import Rows
from ktray.storage.store import Stage

logger = logging.getLogger("ktray")

SHARDS_VERSION = 3  # of the shards in a gallery's folder; 2: captions; 3: shared among galleries, crops
LABELLED_SHARD = 512
# The least cosine of embeddings that others have made with the teacher's own: half precision and another JPEG decoder
# cost some thousandths, another encoder has nothing in common.
SAME = 0.95


@dataclass(frozen=True)
class IndexPiece(ShardSummary):
    """A piece of a shard: its accounts are of this piece alone, ``name`` is the shard's.

    Attributes:
        piece: its number.
        pieces: how many the shard has; None where this one is not the last.
        part: what was written, as `Part.to_json`.
    """

    piece: int = 0
    pieces: int | None = None
    part: Mapping[str, Any] = field(default_factory=dict)


def _write_part(
    folder: IndexDir, item: Item, columns: Rows, embedding: np.ndarray | None, flops: float = 0.0
) -> IndexPiece:
    """Write a piece as a part of its shard."""
    bad, read = pairs(columns.pop("bad").tolist()), int(columns.pop("read")[0])
    if "labels" in item:
        known = dict(zip(item["uris"], item["labels"], strict=True))
        columns["label"] = np.array([known[uri] for uri in columns["uri"].tolist()], dtype=np.int64)
    number = int(item.get("piece", 0))
    part = folder.write_part(f"{item['name']}-{number:05d}", columns, embedding)
    rows = len(columns["uri"])
    return IndexPiece(item["name"], rows, read, bad, rows, flops, number, item.get("pieces"), part.to_json())


@dataclass(frozen=True)
class _WriteFingerprints:
    folder: IndexDir
    prepare: DecodeGallery

    def __call__(self, item: Item) -> dict[str, Any]:
        made = [
            _write_part(self.folder, {**item, "piece": number}, columns, None)
            for number, columns in enumerate(self.prepare(item))
        ]
        return {"several": [replace(piece, pieces=len(made)).to_json() for piece in made]}


class _EmbedGallery:
    """The device half: pixels to unit-length fp16 embeddings."""

    def __init__(self, plan: MakeEmbedGallery) -> None:
        self.plan, self.model = plan, plan.spec.tower()
        self.flops = tower_flops(self.model)

    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]:
        embedding = made = unit_embedding(self.model, columns.pop("pixels"), self.plan.batch)
        if "given" in columns:
            embedding = _unit(columns.pop("given").astype(np.float32))
            _check_given(embedding[: len(made)], made, item["source"], self.plan.spec)
        return _write_part(self.plan.folder, item, columns, embedding, self.flops * len(made)).to_json()


@dataclass(frozen=True)
class MakeEmbedGallery:
    """Makes the device half of INDEX where it runs: embeddings and fingerprints into the folder."""

    folder: IndexDir
    spec: TeacherSpec
    batch: int = 256

    def __call__(self) -> _EmbedGallery:
        return _EmbedGallery(self)


def unit_embedding(model: Any, pixels: np.ndarray, batch: int) -> np.ndarray:
    """(N, 3, H, W) uint8 to (N, D) float16 of unit length."""
    return _unit(embed_numpy(model, pixels, batch))


def _unit(embedding: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit: np.ndarray = (embedding / np.maximum(norms, 1e-12)).astype(np.float16)
    return unit


def _check_given(given: np.ndarray, made: np.ndarray, source: str, spec: TeacherSpec) -> None:
    """Raises `KtrayError` unless the teacher finds the embeddings that others have made of the same images."""
    widths = given.shape[1], made.shape[1]
    cosine = float(np.median((given.astype(np.float32) * made).sum(1))) if widths[0] == widths[1] else 0.0
    if cosine < SAME:
        raise KtrayError(
            f"'{source}' holds embeddings of another encoder than {spec.source.name}: width {widths[0]} against "
            f"{widths[1]}, median cosine {cosine:.2f} on {len(made)} of its images",
            "Name the teacher that made them (teacher.name, teacher.checkpoint), or index the images themselves.",
        )


def run(context: RunContext, spec: TeacherSpec | None) -> StageResult:
    """The gallery's shards in the index: ``uri``, ``caption`` (or empty), ``hash``, ``digest`` and, with a teacher,
    embeddings of the whole gallery."""
    part = context.recipe.gallery
    if index_alone(context.recipe):
        return _index(context, spec, [], None, None, Crops(part.crops, part.crop_count))
    shards = gallery_shards(part.data, part.column, context.recipe.transfer.list, part.images)
    items = [{"shard": i, "name": s.fingerprint, "source": s.paths[0]} for i, s in enumerate(shards)]
    counts = [s.count for s in shards]
    total = sum(c or 0 for c in counts) if None not in counts else None
    crops = Crops(part.crops, part.crop_count) if spec else Crops()
    if crops.kind != "none" and any(s.source.has_embeddings for s in shards):
        raise KtrayError(
            f"gallery.crops={crops.kind} needs crops embedded, and gallery.data has embeddings of whole images",
            "Set gallery.crops=none, or name the images themselves.",
        )
    return _index(context, spec, shards, items, total, crops)


def run_labelled(context: RunContext, source: LabelledSet) -> StageResult:
    """The labelled generic set as a gallery: ``uri``, ``hash``, ``digest`` and ``label`` of all its images."""
    examples = [*source.train, *source.val, *source.test]
    items: list[Item] = []
    for i in range(0, len(examples), LABELLED_SHARD):
        part = examples[i : i + LABELLED_SHARD]
        uris, labels = [e.uri for e in part], [e.label for e in part]
        name = digest("labelled", [source.fingerprint, i, uris, labels])
        items.append({"name": name, "source": uris[0], "uris": uris, "labels": labels})
    return _index(context, None, [], items, len(examples), Crops(), source.classes)


@dataclass(frozen=True)
class IndexInputs(StageInputs):
    """What INDEX reads.

    Attributes:
        names: of the shards, which are hashes of what is in them.
        facts: by what shards are made: encoder, preprocessing, crops, limits.
        own: the folder that the user names, where it is not one in the store.
        classes: of the labelled generic set; None for a gallery.
        search: how the gallery will be searched; None where there is nothing to search with.
    """

    stage = "index"
    version = 4  # 2: captions; 3: shards shared among galleries, crops; 4: declared inputs

    names: list[str]
    facts: dict[str, Any]
    own: str | None
    classes: list[str] | None
    search: dict[str, Any] | None
    gallery: Annotated[GalleryConfig, NotInKey("what of it counts stands in `search`, `facts` and `names`")]
    encoder: Annotated[TeacherSpec | None, NotInKey("its fingerprint stands in `facts`")]
    items: Annotated[list[Item], NotInKey("where the images of `names` are")]
    prepare: Annotated[DecodeGallery, NotInKey("reads `items` as `facts` say")]
    total: Annotated[int | None, NotInKey("images of `items`, for the progress line")]
    folder: Annotated[IndexDir, NotInKey("named by `facts`, or `own`")]
    shared: Annotated[str, NotInKey("the folder's name in the store, by `facts`")]


def _index(
    context: RunContext,
    spec: TeacherSpec | None,
    shards: list[Shard],
    items: list[Item] | None,
    total: int | None,
    crops: Crops,
    classes: list[str] | None = None,
) -> StageResult:
    recipe, g = context.recipe, context.recipe.gallery
    facts = {
        "teacher": spec.source.name if spec else None,
        "encoder": spec.fingerprint if spec else None,
        "preprocess": spec.preprocess.to_dict() if spec else None,
        "crops": [crops.kind, crops.count] if crops.kind != "none" else None,
        "max_pixels": recipe.data.max_pixels,
    }
    # Named from the store's root, so that a store can be moved.
    shared = f"galleries/{digest('gallery', [SHARDS_VERSION, facts])}"
    own = g.index if spec else None
    folder = IndexDir(own or f"{context.store.uri}/{shared}")
    if items is None:
        names, items = _held(folder, spec), []
    else:
        names = [str(item["name"]) for item in items]

    def whole(manifest: dict[str, Any]) -> bool:
        return len(folder.shards(names)[0]) == len(names)

    if g.verify and context.runtime.planned is None:
        for shard in folder.shards(names)[0].values():
            for part in shard.parts:
                folder.check(part)
    compressed = {"search": g.search, "factory": g.factory, "search_gb": g.search_gb, "recall": g.recall}
    inputs = IndexInputs(
        names=names,
        facts=facts,
        own=own,
        classes=classes,
        search=compressed if spec and g.search != "exact" else None,
        gallery=g,
        encoder=spec,
        items=items,
        prepare=DecodeGallery(shards, spec.preprocess if spec else None, crops, recipe.data.max_pixels),
        total=total,
        folder=folder,
        shared=shared,
    )
    return run_stage(context.runtime, inputs, work, whole=whole)


def work(inputs: IndexInputs, runtime: Runtime, stage: Stage, reporter: Reporter) -> IndexManifest:
    folder, names, spec = inputs.folder, inputs.names, inputs.encoder
    folder.settle(inputs.facts)
    finished, broken = folder.shards(names)
    sources = {str(item["name"]): item["source"] for item in inputs.items}
    for name, problem in broken.items():
        logger.info(f"index     {problem}: {sources[name]} is indexed again")
        folder.forget(name)
    if inputs.items:
        folder.begin(digest(names), len(names))
    reporter.expect(inputs.total)
    reporter.shards(ShardSummary(s.shard, s.rows, s.read, s.bad) for s in finished.values())
    if finished and len(finished) < len(names):
        logger.info(f"index     {len(finished):,} of {len(names):,} shards are there")
    todo = [item for item in inputs.items if item["name"] not in finished]
    found = (
        map_shards(todo, inputs.prepare, MakeEmbedGallery(folder, spec), runtime.plan)
        if spec
        else _each(cpu_shards(todo, _WriteFingerprints(folder, inputs.prepare), runtime.plan))
    )
    for shard in _gathered(IndexPiece.each(found), reporter, sources):
        folder.finish(shard)
        finished[shard.shard] = shard
    folder.copy_summaries()
    folder.end(digest(names))
    listed = [(p.name, p.rows) for name in names for p in finished[name].parts]
    if not sum(rows for _, rows in listed):
        raise KtrayError("The gallery has no usable image", "Check gallery.data and the quarantine list.")
    gallery = Gallery(folder, listed)
    shrunk = bool(spec) and wanted(inputs.gallery.search, gallery.total)
    more: IndexClasses = {} if inputs.classes is None else {"classes": inputs.classes}
    return {
        "search": compress(inputs.gallery, gallery, runtime.plan) if shrunk else None,
        "rows": gallery.total,
        "folder": folder.uri if inputs.own else inputs.shared,
        "shards": listed,
        "shard_count": len(names),
        "images": sum(s.read - len(s.bad) for s in finished.values()),
        **more,
    }


def _held(folder: IndexDir, spec: TeacherSpec | None) -> list[str]:
    """All shards of an index that is the gallery."""
    if spec is None:
        raise KtrayError(
            "gallery.index is set without gallery.data, and this way of pretraining has no teacher to read it with",
            "Set gallery.data=DIR.",
        )
    whole, broken = folder.shards()
    if broken:
        name, problem = next(iter(broken.items()))
        raise KtrayError(
            f"{len(broken):,} shards of '{folder.uri}' are broken; of {name}: {problem}",
            "Name the images with gallery.data: what is broken is then embedded again.",
        )
    if unfinished := folder.unfinished():
        raise KtrayError(
            f"'{folder.uri}' is not whole: a job that adds shards to it works or was interrupted ({len(whole):,} are "
            f"there, and it alone has {max(unfinished):,})",
            "Run that job to its end (jobs/index.py with the same gallery.data goes on where it was), or name the "
            "images with gallery.data.",
        )
    if not whole:
        raise KtrayError(f"'{folder.uri}' holds no index", "Make one: python jobs/index.py gallery.data=DIR.")
    return sorted(whole)


def _each(several: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in several:
        yield from one["several"]


def _gathered(pieces: Iterable[IndexPiece], reporter: Reporter, sources: dict[str, str]) -> Iterator[IndexedShard]:
    """Pieces to shards, each as soon as its last piece is there."""
    open_: dict[str, dict[int, IndexPiece]] = {}
    for piece in pieces:
        reporter.shards([piece])
        mine = open_.setdefault(piece.name, {})
        mine[piece.piece] = piece
        of = next((p.pieces for p in mine.values() if p.pieces), None)
        if of == len(mine):
            ordered = [mine[number] for number in sorted(open_.pop(piece.name))]
            yield IndexedShard(
                piece.name,
                tuple(Part.from_json(p.part) for p in ordered),
                sum(p.rows for p in ordered),
                sum(p.read for p in ordered),
                tuple(bad for p in ordered for bad in p.bad),
                sources[piece.name],
            )
