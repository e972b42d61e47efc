"""The recipe: one typed description of a run, from the command line to the run folder.

A value of ``auto`` (or null) is decided from the data and the machine by `ktray.pipeline.resolve`, printed with its
reason, and written to the run folder's ``recipe.yaml``, which runs again as ``--recipe FILE``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, NonNegativeInt, ValidationError

from ktray.errors import KtrayError
from ktray.recipe.cluster import Cluster, MLflow
from ktray.recipe.compare import Bench, Compare, Part
from ktray.recipe.export import Export
from ktray.recipe.tune import Budget, Tune
from ktray.redact import credential_in

RECIPES = Path(__file__).parent / "builtin"
DEFAULT = "letters"


class Task(Part):
    name: str | None = Field(None, description="a built-in task (letters, digits, ...); ignored when task.data is set")
    data: str | None = Field(
        None,
        description="labelled images: folder with train/ val/ test/, folder of class folders, or CSV/Parquet list; for "
        "segmentation train/images + train/masks (and val, test) + classes.txt",
    )
    kind: Literal["classification", "segmentation"] = Field("classification", description="what is predicted")
    metric: Literal["auto", "top1", "mean_class_accuracy", "miou"] = Field(
        "auto", description="what models are chosen by and judged on; auto: top1, or miou for segmentation"
    )
    labels_per_class: int | None = Field(None, ge=1, description="label budget per class; null uses all of train")
    labels: int | None = Field(None, ge=1, description="label budget in images, for segmentation; null uses all")
    layout: Literal["auto", "imagenet", "places365", "ham10k", "eurosat", "ade20k"] = Field(
        "auto", description="how a published data set lies in task.data; auto recognises it when task.splits is set"
    )
    splits: str | None = Field(None, description="folder of split lists (file,class lines) for task.data")
    train_list: str | None = Field(None, description="train list in task.splits, such as train_1percent")
    split_seed: int = Field(0, description="seed that draws splits and the label budget")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share split off for validation where there is none")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share split off for test where there is none")
    prompts: list[str] | None = Field(
        None, description="templates with {} for the text head; null: the task's own or ktray's"
    )


class Gallery(Part):
    data: list[str] | str | None = Field(
        None,
        description="unlabelled images: folder, tar shards, Parquet or CSV; local or s3://; one or a list",
    )
    column: str = Field("auto", description="column of a Parquet gallery with image bytes or paths")
    images: list[str] | str | None = Field(
        None,
        description="for a folder of clip-retrieval's embeddings in gallery.data: where its images lie, the folder "
        "that relative paths start at or the tar shards that hold its keys",
    )
    index: str | None = Field(
        None,
        description="folder of the embedded gallery, kept and extended there, local or s3://; without gallery.data all "
        "that it holds is the gallery; null: in the store, by encoder",
    )
    crops: Literal["none", "grid", "random"] = Field(
        "none", description="parts of an image that are candidates beside the whole"
    )
    crop_count: int = Field(4, ge=1, le=64, description="crops an image; of a grid a square number")
    search: Literal["auto", "exact", "compressed"] = Field(
        "auto", description="how the index is searched; auto: exactly up to 100 million rows"
    )
    factory: str | None = Field(
        None, description="FAISS's factory string of the compressed index; null: from its rows and gallery.search_gb"
    )
    search_gb: float = Field(8.0, gt=0, description="memory for the codes of the compressed index, GB")
    recall: float = Field(0.95, gt=0, le=1, description="share of the true nearest that compressed search is to find")
    verify: bool = Field(False, description="compare the index with its checksums before it is used")


class Data(Part):
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unusable images above which a stage fails")
    max_pixels: int = Field(178_956_970, ge=1, description="largest image that is decoded, pixels")


class Finetuning(Part):
    """Finetuning of the teacher's tower (teacher.adapt=finetune|auto)."""

    steps: int = Field(150, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="images a step, over all workers")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of the last layers")
    head_lr: float = Field(1e-3, gt=0, description="peak learning rate of the head")
    layer_decay: float = Field(0.75, gt=0, le=1, description="factor on the learning rate per block below the head")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the averaged weights; 0 switches it off")


class Teacher(Part):
    name: str | None = Field(
        None,
        description="open_clip:<model>[/<pretrained>], timm:<model>, or miniverse; null: published for own data",
    )
    checkpoint: str | None = Field(None, description="weights file (safetensors or weights-only .pt), local or s3://")
    config: str | None = Field(None, description="open_clip model config (JSON) for a model of your own")
    image_size: int | None = Field(
        None, description="input size in pixels other than the model's own (position embeddings are resampled)", ge=16
    )
    levels: int = Field(
        1, ge=1, description="segmentation: last blocks (or stages, where they differ in size) that its head reads"
    )
    adapt: Literal["probe", "finetune", "text", "auto"] = Field(
        "auto", description="how the task is taught to the teacher; auto takes the best on validation"
    )
    candidates: list[Literal["text", "probe", "finetune"]] = Field(
        ["text", "probe", "finetune"],
        description="what adapt=auto tries (text only where the teacher has a text tower)",
    )
    finetune: Finetuning = Finetuning()


class Student(Part):
    name: str | None = Field(None, description="any timm model; null: chosen by image size and device")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of timm.create_model")
    checkpoint: str | None = Field(None, description="weights to start from (safetensors or weights-only .pt)")
    head: Literal["lraspp", "deeplabv3"] = Field("lraspp", description="segmentation head on the timm model's maps")
    pretrained: bool = Field(False, description="start from timm's published weights (needs a network)")


class Transfer(Part):
    source: Literal["auto", "none", "generic", "target", "retrieved", "list"] = Field(
        "auto",
        description="where the transfer set comes from; auto: retrieved when there is a gallery, else target",
    )
    strategy: Literal["query_balanced", "class_balanced", "best_first", "diverse", "informative"] = Field(
        "query_balanced", description="which of the images that the queries find are taken"
    )
    size: int | None = Field(None, ge=1, description="images in the transfer set; null: from gallery and machine")
    queries: Literal["images", "text", "both"] = Field(
        "images", description="what is looked for: the labelled images, the classes' names in the prompts, or both"
    )
    per: Literal["query", "class"] = Field(
        "query", description="class: a class's queries are averaged, so that the classes bring equal shares"
    )
    query_crops: Literal["none", "grid", "random"] = Field(
        "none", description="parts of the labelled images that are queries too, gallery.crop_count an image"
    )
    dedup_similarity: float = Field(
        0.85, gt=0, le=1, description="cosine to a held-out image from which the pixels are compared too"
    )
    repeat_similarity: float | None = Field(
        0.95, gt=0, le=1, description="the same within the transfer set; null keeps images that show the same"
    )
    list: str | None = Field(
        None, description="source=list: Parquet, CSV or text file of the images' paths or uris, local or s3://"
    )
    seed: int = Field(0, description="seed of source=generic")


class Supervised(Part):
    data: str | None = Field(
        None, description="labelled generic images for objective.name=supervised; forms as for task.data"
    )


class Teach(Part):
    mode: Literal["auto", "cached", "streamed", "live"] = Field(
        "auto",
        description="cached: the teacher's outputs are computed once and stored; streamed: teachers beside the "
        "training compute them each time; live: the training worker does; auto: by what each costs",
    )
    views: int = Field(4, ge=1, description="augmented views per image")
    top_k: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="largest logits that are kept of each view, beside the mass of the rest; 0: all of them; auto: all "
        "of up to 2000 classes, else 200",
    )
    jpeg: int | None = Field(
        None,
        ge=1,
        le=100,
        description="quality at which views are stored as JPEG, for a fraction of the space; null: stored as they are",
    )
    crop_min: float = Field(0.5, gt=0, le=1, description="smallest crop, share of the image's area")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    jitter: float = Field(0.2, ge=0, lt=1, description="strength of brightness, contrast and saturation changes")
    seed: int = Field(0, description="seed of the views")


class Objective(Part):
    name: Literal["oriented", "dual", "agnostic", "agnostic_then_oriented", "clip", "supervised", "dino", "scratch"] = (
        Field("oriented", description="way of pretraining")
    )
    match: Literal["cosine", "mse", "contrastive"] = Field(
        "cosine", description="agnostic: how the teacher's features are matched"
    )
    patches: float = Field(0.0, ge=0, description="agnostic: weight of the patch features; 0 matches the pooled alone")
    generic_share: float = Field(
        0.5, gt=0, lt=1, description="agnostic_then_oriented: share of the steps that go to the generic part"
    )
    label_weight: float = Field(0.5, gt=0, lt=1, description="dual: weight of the labels' loss beside the teacher's")
    mix: float = Field(0.5, ge=0, le=1, description="dual: share of the label head in the student's predictions")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="supervised: smoothing of the generic labels")
    prototypes: int = Field(1024, ge=2, description="dino: outputs of the projection head")
    local_crops: int = Field(6, ge=0, description="dino: small crops beside the two large ones")
    temperature: float = Field(1.0, gt=0, description="softens both predictions, on top of the fitted temperature")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup on images and targets; 0 switches it off")


class Train(Part):
    """Pretraining on the transfer set (and the scratch floor)."""

    epochs: float | None = Field(None, gt=0, description="passes over the transfer set; null: from train.steps")
    steps: int | None = Field(None, ge=1, description="optimizer steps; wins over train.epochs; null: from the data")
    batch_size: int | None = Field(None, ge=1, description="images a step, over all workers; null: from the device")
    lr: float = Field(2e-3, gt=0, description="peak learning rate (AdamW, linear warm-up, cosine)")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with rising learning rate")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the averaged weights; 0 switches it off")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: by a short measurement")
    compile: bool = Field(False, description="torch.compile the student")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts that a worker's batch is cut into, one after the other, for less memory; batch statistics "
        "and contrasts are those of a part",
    )
    checkpoint_seconds: float = Field(15.0, gt=0, description="seconds between checkpoints")
    resident_bytes: int = Field(
        2_000_000_000,
        ge=0,
        description="transfer sets up to this size stay in a worker's memory; larger ones stream",
    )
    window_bytes: int = Field(256_000_000, ge=1, description="streamed rows that are shuffled together")


class Finetune(Part):
    """Finetuning of the student on the labels."""

    steps: int = Field(150, ge=0, description="optimizer steps; 0 skips it")
    batch_size: int = Field(64, ge=1, description="labelled images a step, over all workers")
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with rising learning rate")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the averaged weights; 0 switches it off")
    replay: float = Field(
        1.0,
        ge=0,
        description="transfer images per labelled one in a batch: the distillation term that is kept",
    )
    evals: int = Field(10, ge=1, description="times validation is read; the best of them (the start included) is kept")


class Baselines(Part):
    scratch: bool = Field(True, description="also train the student without pretraining, as the floor")
    scratch_steps: int | None = Field(None, ge=1, description="steps of the floor; null: as many as train.steps")


class Recipe(Part):
    store: str = Field("./ktray-store", description="folder or s3://bucket/prefix for stages and runs")
    seed: int = Field(0, description="seed of training: initial weights, order, mixup")
    image_size: int | None = Field(None, ge=8, description="student's input, pixels; null: from the labelled images")
    task: Task = Task()
    gallery: Gallery = Gallery()
    data: Data = Data()
    teacher: Teacher = Teacher()
    student: Student = Student()
    transfer: Transfer = Transfer()
    teach: Teach = Teach()
    objective: Objective = Objective()
    supervised: Supervised = Supervised()
    train: Train = Train()
    finetune: Finetune = Finetune()
    baselines: Baselines = Baselines()
    cluster: Cluster = Cluster()
    mlflow: MLflow = MLflow()
    compare: Compare = Compare()
    bench: Bench = Bench()
    export: Export = Export()
    tune: Tune = Tune()
    budget: Budget = Budget()
    prices: dict[str, float] = Field(
        default_factory=dict, description="USD per hour by device name, over ktray's table"
    )


def schema(model: type[Part] = Recipe, prefix: str = "") -> list[tuple[str, Any, str, str]]:
    """All keys of the schema as (dotted key, default, type, description)."""
    rows: list[tuple[str, Any, str, str]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            rows += schema(kind, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            rows.append((prefix + name, default, _type_name(kind), field.description or ""))
    return rows


def load(recipes: str | list[str] | None, overrides: list[str]) -> Recipe:
    """The recipe named ``recipes`` (a file of ``ktray/recipes`` or a YAML path), with ``key=value`` overrides.

    Of several, the keys of later ones win. Where they say nothing of a task, they stand over the built-in task's own
    recipe (``letters`` unless ``task.name`` says otherwise), or over the schema's defaults for own data
    (``task.data``). Values are read as YAML, so ``transfer.size=500``, ``student.kwargs={patch_size: 2}`` and
    ``gallery.data=[a,b]`` have their types.

    Raises:
        KtrayError: no such recipe, unknown key (the nearest is named), or a value of the wrong type.
    """
    wanted = [recipes] if isinstance(recipes, str) else list(recipes or [])
    raw: dict[str, Any] = {}
    for name in wanted:
        _merge(raw, _read_yaml(name))
    own = any(text.startswith("task.data=") for text in overrides)
    if "task" not in raw and not own:
        named = [text.partition("=")[2].strip() for text in overrides if text.startswith("task.name=")]
        name = named[-1] if named else DEFAULT
        if (RECIPES / f"{name}.yaml").exists():
            raw, over = _read_yaml(name), raw
            _merge(raw, over)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise KtrayError(f"'{text}' is not a key=value pair", "Write for example transfer.size=500.")
        _set(raw, key.strip(), _parse_value(value))
    return _validate(raw)


def _merge(raw: dict[str, Any], more: dict[str, Any]) -> None:
    """Put ``more`` over ``raw``, part by part; a student's arguments go with its name."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict) and key != "kwargs":
            if key == "student" and "name" in value:
                raw[key].pop("kwargs", None)
            _merge(raw[key], value)
        else:
            raw[key] = value


def override(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """A copy of ``recipe`` with dotted keys set. Raises `KtrayError` as `load` does."""
    raw = recipe.model_dump(mode="json")
    for key, value in keys.items():
        _set(raw, key, value)
    return _validate(raw)


def _validate(raw: dict[str, Any]) -> Recipe:
    _check_keys(raw)
    _check_secrets(raw)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(
            str(part) for part in first["loc"] if not str(part).startswith(("function", "literal", "bool"))
        )
        raise KtrayError(
            f"Recipe key '{where}' does not accept {first.get('input')!r}: {first['msg']}",
            "See --help for each key's type.",
        ) from error


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(*values: Any) -> str:
    """A short, stable hash of JSON-like values (16 hex digits of SHA-256)."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_yaml(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
        if not path.exists():
            known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
            raise KtrayError(f"No recipe is named '{recipe}'", f"Known are {', '.join(known)}; a file ends in .yaml.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise KtrayError(f"Recipe file '{path}' cannot be read: {error.strerror}", "Check --recipe.") from error
    except yaml.YAMLError as error:
        raise KtrayError(f"Recipe file '{path}' is not YAML: {error}".replace("\n", " "), "Mend the file.") from error
    if not isinstance(raw, dict):
        raise KtrayError(f"Recipe file '{path}' does not hold keys", "Start from the recipe.yaml of a run folder.")
    return raw


def _parse_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except ValueError:
            return value
    return value


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    known = {row[0] for row in schema()}
    if key not in known and not any(key.startswith(f"{k}.") for k in ("student.kwargs", "prices", "mlflow.tags")):
        raise _unknown(key)
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise KtrayError(f"Recipe key '{key}' is under a key that holds a value", "See --help for the keys.")
    node[parts[-1]] = value


def _check_keys(raw: dict[str, Any], model: type[Part] = Recipe, prefix: str = "") -> None:
    for name, value in raw.items():
        field = model.model_fields.get(name)
        if field is None:
            raise _unknown(f"{prefix}{name}")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part) and isinstance(value, dict):
            _check_keys(value, kind, f"{prefix}{name}.")


def _check_secrets(raw: dict[str, Any], prefix: str = "") -> None:
    """A recipe is saved with its run, and a command line is shown to whoever lists processes."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_secrets(value, f"{prefix}{name}.")
        elif found := credential_in(value):
            raise KtrayError(
                f"Recipe key '{prefix}{name}' holds a secret ({found}), and a recipe is saved and logged with its run",
                "Give it by the environment: MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD; AWS_ACCESS_KEY_ID and so on for S3.",
            )


def _unknown(key: str) -> KtrayError:
    known = [row[0] for row in schema()]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    if not near:
        near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    return KtrayError(
        f"Unknown recipe key '{key}'",
        f"Did you mean '{near[0]}'? --help lists all." if near else "--help lists all.",
    )


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind))
    args = get_args(kind)
    if args and get_origin(kind) not in (list, dict):
        return "|".join("null" if a is type(None) else _type_name(a) for a in args)
    if args:
        return f"{get_origin(kind).__name__}[{', '.join(_type_name(a) for a in args)}]"
    return getattr(kind, "__name__", str(kind))
