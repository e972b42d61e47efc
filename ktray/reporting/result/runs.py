"""Results of single runs of the pipeline: jobs/distill.py, a trial, jobs/index.py and jobs/curate.py."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ktray.reporting.result.calibration import Calibration
from ktray.reporting.result.parts import (
    Hygiene,
    Images,
    Number,
    PipelineRun,
    PlanAndTaken,
    ResultPart,
    TransferSet,
)


class ValidationMetric(ResultPart):
    name: str = Field(description="the metric of the task, one of those of the task kind")
    words: str = Field("", description="the metric in words; left out by older versions")
    val: Number = Field(description="the metric of the kept weights on validation, a fraction")


class StudentMetric(ValidationMetric):
    """In addition to the keys here, it has each metric of the task kind on the test split, under the name of the
    metric."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    test: Number | None = Field(description="null: the data has no test split")
    per_class: dict[str, Number | None] = Field(
        default_factory=dict, description="accuracy by class; null for a class that does not occur"
    )
    details: dict[str, dict[str, Number | None]] = Field(
        default_factory=dict, description="further figures by class, such as precision and recall, if the kind has them"
    )
    decisions: dict[str, dict[str, Number]] = Field(
        default_factory=dict,
        description="values that were chosen on validation and are stored with the student, by class: thresholds",
    )
    test_images: int


class ComparedMetric(ResultPart):
    """The task's metric of a model that the student is compared with."""

    val: Number
    test: Number = Field(0, description="left out in a trial, or if the model was not tested")


class TeacherMember(ResultPart):
    """One of several teachers."""

    teacher: str = Field(description="name of the model")
    adapt: str = Field(description="how it was adapted")
    val: Number = Field(description="the task's metric on validation, a fraction")
    weight: Number = Field(description="its weight in the mean of the predictions")


class TeacherMetric(ComparedMetric):
    adapt: str = Field(
        description="how the teacher was adapted: text, probe, finetune or lora; of several teachers, the first"
    )
    members: list[TeacherMember] = Field(
        default_factory=list,
        description="the teachers whose mean prediction the student learns from, if there are several",
    )


class Delivered(ResultPart):
    """The choice of the delivered student, on validation (`ktray.pipeline.select`)."""

    name: str = Field(description="the delivered student: transferred, finetuned, start or scratch")
    what: str = Field(description="the same in words")
    validation: dict[str, Number] = Field(description="by candidate, the metric on validation, a fraction")
    margin: Number | None = Field(
        description="by how much the delivered student is better than the best other candidate; null: there is no other"
    )


class Machines(ResultPart):
    """Machines of one type."""

    count: int
    instance: str | None = Field(description="the provider's name of the type; null if it is not known")
    market: str | None = Field(description="spot or on-demand; null if it is not known")
    accelerator: str | None = Field(description="name of its GPUs; null without any")
    usd_per_hour: Number | None = Field(
        description="price of a GPU with its share of the machine, or of the machine without GPUs; null: not known"
    )


class ClusterShare(ResultPart):
    workers: int | str = Field(description="number of training workers, or a range min..max")
    cpus: Number
    gpus: Number
    machines: list[Machines] = Field(
        default_factory=list, description="the machines that did work, by type; their prices are those of the cost"
    )


class StudentRun(PipelineRun):
    """The result of a run that trains a student."""

    task: str | None
    objective: str
    student: str | None
    start: str = Field(
        "random",
        description="origin of the student's initial weights: random, checkpoint (student.checkpoint), or published "
        "with the name of the weights",
    )
    teacher: str | None = Field(description="null: the objective has no teacher")
    seed: int
    label_budget: int = Field(description="number of labelled training images")
    data: Images
    cluster: ClusterShare
    teacher_metric: TeacherMetric | None = None
    delivered: Delivered | None = Field(None, description="which of the trained students the run delivers, and why")
    scratch_metric: ComparedMetric | None = Field(None, description="metric of the student without pretraining")
    start_metric: ComparedMetric | None = Field(
        None, description="metric of the student that is finetuned from published weights, without distillation"
    )
    distilled_metric: ComparedMetric | None = Field(
        None, description="metric of the distilled student, if a baseline is delivered instead"
    )
    transfer_set: TransferSet | None = None
    hygiene: Hygiene | None = Field(None, description="left out in a trial, which does not read the test split")


class TrialResult(StudentRun):
    """The result of a trial, which does not read the test split."""

    metric: ValidationMetric


class DistillResult(StudentRun):
    """jobs/distill.py."""

    metric: StudentMetric
    calibration: Calibration | None = Field(
        None,
        description="honesty of the student's probabilities on the test split; left out if images have no class",
    )
    plan: PlanAndTaken | None = Field(None, description="what was planned, and what it took")


class IndexSearch(ResultPart):
    """The compressed index of a gallery (`ktray.retrieval.faiss_index.Compressed`)."""

    factory: str
    rows: int
    trained_on: int
    probes: int
    recall: dict[str, Number] = Field(
        description="share of the true nearest neighbours that the search finds, by their number"
    )
    key: str


class GalleryIndex(ResultPart):
    folder: str
    images: int
    rows: int = Field(description="number of embeddings, one for each image and for each of its crops")
    shards: int
    dimensions: int
    crops: str
    search: IndexSearch | None = Field(description="null: exact search")


class IndexResult(PipelineRun):
    """jobs/index.py."""

    teacher: str
    index: GalleryIndex
    data: Images


class QueryCounts(ResultPart):
    """The numbers of images that the queries contributed."""

    count: int
    empty: int = Field(description="number of queries that contributed no image")
    least: int
    median: Number
    most: int


class ClassCoverage(ResultPart):
    queries: int
    images: int
    similarity: Number | None = Field(description="mean cosine; null without images")


class Histogram(ResultPart):
    edges: list[Number] = Field(description="edges of the bins, one more than counts")
    counts: list[int]


class Coverage(ResultPart):
    """How evenly the queries contributed to the transfer set (`ktray.retrieval.coverage`)."""

    queries: QueryCounts
    share: Number = Field(description="number of images of each query at an equal share")
    classes: dict[str, ClassCoverage]
    similarity: Histogram


class CuratedSet(TransferSet):
    gallery: int = Field(description="number of images to choose from")
    coverage: Coverage | None = Field(description="null: the images were chosen without queries")


class Suggestions(ResultPart):
    """The unlabelled images that are suggested for labelling."""

    asked: int = Field(description="number of suggestions that the recipe asks for")
    suggested: int
    candidates: int = Field(description="number of images that were ranked")
    images: int = Field(description="number of whole images that were looked at, in the gallery or beyond the budget")
    copies: int = Field(description="number of images that were left out as labelled images or copies of them")
    repeated: int = Field(description="number of images that were passed over as duplicates of a higher rank")
    student: str | None = Field(description="folder of the student whose disagreement ranks; null: only coverage ranks")
    path: str = Field(description="the list, a CSV file with an empty column label")
    page: str = Field(description="the page with the images")


class CurateResult(PipelineRun):
    """jobs/curate.py."""

    task: str | None
    transfer_set: CuratedSet
    suggestions: Suggestions | None = Field(None, description="left out without curate.suggest")
