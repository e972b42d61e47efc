"""Whether a job's result is what ``docs/result.schema.json`` says, as a reader of the file would check it."""

import json
from functools import cache
from pathlib import Path

import jsonschema

from ktray.reporting.result.schema import RESULTS

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "result.schema.json"


@cache
def _validator(job):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    one = {"$schema": schema["$schema"], "$defs": schema["$defs"], "$ref": f"#/$defs/{RESULTS[job].__name__}"}
    kind = jsonschema.validators.validator_for(one)
    kind.check_schema(one)
    return kind(one)


def check_result(job, file):
    """The content of a result's file; fails where the schema, or the class that made it, refuses it.

    Args:
        job: a key of `ktray.reporting.result.schema.RESULTS`.
        file: a path, or the JSON-like content.
    """
    found = json.loads(file.read_text(encoding="utf-8")) if isinstance(file, Path) else file
    problems = [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in _validator(job).iter_errors(found)]
    assert not problems, problems
    again = json.loads(json.dumps(RESULTS[job].model_validate(found).content()))
    assert json.dumps(again, sort_keys=True) == json.dumps(found, sort_keys=True)
    return found
