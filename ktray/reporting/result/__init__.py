"""The result files of jobs: a class for each file, the function that writes them, and their JSON Schema."""

from ktray.reporting.result.bench import BenchResult
from ktray.reporting.result.compare import CompareResult
from ktray.reporting.result.export import ExportResult
from ktray.reporting.result.failure import FailedResult
from ktray.reporting.result.parts import SCHEMA, Result, finished, utc, write_result
from ktray.reporting.result.predict import PredictResult
from ktray.reporting.result.runs import CurateResult, DistillResult, IndexResult, TrialResult
from ktray.reporting.result.tune import TuneProgress, TuneResult

__all__ = [
    "SCHEMA",
    "BenchResult",
    "CompareResult",
    "CurateResult",
    "DistillResult",
    "ExportResult",
    "FailedResult",
    "IndexResult",
    "PredictResult",
    "Result",
    "TrialResult",
    "TuneProgress",
    "TuneResult",
    "finished",
    "utc",
    "write_result",
]
