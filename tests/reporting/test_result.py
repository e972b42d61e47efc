"""Results of jobs: their schema is the committed one, keys and numbers come back as they are, and others are refused.

That each job's result meets the schema is checked where the job runs, with `results.check_result`.
"""

import copy
import json
import subprocess
import sys

import pytest
from pydantic import ValidationError
from results import SCHEMA, check_result

from ktray.accounting.device import describe_device, versions
from ktray.reporting.result import BenchResult, write_result
from ktray.reporting.result.schema import RESULTS, text
from ktray.storage.store import Dir

BENCH = {
    "schema": 1,
    "run_id": "20260101-000000-bench-0000",
    "rows": [
        {
            "name": "read",
            "unit": "images/s",
            "limit_name": "bare",
            "limit": [2.0, 4],
            "reached": [1.0, 2.0],
            "facts": {"images": 7, "of": "tars", "share": 0.5},
            "ratio": 0.5,
        }
    ],
    "peak_memory_bytes": 2**60 + 1,
    "busy_cores_before": None,
    "commit": "0123456",
    "versions": versions(),
    "device": describe_device(),
    "mlflow": {"tracking_uri": "sqlite:///mlflow.db", "experiment": "ktray", "run_id": None},
    "wall_seconds": 1.5,
}


def test_the_committed_schema_is_that_of_the_classes():
    remedy = "run: python -m ktray.reporting.result > docs/result.schema.json"
    assert SCHEMA.read_text(encoding="utf-8") == text(), remedy


def test_the_command_prints_the_schema():
    done = subprocess.run([sys.executable, "-m", "ktray.reporting.result"], capture_output=True, check=True)
    assert done.stdout.decode() == text()


def test_every_job_has_a_class_in_the_schema():
    schema = json.loads(text())
    assert [one["title"] for one in schema["anyOf"]] == list(RESULTS)
    for one, model in zip(schema["anyOf"], RESULTS.values(), strict=True):
        found = schema["$defs"][one["$ref"].rpartition("/")[2]]
        # Only an export has keys that other packages name, each of them an object.
        other = {"anyOf": [{"additionalProperties": True, "type": "object"}, {"type": "null"}]}
        assert found["additionalProperties"] == (other if model is RESULTS["export"] else False)
        assert "schema" in found["required"]
        assert found["description"] == model.__doc__


def test_a_file_holds_the_keys_and_numbers_that_were_set(tmp_path):
    content = write_result(Dir(str(tmp_path)), BenchResult(**BENCH))
    assert content == BENCH
    found = check_result("bench", tmp_path / "result.json")
    assert found == BENCH
    assert found["peak_memory_bytes"] == 2**60 + 1, "a float would have lost the 1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("rows"), "'rows' is a required property"),
        (lambda r: r.update(more=1), "'more' was unexpected"),
        (lambda r: r.update(schema=2), "1 was expected"),
        (lambda r: r["rows"][0].update(ratio="half"), "'half' is not of type 'number'"),
        (lambda r: r["device"].pop("cpu"), "'cpu' is a required property"),
    ],
)
def test_another_content_is_refused_by_schema_and_class(change, says):
    content = copy.deepcopy(BENCH)
    change(content)
    with pytest.raises(AssertionError, match=says):
        check_result("bench", content)
    with pytest.raises(ValidationError):
        BenchResult(**content)
