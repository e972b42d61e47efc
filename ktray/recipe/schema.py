"""The recipe: one typed description of a run, from the command line to the run folder.

`ktray.pipeline.resolve` chooses a value for each key that is ``auto`` (or null), from the data and the machine. It
prints the value with the reason, and the run folder has it in ``recipe.yaml``, which can be run again with ``--recipe
FILE``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from ktray.recipe.bench import BenchConfig
from ktray.recipe.choice import DEFAULT_STRATEGY, default_objective, strategy_of, strategy_value, validated
from ktray.recipe.cluster import ClusterConfig, MLflowConfig
from ktray.recipe.compare import CompareConfig
from ktray.recipe.curate import CurateConfig
from ktray.recipe.export import ExportConfig
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.places import Place
from ktray.recipe.predict import PredictConfig
from ktray.recipe.registries import TASKS
from ktray.recipe.section import Section
from ktray.recipe.strategy import StrategyConfig
from ktray.recipe.teach import TeachConfig
from ktray.recipe.teacher import (
    TRAINED_TOWERS,
    OtherTeacher,
    TeacherFinetuneConfig,
    TeacherLoraConfig,
    other_teachers,
)
from ktray.recipe.train import BaselinesConfig, FinetuneConfig, TrainConfig
from ktray.recipe.tune import BudgetConfig, TuneConfig


class TaskConfig(Section):
    name: str | None = Field(
        None,
        description="built-in task, such as letters or digits; ignored where task.data is set; null without "
        "task.data: letters",
    )
    data: Place | None = Field(
        None,
        description="labelled images: a folder with train/, val/ and test/, a folder of class folders, a CSV or "
        "Parquet list, or a data set such as hf://datasets/ORG/NAME; for segmentation a folder with train/images, "
        "train/masks (also val, test) and classes.txt; "
        "for multilabel a list whose labels are separated by |, or a file or folder of COCO annotations",
    )
    more_labels: list[Place] | Place | None = Field(
        None,
        description="labels of further training images, in addition to the label budget: a CSV or Parquet list with "
        "the columns path (or uri) and label, such as an edited suggestions.csv of jobs/curate.py, or a folder of such "
        "lists; one address or a list of them",
    )
    kind: str = Field(
        "classification",
        description="kind of prediction: classification (a class for each image), multilabel (a set of classes for "
        "each image), segmentation (a class for each pixel), or the name of a task kind of another package",
    )
    metric: str = Field(
        "auto",
        description="accuracy measure that chooses and judges models: top1 or mean_class_accuracy; for segmentation "
        "miou or mean_class_accuracy; for multilabel map, macro_f1 or micro_f1; auto: the first of these",
    )
    labels_per_class: int | None = Field(
        None, ge=1, description="label budget: labelled training images per class; null: all of them"
    )
    labels: int | None = Field(
        None,
        ge=1,
        description="label budget for segmentation and multilabel: labelled training images in all; null: all of them",
    )
    layout: Literal["auto", "classes", "splits", "imagenet", "places365", "ham10k", "eurosat", "ade20k"] = Field(
        "auto",
        description="layout of task.data: classes (each folder is a class, also one called train), splits (train/, "
        "val/ and test/ hold class folders, and other folders are ignored), or that of a published data set with "
        "task.splits; auto: recognised",
    )
    splits: Place | None = Field(
        None,
        description="folder of lists that split task.data, with one line file,class for each image; null: the split "
        "that task.data has, or one that is drawn at random",
    )
    train_list: str | None = Field(
        None,
        description="name of the training list in task.splits, such as train_1percent; null: the one for the "
        "label budget, or the full one",
    )
    label: str | None = Field(
        None,
        description="column of a CSV or Parquet list that has the labels, such as dx or coarse_label; null: the column "
        "label, or another usual name",
    )
    group: str | None = Field(
        None,
        description="column of a CSV or Parquet list that names the group of each image, such as a patient or a video; "
        "a split that is drawn keeps a group together; null: the column group, if there is one",
    )
    split_seed: int = Field(0, ge=0, description="seed that draws missing splits and the images of the label budget")
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the labelled images that is split off for validation where task.data has no validation "
        "split",
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the labelled images that is split off for testing where task.data has no test split",
    )
    prompts: list[str] | None = Field(
        None,
        description="text templates, with {} for the name of a class, that the teacher's text tower reads; null: "
        "those of the task, else of ktray",
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != cls.model_fields["kind"].default:  # the default always exists, and its imports take seconds
            TASKS.get(value)
        return value


class GalleryConfig(Section):
    data: list[Place] | Place | None = Field(
        None,
        description="unlabelled images: a folder, tar shards, Parquet or CSV, local, s3:// or hf://datasets/ORG/NAME; "
        "one address or a list of them",
    )
    column: str = Field(
        "auto",
        description="column of a gallery in tables that holds the images' bytes or paths; auto: recognised by type "
        "and name",
    )
    images: list[Place] | Place | None = Field(
        None,
        description="images of a gallery that is given as a folder of clip-retrieval's embeddings: the folder that "
        "relative paths start at, or the tar shards that hold the images; null: relative paths start at the folder "
        "of the embeddings",
    )
    index: Place | None = Field(
        None,
        description="folder of the index (the embedded gallery), local or s3://, which runs reuse and extend; without "
        "gallery.data, the gallery is everything that the index holds; null: a folder in the store for each encoder",
    )
    crops: Literal["none", "grid", "random"] = Field(
        "none", description="crops of each gallery image that are candidates in addition to the whole image"
    )
    crop_count: int = Field(
        4, ge=1, le=64, description="number of crops of each image; a square number where the crops form a grid"
    )
    search: Literal["auto", "exact", "compressed"] = Field(
        "auto",
        description="search in the index: exact, or compressed (approximate, with less memory); auto: exact up to "
        "100 million rows",
    )
    factory: str | None = Field(
        None,
        description="factory string of FAISS for the compressed index; null: chosen by the number of rows and "
        "gallery.search_gb",
    )
    search_gb: float = Field(8.0, gt=0, description="memory for the codes of the compressed index, in GB")
    recall: float = Field(
        0.95, gt=0, le=1, description="share of the true nearest neighbours that compressed search should find"
    )
    verify: bool = Field(
        False, description="compare the files of the index with their checksums before the index is used"
    )


class DataConfig(Section):
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="share of unusable images above which a stage fails; 0: none may be unusable"
    )
    max_bad_images: int = Field(
        3,
        ge=0,
        description="number of unusable images that a stage accepts whatever their share, up to a tenth of its images",
    )
    max_pixels: int = Field(
        178_956_970, ge=1, description="largest image that is decoded, in pixels (width times height)"
    )


class TeacherConfig(Section):
    name: str | None = Field(
        None,
        description="teacher model: open_clip:<model>[/<pretrained>], timm:<model>, efficientnet-lite0 (installed with "
        "ktray; also -lite1, -lite2), or miniverse (ships with ktray); null: that of the built-in task; for own data "
        "a published CLIP, or efficientnet-lite if its hub does not answer",
    )
    checkpoint: Place | None = Field(
        None,
        description="file of the teacher's weights (safetensors or weights-only .pt), local or s3://; null: published "
        "weights",
    )
    config: Place | None = Field(
        None, description="JSON file with the open_clip configuration of a model that open_clip does not know"
    )
    image_size: int | None = Field(
        None,
        description="side of the teacher's input, in pixels; position embeddings are resampled to it; null: the size "
        "that the model was trained with",
        ge=16,
    )
    others: Annotated[list[OtherTeacher], BeforeValidator(other_teachers)] = Field(
        [],
        description="further teachers, such as [efficientnet-lite1]: the student learns from the mean of all "
        "predictions, weighted by validation; only teacher.name retrieves",
    )
    levels: int = Field(
        1,
        ge=1,
        description="for segmentation: number of last blocks (or of stages, where they differ in size) that the head "
        "on the teacher reads",
    )
    adapt: Literal["probe", "finetune", "lora", "text", "auto"] = Field(
        "auto",
        description="adaptation of the teacher to the task: a linear probe, finetuning, low-rank adaptation (LoRA), or "
        "class names as text; auto: the best of teacher.candidates on validation",
    )
    candidates: list[Literal["text", "probe", "finetune", "lora"]] = Field(
        ["text", "probe", "finetune"],
        description="adaptations that teacher.adapt=auto tries; text is tried only where the teacher has a text tower",
    )
    finetune: TeacherFinetuneConfig = TeacherFinetuneConfig()
    lora: TeacherLoraConfig = TeacherLoraConfig()

    def trainings(self) -> dict[str, TeacherFinetuneConfig]:
        """The adaptations out of `TRAINED_TOWERS` that the recipe tries, with their settings."""
        tried = self.candidates if self.adapt == "auto" else [self.adapt]
        return {name: getattr(self, name) for name in TRAINED_TOWERS if name in tried}


class StudentConfig(Section):
    name: str | None = Field(
        None, description="student model: any model name of timm; null: chosen by image size and device"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments that timm.create_model gets for the student, such as {patch_size: 2}",
    )
    checkpoint: Place | None = Field(
        None,
        description="file of weights that the student starts from (safetensors or weights-only .pt); null: see "
        "student.pretrained",
    )
    head: Literal["lraspp", "deeplabv3"] = Field(
        "lraspp", description="for segmentation: head on the feature maps of the student"
    )
    fit_head: bool | Literal["auto"] = Field(
        "auto",
        description="before training, set the new classifier of a student with published weights to a linear probe of "
        "its features, so that a random one does not distort them; auto: true for classification",
    )
    pretrained: bool | Literal["auto"] = Field(
        "auto",
        description="start the student from published weights, of an installed package or of timm's hub; auto: true "
        "for own data where such weights can be had, false for built-in tasks and with student.kwargs",
    )


class TransferConfig(Section):
    source: Literal["auto", "none", "generic", "target", "retrieved", "list"] = Field(
        "auto",
        description="source of the transfer set: none, generic (random images of the gallery), target (the labelled "
        "training images), retrieved (gallery images that the queries find), or list (transfer.list); auto: "
        "retrieved where there is a gallery, else target",
    )
    strategy: Annotated[str | dict[str, Any], BeforeValidator(strategy_value)] = Field(
        DEFAULT_STRATEGY, description=StrategyConfig.model_fields["name"].description
    )
    size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="number of images in the transfer set; null: chosen by the size of the gallery and by the machine; "
        "auto: the same number at most, and fewer where fewer images reach transfer.min_similarity, which is then auto "
        "where it is null",
    )
    min_similarity: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] | None = Field(
        None,
        description="lowest cosine similarity to its query with which an image is retrieved; auto: the similarity that "
        "90 of 100 labelled images have to the queries of the other images of their class; null: no floor",
    )
    weight: Literal["none", "confidence"] = Field(
        "none",
        description="weight of each image in pretraining: none (equal weights), or confidence (1 minus the normalised "
        "entropy of the teacher's prediction: uncertain images are drawn less often)",
    )
    queries: Literal["images", "text", "both"] = Field(
        "images",
        description="queries against the gallery: the labelled images, the class names in task.prompts as text, or "
        "both",
    )
    per: Literal["query", "class"] = Field(
        "query",
        description="unit that retrieves: query (each query separately), or class (the mean of the queries of each "
        "class, so that all classes get equal shares)",
    )
    query_crops: Literal["none", "grid", "random"] = Field(
        "none",
        description="crops of the labelled images that are queries in addition to the whole images; "
        "gallery.crop_count of each image",
    )
    dedup_similarity: float = Field(
        0.85,
        gt=0,
        le=1,
        description="cosine similarity to a validation or test image from which a gallery image is checked, by its "
        "pixels, as a copy",
    )
    repeat_similarity: float | None = Field(
        0.95,
        gt=0,
        le=1,
        description="cosine similarity from which two images of the transfer set are checked, by their pixels, as "
        "duplicates; null: duplicates are kept",
    )
    list: Place | None = Field(
        None,
        description="for transfer.source=list: Parquet, CSV or text file with the paths or URIs of the images, local "
        "or s3://",
    )
    seed: int = Field(0, ge=0, description="seed that draws the images of transfer.source=generic")

    @property
    def chosen_strategy(self) -> StrategyConfig:
        """The chosen strategy, with its keys."""
        return strategy_of(self.strategy)


class SupervisedDataConfig(Section):
    data: Place | None = Field(
        None, description="labelled generic images for objective.name=supervised, in one of the forms of task.data"
    )


class Recipe(Section):
    store: Place = Field("./ktray-store", description="folder or s3://bucket/prefix that holds stages and runs")
    seed: int = Field(0, ge=0, description="seed of training: initial weights, order of images, mixup")
    image_size: int | None = Field(
        None,
        ge=8,
        description="side of the student's input, in pixels; null: chosen by the size of the labelled images",
    )
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
    supervised: SupervisedDataConfig = SupervisedDataConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    cluster: ClusterConfig = ClusterConfig()
    mlflow: MLflowConfig = MLflowConfig()
    compare: CompareConfig = CompareConfig()
    curate: CurateConfig = CurateConfig()
    bench: BenchConfig = BenchConfig()
    export: ExportConfig = ExportConfig()
    predict: PredictConfig = PredictConfig()
    tune: TuneConfig = TuneConfig()
    budget: BudgetConfig = BudgetConfig()
    prices: dict[str, float] = Field(
        default_factory=dict,
        description="USD per hour by device name, such as {T4: 0.35}; these prices replace those of ktray's table",
    )


def index_alone(recipe: Recipe) -> bool:
    """Whether the gallery is everything in an existing index, because only ``gallery.index`` is set."""
    return recipe.gallery.index is not None and recipe.gallery.data is None and recipe.transfer.list is None
