"""INDEX: embed the gallery with the frozen teacher, shard by shard, into a folder that grows with it.

The folder (`ktray.retrieval.index_dir`) is ``gallery.index``, or a folder in the store that all galleries of an encoder
share. Shards that it holds already are not embedded again, so a gallery that grows costs only its new shards. An
objective without a teacher draws its images at random, and its index holds only fingerprints. For the objective
``supervised``, the gallery is the labelled generic set.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np

from ktray.data.labelled.labelled_set import LabelledSet
from ktray.data.sources.base import Shard
from ktray.data.sources.lists import gallery_shards
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import cpu_shards, map_shards
from ktray.errors import KtrayError
from ktray.models.teacher.spec import TeacherSpec, Tower, cosine_to_float32, embed_numpy, tower_flops
from ktray.models.teacher.teacher import Teacher, products_on
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
from ktray.stages.shard_summary import PieceSummary, ShardSummary, pairs, whole_shards
from ktray.stages.speed_facts import index_facts
from ktray.storage.columns import Rows
from ktray.storage.store import Stage

logger = logging.getLogger("ktray")

# The reduced decoding of large JPEGs is no version of its own: to those of whole images, embeddings of twelve photos of
# 12 megapixels had cosines of 0.9991 on average, and 0.9945 at least (tests/scale/large_photos.py). A gallery of
# millions need not be embedded again for that.
SHARDS_VERSION = 3  # version of the shards in the folder of an index; 2: captions; 3: shared among galleries, crops
LABELLED_SHARD = 512
BATCH = 256  # images of a forward pass on a GPU
# Lowest accepted cosine similarity between precomputed embeddings and the teacher's: half precision and another JPEG
# decoder change it by a few thousandths; embeddings of another encoder have a similarity near 0.
SAME = 0.95


@dataclass(frozen=True)
class IndexPiece(PieceSummary):
    """The summary of one piece of a shard.

    Attributes:
        part: the part of the index that was written, as `Part.to_json`.
        cosine: `ktray.models.teacher.spec.cosine_to_float32` of some of its images.
    """

    part: Mapping[str, Any] = field(default_factory=dict)
    cosine: tuple[float, ...] = ()


def _write_part(
    folder: IndexDir, item: Item, columns: Rows, embedding: np.ndarray | None, flops: float = 0.0
) -> IndexPiece:
    """Write a piece as a part of its shard."""
    bad, read = pairs(columns.pop("bad").tolist()), int(columns.pop("read")[0])
    if "labels" in item:
        label_of = dict(zip(item["uris"], item["labels"], strict=True))
        columns["label"] = np.array([label_of[uri] for uri in columns["uri"].tolist()], dtype=np.int64)
    number = int(item.get("piece", 0))
    part = folder.write_part(f"{item['name']}-{number:05d}", columns, embedding)
    rows = len(columns["uri"])
    return IndexPiece(item["name"], rows, read, bad, rows, flops, number, item.get("pieces"), part.to_json())


@dataclass(frozen=True)
class _WriteFingerprints:
    folder: IndexDir
    prepare: DecodeGallery

    def __call__(self, item: Item) -> dict[str, Any]:
        pieces = [
            _write_part(self.folder, {**item, "piece": number}, columns, None)
            for number, columns in enumerate(self.prepare(item))
        ]
        return {"several": [replace(piece, pieces=len(pieces)).to_json() for piece in pieces]}


@dataclass(frozen=True)
class EmbedPixels:
    """Computes ``embedding`` (N, D) float16 of unit length, and ``flops`` (1,), from pixels (N, 3, H, W) uint8."""

    spec: TeacherSpec

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> Tower:
        return Tower(self.spec)

    def compute(self, model: Teacher, columns: Rows) -> Rows:
        pixels = columns["pixels"]
        embedding = _unit(embed_numpy(model, pixels, BATCH))
        return {"embedding": embedding, "flops": np.array([tower_flops(model) * len(pixels)])}


@dataclass(frozen=True)
class EmbedGallery(EmbedPixels):
    """Writes the embeddings with the fingerprints into the folder."""

    folder: IndexDir

    def compute(self, model: Teacher, columns: Rows) -> Rows:
        computed = super().compute(model, columns)
        cosine = cosine_to_float32(model, columns["pixels"], computed["embedding"])
        return {**computed, "flops": computed["flops"] + tower_flops(model) * len(cosine), "cosine": cosine}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        embedding = found = computed["embedding"]
        columns = {name: values for name, values in columns.items() if name not in self.reads}
        if "given" in columns:
            embedding = _unit(columns.pop("given").astype(np.float32))
            _check_given(embedding[: len(found)], found, item["source"], self.spec)
        piece = _write_part(self.folder, item, columns, embedding, float(computed["flops"][0]))
        return replace(piece, cosine=tuple(computed["cosine"].tolist())).to_json()


def _unit(embedding: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit: np.ndarray = (embedding / np.maximum(norms, 1e-12)).astype(np.float16)
    return unit


def _check_given(given: np.ndarray, computed: np.ndarray, source: str, spec: TeacherSpec) -> None:
    """Raise `KtrayError` unless precomputed embeddings agree with the teacher's embeddings of the same images."""
    widths = given.shape[1], computed.shape[1]
    cosine = float(np.median((given.astype(np.float32) * computed).sum(1))) if widths[0] == widths[1] else 0.0
    if cosine < SAME:
        raise KtrayError(
            f"'{source}' holds embeddings of another encoder than {spec.source.name}: width {widths[0]} against "
            f"{widths[1]}, median cosine {cosine:.2f} on {len(computed)} of its images",
            "Set teacher.name and teacher.checkpoint to their encoder, or index the images themselves.",
        )


def run(context: RunContext, spec: TeacherSpec | None) -> StageResult:
    """Add the shards of the gallery to the index: ``uri``, ``caption`` (empty without one), ``hash``, ``digest`` and,
    with a teacher, embeddings."""
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
            f"gallery.crops={crops.kind} needs embeddings of crops, and gallery.data has only those of whole images",
            "Set gallery.crops=none, or set gallery.data to the images themselves.",
        )
    return _index(context, spec, shards, items, total, crops)


def run_labelled(context: RunContext, source: LabelledSet) -> StageResult:
    """Index the labelled generic set as a gallery: ``uri``, ``hash``, ``digest`` and ``label`` of all its images."""
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
    """The inputs of INDEX.

    Attributes:
        names: names of the shards, which are hashes of their content.
        facts: everything that the content of a shard in the index depends on: encoder, preprocessing, crops, limits.
        own: the folder in ``gallery.index``; None: a folder in the store.
        classes: classes of the labelled generic set; None for a gallery.
        search: settings of the compressed index; None: exact search, or no encoder to search with.
    """

    stage = "index"
    version = 4  # 2: captions; 3: shards shared among galleries, crops; 4: declared inputs

    names: list[str]
    facts: dict[str, Any]
    own: str | None
    classes: list[str] | None
    search: dict[str, Any] | None
    gallery: Annotated[GalleryConfig, NotInKey("`search`, `facts` and `names` contain the relevant part")]
    encoder: Annotated[TeacherSpec | None, NotInKey("`facts` contains its fingerprint")]
    items: Annotated[list[Item], NotInKey("addresses of the images of `names`")]
    prepare: Annotated[DecodeGallery, NotInKey("reads `items`, with the settings in `facts`")]
    total: Annotated[int | None, NotInKey("number of images in `items`, for the progress line")]
    folder: Annotated[IndexDir, NotInKey("follows from `facts` or `own`")]
    shared: Annotated[str, NotInKey("name of the folder in the store, follows from `facts`")]

    @property
    def speed(self) -> dict[str, Any]:
        return index_facts(self.encoder, self.facts["crops"])


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
    if spec and (products := products_on(context.plan.actor_gpus > 0)) != "fp32":
        facts["products"] = products  # older folders, with embeddings from CPUs, do not name the format
    # Relative to the root of the store, so that a store can be moved.
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
        logger.info(f"index     {problem}; {sources[name]} will be indexed again")
        folder.forget(name)
    if inputs.items:
        folder.begin(digest(names), len(names))
    reporter.expect(inputs.total)
    reporter.shards(ShardSummary(s.shard, s.rows, s.read, s.bad) for s in finished.values())
    if finished and len(finished) < len(names):
        logger.info(f"index     {len(finished):,} of {len(names):,} shards are already in the index")
    todo = [item for item in inputs.items if item["name"] not in finished]
    results = (
        map_shards(todo, inputs.prepare, EmbedGallery(spec, folder), runtime.plan)
        if spec
        else _each(cpu_shards(todo, _WriteFingerprints(folder, inputs.prepare), runtime.plan))
    )
    cosine: list[float] = []
    for shard in _gathered(IndexPiece.each(results), reporter, sources, cosine):
        folder.finish(shard)
        finished[shard.shard] = shard
    folder.copy_summaries(finished)
    folder.end(digest(names))
    listed = [(p.name, p.rows) for name in names for p in finished[name].parts]
    if not sum(rows for _, rows in listed):
        raise KtrayError("The gallery has no usable image", "Check gallery.data and the quarantine list.")
    gallery = Gallery(folder, listed)
    is_compressed = bool(spec) and wanted(inputs.gallery.search, gallery.total)
    more: IndexClasses = {} if inputs.classes is None else {"classes": inputs.classes}
    if cosine:
        logger.info(
            f"index     cosine of embeddings in {inputs.facts['products']} to those in float32, of {len(cosine)} "
            f"images: {np.mean(cosine):.5f} on average, {min(cosine):.5f} at least"
        )
    return {
        "search": compress(inputs.gallery, gallery, runtime.plan) if is_compressed else None,
        "rows": gallery.total,
        "folder": folder.uri if inputs.own else inputs.shared,
        "shards": listed,
        "shard_count": len(names),
        "images": sum(s.read - len(s.bad) for s in finished.values()),
        "cosine_to_float32": [float(np.mean(cosine)), min(cosine)] if cosine else None,
        **more,
    }


def _held(folder: IndexDir, spec: TeacherSpec | None) -> list[str]:
    """Names of all shards of an index that is used without ``gallery.data``."""
    if spec is None:
        raise KtrayError(
            "gallery.index is set without gallery.data, and this objective has no teacher to search it with",
            "Set gallery.data=DIR.",
        )
    whole, broken = folder.shards()
    if broken:
        name, problem = next(iter(broken.items()))
        raise KtrayError(
            f"{len(broken):,} shards of the index '{folder.uri}' are damaged, such as {name}: {problem}",
            "Set gallery.data to the images; ktray then embeds the damaged shards again.",
        )
    if unfinished := folder.unfinished():
        raise KtrayError(
            f"The index '{folder.uri}' is incomplete: a job that adds shards to it is running or was interrupted (the "
            f"index has {len(whole):,} shards; the gallery of that job has {max(unfinished):,})",
            "Let that job finish (jobs/index.py with the same gallery.data continues it), or set gallery.data to the "
            "images.",
        )
    if not whole:
        raise KtrayError(f"There is no index in '{folder.uri}'", "Create one: python jobs/index.py gallery.data=DIR.")
    return sorted(whole)


def _each(several: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for result in several:
        yield from result["several"]


def _gathered(
    pieces: Iterable[IndexPiece], reporter: Reporter, sources: dict[str, str], cosine: list[float]
) -> Iterator[IndexedShard]:
    """Combine pieces into shards; a shard is yielded as soon as its last piece has arrived. The cosines to float32 are
    appended to ``cosine``."""
    for ordered in whole_shards(reporter.counted(pieces)):
        cosine += [one for p in ordered for one in p.cosine]
        yield IndexedShard(
            ordered[0].name,
            tuple(Part.from_json(p.part) for p in ordered),
            sum(p.rows for p in ordered),
            sum(p.read for p in ordered),
            tuple(bad for p in ordered for bad in p.bad),
            sources[ordered[0].name],
        )
