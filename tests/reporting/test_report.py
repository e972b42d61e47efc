"""The page holds what the run found, safely, and loads nothing; numbers are written for people."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ktray.reporting import report
from ktray.reporting.hygiene import Exhibit, HygieneReport
from ktray.reporting.plots import CostPoint, cost_svg, curves_svg
from ktray.reporting.report import accuracy_rows, closing_table, write_report
from ktray.reporting.worst import WorstError

EVIL = '<script>alert("x")</script>&$a_1$'
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes, text, ids, and a check that tags are nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(self.html)
        assert not self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str, **has: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in has.items())]


def result(**changes: Any) -> dict[str, Any]:
    spent = {"flops": {"adapt": 2e12, "transfer": 1e12, "total": 3e12}, "device_seconds": {"total": 75.0}}
    return {
        "schema": 1,
        "run_id": "run-1",
        "task": "letters",
        "objective": "oriented",
        "student": "timm:small",
        "teacher": "miniverse",
        "seed": 0,
        "label_budget": 260,
        "transfer_set": {
            "source": "retrieved",
            "strategy": "query_balanced",
            "size": 4000,
            "kept": 3990,
            "dropped": {"near_duplicate": 7},
        },
        "metric": {"name": "top1", "val": 0.79, "test": 0.781},
        "teacher_metric": {"val": 0.87, "test": 0.862},
        "scratch_metric": {"val": 0.42, "test": 0.402},
        "cost": {
            **spent,
            "wall_seconds": 75.0,
            "usd": 0.0004,
            "kwh": None,
            "without_cache": {"flops": 9e12, "device_seconds": 200.0, "usd": 0.001},
            "baselines": {"scratch": {"flops": 5e11, "device_seconds": 9.0, "usd": None}},
        },
        "stages": [
            {"name": "adapt", "key": "a", "cached": True, "attempts": 1, "wall_seconds": 0, "flops": 0, "usd": 0},
            {"name": "transfer", "key": "b", "cached": False, "attempts": 3, "wall_seconds": 75, "flops": 3e12},
        ],
        "data": {"read": 1234, "quarantined": 3},
        "versions": {"torch": "2.15.0"},
        "device": {"name": "cpu", "gpus": []},
        **changes,
    }


def page(folder: Path, found: dict[str, Any], **given: Any) -> Page:
    arguments: dict[str, Any] = {"curves": {}, "confusion": None, "classes": [], "contact_sheet": None, "worst": []}
    path = write_report(folder, found, **{**arguments, **given})
    assert path == folder / "report.html"
    return Page(path)


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def png(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page with every part, and user texts that would do harm unescaped."""
    tmp_path = tmp_path_factory.mktemp("run")
    Image.fromarray(picture(9, 40, 60)).save(tmp_path / "sheet.png")
    rows = [{"uri": f"img {i} {EVIL}", "reason": "truncated" if i else EVIL} for i in range(3)]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(f"seed: 0\ntask: '{EVIL}'\n")
    return page(
        tmp_path,
        result(task=EVIL, data={"read": 1234, "quarantined": 3, "quarantine_list": "bad.json"}),
        curves={
            "transfer": [{"step": 0, "top1": 0.1}, {"step": 10, "loss": 2.0, "top1": 0.5}],
            EVIL: [{"step": 1, "loss": 1.0}],
        },
        confusion=np.array([[8, 2, 0], [0, 5, 5], [0, 0, 7]]),
        classes=["a", EVIL, "größer"],
        contact_sheet=tmp_path / "sheet.png",
        worst=[WorstError(picture(1), EVIL, "a", 0.987, f'x" onerror="alert(1)/{EVIL}')],
        comparisons=[{"name": EVIL, "test": 0.5, "flops": 1e12}],
    )


HONEST = {
    "ece": 0.0625,
    "nll": 0.4,
    "confidence": 0.8125,
    "bins": [
        {"images": 4, "confidence": 0.5, "accuracy": 0.5},
        {"images": 12, "confidence": 0.9166, "accuracy": 0.8333},
    ],
    "coverage": [
        {"share": 1.0, "accuracy": 0.75, "threshold": 0.4},
        {"share": 0.5, "accuracy": 0.9, "threshold": 0.95},
    ],
}


def test_confidence_is_shown_where_images_have_a_class(tmp_path: Path) -> None:
    found = page(tmp_path, result(calibration=HONEST))
    assert "expected calibration error is 6.2% at a mean confidence of 81.2%" in found.text
    assert "100.0% 75.0% 40.0% 50.0% 90.0% 95.0%" in found.text
    (picture,) = found.all("svg", **{"aria-label": "Reliability: accuracy against confidence"})
    assert picture["role"] == "img"
    assert "Confidence" not in page(tmp_path, result()).text


def test_page_loads_nothing_and_runs_nothing(full: Page) -> None:
    for tag, attributes in full.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert re.match(r"#|data:image/png;base64,", value or ""), (tag, name, value)
    assert "@import" not in full.html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full.html))
    ids = [a["id"] for _, a in full.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', full.html)
    assert {a or b for a, b in targets} <= set(ids)


def test_user_texts_are_shown_and_not_obeyed(full: Page) -> None:
    assert "<script" not in full.html
    assert full.text.count('<script>alert("x")</script>') >= 8
    assert any('onerror="alert(1)' in (a.get("title") or "") for a in full.all("img"))


def test_numbers_of_the_run_are_on_the_page(full: Page) -> None:
    for expected in (
        "78.1%",
        "+37.9 points compared with scratch · −8.1 points compared with teacher",
        "86.2%",
        "42.0%",
        "3 TFLOP",
        "9 TFLOP without reuse",
        "$0.0004",
        "4,000",
        "3,990",
        "7 near duplicate",
        "1,234 images were read, 3 of them",
        "Energy was not measured",
        "scratch 500 GFLOP, 9.0 s",
        "torch 2.15.0",
        "seed: 0",
        "truncated 2",
    ):
        assert expected in full.text, expected


def test_pictures_are_inside_the_page(full: Page) -> None:
    sheet, error = full.all("img")[1], full.all("img", **{"class": "small"})[0]
    np.testing.assert_array_equal(png(sheet["src"] or ""), picture(9, 40, 60))
    np.testing.assert_array_equal(png(error["src"] or ""), picture(1))


def test_confusion_matrix_and_pairs(full: Page) -> None:
    table = full.html[full.html.index('<table class="heat">') :]
    table = table[: table.index("</table>")]
    rows = [re.findall(r"<td(?: class=\"(\w+)\")?[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [
        [("hit", "8"), ("miss", "2"), ("", "")],
        [("", ""), ("hit", "5"), ("miss", "5")],
        [("", ""), ("", ""), ("hit", "7")],
    ]
    assert report._confused(np.array([[8, 2, 0], [0, 5, 5], [0, 0, 7]]), ["a", "b", "c"]) == [
        ("b", "c", 5, 0.5),
        ("a", "b", 2, 0.2),
    ]


@pytest.mark.parametrize("classes", [50, 51])
def test_many_classes_have_a_matrix_up_to_fifty_and_pairs_above(tmp_path: Path, classes: int) -> None:
    confusion = 3 * np.eye(classes, dtype=int)
    confusion[7, 9] = 2
    found = page(tmp_path, result(), confusion=confusion, classes=[f"class {i}" for i in range(classes)])
    assert len(found.all("table", **{"class": "heat dense"})) == (classes == 50)
    assert "class 7 class 9 2 40.0%" in found.text


def test_no_error_is_said(tmp_path: Path) -> None:
    assert (
        "The student made no errors on the test split"
        in page(tmp_path, result(), confusion=np.eye(2), classes=["a", "b"]).text
    )


def test_a_result_with_little_in_it_has_a_page(tmp_path: Path) -> None:
    found = page(tmp_path, {"schema": 1, "run_id": "r", "task": "t", "cost": {}, "stages": []})
    assert "No stage was run" in found.text
    assert "Accuracy" not in found.text
    assert page(tmp_path, {}, contact_sheet=tmp_path / "absent.png").all("img") == []
    assert "0.0%" in page(tmp_path, result(metric={"name": "miou", "val": 0.0, "test": 0.0})).text


def test_quarantine_lists_as_parquet_are_read_and_cut(tmp_path: Path) -> None:
    table = pa.table({"uri": [f"u{i}" for i in range(30)], "reason": ["zero bytes"] * 12 + ["truncated"] * 18})
    pq.write_table(table, tmp_path / "bad.parquet")
    data = {"read": 100, "quarantined": 30, "quarantine_list": str(tmp_path / "bad.parquet")}
    found = page(tmp_path, result(data=data))
    assert "truncated 18 zero bytes 12" in found.text
    assert "u19 truncated" in found.text
    assert "The full list has 10 more." in found.text
    gone = page(tmp_path, result(data={**data, "quarantine_list": "s3://bucket/bad.parquet"}))
    assert "Full list: s3://bucket/bad.parquet" in gone.text


def svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def markers(text: str, variable: str) -> list[tuple[float, float]]:
    """Positions of the markers drawn in a colour."""
    uses = re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--([\w-]+)\)', text)
    return [(float(x), float(y)) for x, y, name in uses if name == variable]


def test_curves_show_every_row_where_it_belongs() -> None:
    rows = [{"step": 0, "val": 0.1}, *({"step": s, "loss": 3 - s / 10, "val": s / 40} for s in (10, 20, 30))]
    text = curves_svg("transfer", rows, "x")
    loss, score = markers(text, "series-1"), markers(text, "series-2")
    assert len(loss) == 3
    assert len(score) == 4
    assert np.allclose(np.diff([x for x, _ in loss]), loss[1][0] - loss[0][0], atol=1e-3)
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # a falling loss: y grows downwards
    assert [y for _, y in score] == sorted((y for _, y in score), reverse=True)
    words = " ".join("".join(t.itertext()) for t in svg(text).iter(f"{SVG}text"))
    for expected in ("training loss", "validation accuracy", "optimizer step", "best 75.0%"):
        assert expected in words
    assert "#0101" not in text
    assert "#0102" not in text
    assert "training loss" not in curves_svg("a", [{"step": 1, "val_top1": 0.5}], "y")
    assert curves_svg("nothing", [{"step": 1, "seconds": 2.0}], "z") == ""


def test_cost_axis_is_logarithmic_and_a_model_without_cost_is_a_line() -> None:
    points = [CostPoint("scratch", 1e12, 0.4), CostPoint("other", 1e13, 0.5), CostPoint("student", 1e14, 0.6)]
    text = cost_svg([*points, CostPoint("$teacher$", 0, 0.7)], "cost")
    (scratch,), (other,), (student,) = (markers(text, f"series-{i}") for i in (2, 4, 1))
    assert other[0] - scratch[0] == pytest.approx(student[0] - other[0], abs=1e-3)
    assert scratch[0] < other[0]
    assert scratch[1] - other[1] == pytest.approx(other[1] - student[1], abs=1e-3)
    words = " ".join("".join(t.itertext()) for t in svg(text).iter(f"{SVG}text"))
    for expected in ("student 60.0%", "$teacher$ 70.0%", "TFLOP", "test accuracy"):
        assert expected in words
    assert cost_svg([CostPoint("teacher", 0, 0.7)], "cost") == ""
    assert len(markers(cost_svg(points[:1], "one"), "series-2")) == 1


def test_accuracy_rows_count_what_was_reused_and_let_comparisons_win() -> None:
    rows = accuracy_rows(result(), [{"name": "scratch", "test": 0.41}, {"name": "clip", "val": 0.5, "flops": 1.0}])
    assert [row["name"] for row in rows] == ["teacher", "scratch", "clip", "student"]
    assert rows[1] == {"name": "scratch", "val": None, "test": 0.41, "flops": None}
    assert rows[3]["flops"] == 9e12
    assert accuracy_rows(result())[1]["flops"] == 5e11
    assert accuracy_rows({}) == []


def test_closing_table() -> None:
    assert closing_table(result(data={})).splitlines() == [
        "stage     cached            time  compute    money",
        "--------  ---------------  -----  -------  -------",
        "adapt     yes              0.0 s   0 FLOP       $0",
        "transfer  no (3 attempts)   75 s  3 TFLOP        –",
        "--------  ---------------  -----  -------  -------",
        "total                       75 s  3 TFLOP  $0.0004",
        "",
        "top-1 accuracy  validation   test",
        "--------------  ----------  -----",
        "teacher              87.0%  86.2%",
        "scratch              42.0%  40.2%",
        "student              79.0%  78.1%",
    ]
    assert closing_table({}).splitlines()[-1].startswith("total")


def delivered(name: str, **validation: float) -> dict[str, Any]:
    return {"name": name, "what": f"the student '{name}'", "validation": validation, "margin": 0.05}


def test_the_delivered_student_is_named_with_the_others() -> None:
    found = result(
        metric={"name": "top1", "test": 0.5, "val": 0.9},
        scratch_metric={"val": 0.85, "test": 0.5},
        delivered=delivered("finetuned", finetuned=0.9, transferred=0.88, scratch=0.85),
    )
    last = closing_table(found).splitlines()[-1]
    assert last == (
        "delivered: the student 'finetuned'. It is the best on validation: finetuned 90.0%, transferred 88.0%, scratch "
        "85.0%."
    )


@pytest.mark.parametrize(("teacher", "nothing_to_transfer"), [(0.92, True), (0.97, False)])
def test_a_transfer_that_loses_to_a_baseline_is_told(teacher: float, nothing_to_transfer: bool) -> None:
    found = result(
        metric={"name": "top1", "test": 0.5, "val": 0.95},
        scratch_metric={"val": 0.95, "test": 0.5},
        distilled_metric={"val": 0.9, "test": 0.48},
        teacher_metric={"val": teacher, "test": 0.5},
        delivered=delivered("scratch", finetuned=0.88, transferred=0.9, scratch=0.95),
    )
    text = closing_table(found)
    assert "note: the distilled student (90.0% on validation) loses to a baseline (95.0%) and is not delivered." in text
    assert ("there is nothing to transfer" in text) is nothing_to_transfer
    assert [row["name"] for row in accuracy_rows(found)] == ["teacher", "scratch", "distilled", "student"]


def test_problems_with_the_labelled_images_are_shown_and_escaped(tmp_path: Path) -> None:
    numbers = {"checked": 1200, "train_val": 0, "train_test": 2, "val_test": 0, "torn_groups": 1, "two_labels": 0}
    found = result(hygiene={**numbers, "doubtful_labels": 1, "path": "/store/findings.parquet"})
    exhibit = Exhibit([picture(0), picture(1)], [EVIL, "/b.png"], f"train, {EVIL} and test, b: the same file")
    shown = HygieneReport([("Copies in two splits (1)", [exhibit])], [f"{EVIL}: test, train"])
    read = page(tmp_path, found, hygiene=shown)
    assert EVIL not in read.html
    assert read.text.count(EVIL) == 3  # below the images, in the sentence, in the groups
    assert len(read.all("img", title=EVIL)) == 1
    assert "1,200 images were compared" in read.text
    assert "test images that are copies of training images: 2; groups in more than one split: 1" in read.text
    line = closing_table(found).splitlines()[-1]
    assert line.startswith("labelled images: test images that are copies of training images: 2; groups")
    assert line.endswith(
        "training labels that the teacher contradicts: 1. The report shows them; the list is /store/findings.parquet."
    )


def test_labelled_images_without_problems_are_one_line(tmp_path: Path) -> None:
    numbers = dict.fromkeys(("train_val", "train_test", "val_test", "torn_groups", "two_labels", "doubtful_labels"), 0)
    found = result(hygiene={"checked": 9, **numbers, "path": "x"})
    assert closing_table(found).splitlines()[-1] == (
        "labelled images: no copies in two splits and no contradicted labels were found."
    )
    assert "no label is contradicted" in page(tmp_path, found, hygiene=HygieneReport()).text
    assert "labelled images" not in closing_table(result())
