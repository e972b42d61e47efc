"""The JSON Schema of all results, which is the file ``docs/result.schema.json``."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from ktray.reporting.result.bench import BenchResult
from ktray.reporting.result.compare import CompareResult
from ktray.reporting.result.export import ExportResult
from ktray.reporting.result.failure import FailedResult
from ktray.reporting.result.parts import Result
from ktray.reporting.result.predict import PredictResult
from ktray.reporting.result.runs import CurateResult, DistillResult, IndexResult, TrialResult
from ktray.reporting.result.tune import TuneProgress, TuneResult

# By the job that writes the result. A result does not name its job; the keys differ between jobs.
RESULTS: dict[str, type[Result]] = {
    "distill": DistillResult,
    "trial": TrialResult,
    "index": IndexResult,
    "curate": CurateResult,
    "compare": CompareResult,
    "tune": TuneResult,
    "tune-running": TuneProgress,
    "bench": BenchResult,
    "export": ExportResult,
    "failed": FailedResult,
    "predict": PredictResult,
}


class _Plain(GenerateJsonSchema):
    """Leaves out titles, which would only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """A schema (draft 2020-12) that the result of each job satisfies; ``$defs`` has a schema for each class of
    `RESULTS`."""
    _, models = models_json_schema([(model, "validation") for model in RESULTS.values()], schema_generator=_Plain)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The results of ktray's jobs: result.json, and export.json of jobs/export.py",
        "description": "Made by `python -m ktray.reporting.result > docs/result.schema.json`.",
        "anyOf": [{"title": job, "$ref": f"#/$defs/{model.__name__}"} for job, model in RESULTS.items()],
        "$defs": models["$defs"],
    }


def text() -> str:
    """The content of ``docs/result.schema.json``."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
