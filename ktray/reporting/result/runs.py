"""Results of single runs of the pipeline: jobs/distill.py, a trial, jobs/index.py and jobs/curate.py."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from ktray.reporting.result.parts import Images, Number, PipelineRun, ResultPart, TransferSet


class ValidationMetric(ResultPart):
    name: str = Field(description="the task's metric: a key of what its kind measures")
    val: Number = Field(description="of the weights that were kept, a fraction")


class StudentMetric(ValidationMetric):
    """Beside the keys named here each metric of the task's kind under its own name, on the test split."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    test: Number
    per_class: dict[str, Number | None] = Field(
        default_factory=dict, description="by class; null for a class that does not occur"
    )
    test_images: int


class ComparedMetric(ResultPart):
    """Another model than the student, by the task's metric."""

    val: Number
    test: Number = Field(0, description="left out by a trial, and where this model was not tested")


class TeacherMetric(ComparedMetric):
    adapt: str = Field(description="how the teacher was adapted: text, probe or finetune")


class ClusterShare(ResultPart):
    workers: int | str = Field(description="training workers, a number or min..max")
    cpus: Number
    gpus: Number


class StudentRun(PipelineRun):
    """What a run that trains a student leaves."""

    task: str | None
    objective: str
    student: str | None
    teacher: str | None = Field(description="null where the objective has none")
    seed: int
    label_budget: int = Field(description="labelled images to learn from")
    data: Images
    cluster: ClusterShare
    teacher_metric: TeacherMetric | None = None
    scratch_metric: ComparedMetric | None = Field(None, description="of the student without pretraining")
    transfer_set: TransferSet | None = None


class TrialResult(StudentRun):
    """A run of which validation will choose: it has not read the test split."""

    metric: ValidationMetric


class DistillResult(StudentRun):
    """jobs/distill.py."""

    metric: StudentMetric


class IndexSearch(ResultPart):
    """The compressed index of a gallery (`ktray.retrieval.faiss_index.Compressed`)."""

    factory: str
    rows: int
    trained_on: int
    probes: int
    recall: dict[str, Number] = Field(description="share of the true neighbours that are found, by how many are asked")
    key: str


class GalleryIndex(ResultPart):
    folder: str
    images: int
    rows: int = Field(description="embeddings: of an image and of each of its crops")
    shards: int
    dimensions: int
    crops: str
    search: IndexSearch | None = Field(description="null: every row is compared")


class IndexResult(PipelineRun):
    """jobs/index.py."""

    teacher: str
    index: GalleryIndex
    data: Images


class QueryCounts(ResultPart):
    """How many images the queries brought."""

    count: int
    empty: int = Field(description="queries that brought none")
    least: int
    median: Number
    most: int


class ClassCoverage(ResultPart):
    queries: int
    images: int
    similarity: Number | None = Field(description="mean cosine; null without images")


class Histogram(ResultPart):
    edges: list[Number] = Field(description="one more than there are counts")
    counts: list[int]


class Coverage(ResultPart):
    """How evenly the queries brought the set (`ktray.retrieval.coverage`)."""

    queries: QueryCounts
    share: Number = Field(description="images that each query would bring at an equal share")
    classes: dict[str, ClassCoverage]
    similarity: Histogram


class CuratedSet(TransferSet):
    gallery: int = Field(description="images that there were to choose from")
    coverage: Coverage | None = Field(description="null where no query chose the images")


class CurateResult(PipelineRun):
    """jobs/curate.py."""

    task: str | None
    transfer_set: CuratedSet
