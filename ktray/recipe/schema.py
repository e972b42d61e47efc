"""The recipe: one typed description of a run, from the command line to the run folder.

A value of ``auto`` (or null) is decided from the data and the machine by `ktray.pipeline.resolve`, printed with its
reason, and written to the run folder's ``recipe.yaml``, which runs again as ``--recipe FILE``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, SerializeAsAny, field_validator

from ktray.recipe.bench import BenchConfig
from ktray.recipe.choice import DEFAULT_STRATEGY, default_objective, strategy_of, strategy_value, validated
from ktray.recipe.cluster import ClusterConfig, MLflowConfig
from ktray.recipe.compare import CompareConfig
from ktray.recipe.export import ExportConfig
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.registries import TASKS
from ktray.recipe.section import Section
from ktray.recipe.strategy import StrategyConfig
from ktray.recipe.tune import BudgetConfig, TuneConfig


class TaskConfig(Section):
    name: str | None = Field(None, description="a built-in task (letters, digits, ...); ignored when task.data is set")
    data: str | None = Field(
        None,
        description="labelled images: folder with train/ val/ test/, folder of class folders, or CSV/Parquet list; for "
        "segmentation train/images + train/masks (and val, test) + classes.txt",
    )
    kind: str = Field(
        "classification",
        description="what is predicted: classification, segmentation, or the name of a task kind of another package",
    )
    metric: str = Field(
        "auto",
        description="what models are chosen by and judged on: top1 or mean_class_accuracy; miou or mean_class_accuracy "
        "for segmentation; auto: the first of these",
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

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != cls.model_fields["kind"].default:  # the default is there, and its imports take seconds
            TASKS.get(value)
        return value


class GalleryConfig(Section):
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


class DataConfig(Section):
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unusable images above which a stage fails")
    max_pixels: int = Field(178_956_970, ge=1, description="largest image that is decoded, pixels")


class TeacherFinetuneConfig(Section):
    """Finetuning of the teacher's tower (teacher.adapt=finetune|auto)."""

    steps: int = Field(150, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="images a step, over all workers")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of the last layers")
    head_lr: float = Field(1e-3, gt=0, description="peak learning rate of the head")
    layer_decay: float = Field(0.75, gt=0, le=1, description="factor on the learning rate per block below the head")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the averaged weights; 0 switches it off")


class TeacherConfig(Section):
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
    finetune: TeacherFinetuneConfig = TeacherFinetuneConfig()


class StudentConfig(Section):
    name: str | None = Field(None, description="any timm model; null: chosen by image size and device")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments of timm.create_model")
    checkpoint: str | None = Field(None, description="weights to start from (safetensors or weights-only .pt)")
    head: Literal["lraspp", "deeplabv3"] = Field("lraspp", description="segmentation head on the timm model's maps")
    pretrained: bool = Field(False, description="start from timm's published weights (needs a network)")


class TransferConfig(Section):
    source: Literal["auto", "none", "generic", "target", "retrieved", "list"] = Field(
        "auto",
        description="where the transfer set comes from; auto: retrieved when there is a gallery, else target",
    )
    strategy: Annotated[str | dict[str, Any], BeforeValidator(strategy_value)] = Field(
        DEFAULT_STRATEGY, description=StrategyConfig.model_fields["name"].description
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

    @property
    def chosen_strategy(self) -> StrategyConfig:
        """The strategy, with its own keys."""
        return strategy_of(self.strategy)


class SupervisedConfig(Section):
    data: str | None = Field(
        None, description="labelled generic images for objective.name=supervised; forms as for task.data"
    )


class TeachConfig(Section):
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


class TrainConfig(Section):
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


class FinetuneConfig(Section):
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


class BaselinesConfig(Section):
    scratch: bool = Field(True, description="also train the student without pretraining, as the floor")
    scratch_steps: int | None = Field(None, ge=1, description="steps of the floor; null: as many as train.steps")


class Recipe(Section):
    store: str = Field("./ktray-store", description="folder or s3://bucket/prefix for stages and runs")
    seed: int = Field(0, description="seed of training: initial weights, order, mixup")
    image_size: int | None = Field(None, ge=8, description="student's input, pixels; null: from the labelled images")
    task: TaskConfig = TaskConfig()
    gallery: GalleryConfig = GalleryConfig()
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    transfer: TransferConfig = TransferConfig()
    teach: TeachConfig = TeachConfig()
    objective: Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(validated)] = Field(
        default_factory=default_objective
    )
    supervised: SupervisedConfig = SupervisedConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    cluster: ClusterConfig = ClusterConfig()
    mlflow: MLflowConfig = MLflowConfig()
    compare: CompareConfig = CompareConfig()
    bench: BenchConfig = BenchConfig()
    export: ExportConfig = ExportConfig()
    tune: TuneConfig = TuneConfig()
    budget: BudgetConfig = BudgetConfig()
    prices: dict[str, float] = Field(
        default_factory=dict, description="USD per hour by device name, over ktray's table"
    )


def index_alone(recipe: Recipe) -> bool:
    """Whether the gallery is all that an index holds."""
    return recipe.gallery.index is not None and recipe.gallery.data is None and recipe.transfer.list is None
