"""The two files of a checkpoint keep their names and keys, so that training resumes from those of older versions."""

import json
import math

from ktray.training.loop import State
from ktray.training.outcome import CostReport, Outcome

STATE = {
    "step": 7,
    "seconds": 1.5,
    "best_score": 0.5,
    "best_step": 5,
    "last_score": 0.25,
    "stale": 1,
    "finished": False,
    "curve": [{"step": 5, "seconds": 1.0, "loss": 0.25}],
}
REPORT = {
    "flops_per_step": 10.0,
    "images_per_step": 8,
    "autocast": "bfloat16",
    "peak_memory_bytes": 1000,
    "seconds": 1.5,
    "pid": 42,
    "span": [1, 3],
    "compiled": "default: measured",
}


def test_files_of_a_checkpoint_come_back_as_they_were_written(tmp_path):
    (tmp_path / "outcome.json").write_text(json.dumps(STATE))
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    found = Outcome.load(tmp_path)
    assert (found.state.step, found.state.curve[0]["loss"]) == (7, 0.25)
    assert (found.report.autocast, found.report.span) == ("bfloat16", (1, 3))
    again = tmp_path / "again"
    again.mkdir()
    found.state.save(again)
    found.report.save(again)
    assert json.loads((again / "outcome.json").read_text()) == STATE
    assert json.loads((again / "report.json").read_text()) == REPORT


def test_a_report_without_compilation_is_of_an_older_version(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({k: v for k, v in REPORT.items() if k != "compiled"}))
    found = CostReport.load(tmp_path)
    assert (found.compiled, found.span) == ("", (1, 3))


def test_a_report_without_a_span_is_of_an_older_version(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({k: v for k, v in REPORT.items() if k != "span"}))
    assert CostReport.load(tmp_path).span is None


def test_a_run_without_any_evaluation_can_be_stored(tmp_path):
    State().save(tmp_path)
    assert State.load(tmp_path).best_score == -math.inf
