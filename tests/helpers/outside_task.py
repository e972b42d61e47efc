"""Another package's task kind, regression of one number, as the text of its module, and images for it."""

import csv
from pathlib import Path

import numpy as np
from outside import write_package
from PIL import Image

MODULE = '''
"""Regression: one number for each image, from a list path,label,split."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.labelled.decode import NumberReader
from ktray.data.labelled.forms import read_rows
from ktray.data.labelled.labelled_set import divide
from ktray.models.student.classifier import Student
from ktray.models.student.classifier_io import load_student, save_student
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.objectives.matching import ValueMatching
from ktray.recipe.registries import TASKS
from ktray.tasks.base import FittedHeads, TaskKind


class Regressor(Student):
    def decide(self, logits, sizes):
        return logits[:, 0].tolist()


def least_squares(features, values):
    """A linear head on features of unit length."""
    x = F.normalize(features.double(), dim=1)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    penalty = 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    found = torch.linalg.solve(x.T @ x + penalty, x.T @ values.double())
    return LinearHead(found[None, :-1].float(), found[-1:].float())


class Regression(TaskKind):
    metrics = {"r2": "coefficient of determination"}
    matching = ValueMatching()
    linear_student = True
    student_file = "regression.txt"

    def read(self, data, part):
        notes = []
        rows = read_rows(data, notes)
        values = {row.key: float(row.label) for row in rows}
        return divide(
            [replace(row, label="") for row in rows],
            classes=lambda rows: ["value"],
            label=lambda row, number: values[row.key],
            seed=part.split_seed,
            val_fraction=part.val_fraction,
            test_fraction=part.test_fraction,
            budget=part.labels,
            notes=notes,
            facts=sorted(values.items()),
        )

    def reader(self, task, whole=False):
        return NumberReader("float32")

    def loss(self, out, targets):
        return F.mse_loss(out[:, 0], targets)

    def tally(self, out, targets):
        error, y = (out[:, 0] - targets).double(), targets.double()
        parts = [error.square(), y, y.square(), torch.ones_like(y), error.square(), torch.ones_like(y)]
        return torch.stack([part.sum() for part in parts])

    def scores(self, counts):
        squared, total, squares, n = counts
        return {"r2": float(1 - squared / (squares - total**2 / n))}

    def fit_heads(self, teacher, train, val, settings):
        head = least_squares(train.embedding, train.targets)
        _, scores = self.calibrate(head(val.embedding).detach(), val.targets)
        return FittedHeads({"probe": AdaptedTeacher(teacher, head, ["value"])}, {"probe": scores}, 0.0)

    def calibrate(self, out, targets):
        return 1.0, {**self.scores(self.tally(out, targets)[:4].numpy()), "loss": float(self.loss(out, targets))}

    def student_head(self, train, val, outputs):
        return least_squares(*train)

    def build_student(self, *args, **options):
        student = super().build_student(*args, **options)
        return Regressor(student.model, student.name, student.kwargs, student.preprocess, student.classes)

    def save_student(self, student, folder, classes):
        save_student(student, folder, classes)
        (folder / self.student_file).write_text("one number")

    def load_student(self, folder, device="cpu"):
        found = load_student(folder, device)
        return Regressor(found.model, found.name, found.kwargs, found.preprocess, found.classes).eval()

    def test_rows(self, out, columns):
        return {"": out}, None

    def image_counts(self, rows, model):
        y = rows["label"].astype(np.float64)
        return np.stack([(rows[model][:, 0] - y) ** 2, y, y**2, np.ones_like(y)], 1)


TASKS.register("regression")(Regression())
'''


def write_regression(folder: Path) -> Path:
    """The package and its entry point; returns ``folder``, which goes on the path."""
    return write_package(
        folder, "toyvalue", {"regression.py": MODULE}, {"ktray.tasks": {"regression": "toyvalue.regression"}}
    )


def write_lights(folder: Path, labelled: int = 60, gallery: int = 60) -> tuple[Path, Path]:
    """A list of pictures with how bright they are, 0 to 1, and a folder of more without."""
    rng = np.random.default_rng(0)

    def picture(value: float, path: Path) -> None:
        image = 30 + 190 * value + rng.normal(0, 20, (36, 36, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)

    for name in ("images", "gallery"):
        (folder / name).mkdir(parents=True)
    rows = []
    for i in range(labelled):
        value, split = float(rng.random()), ("train", "train", "val", "test")[i % 4]
        picture(value, folder / f"images/{i}.png")
        rows.append([f"images/{i}.png", value, split])
    for i in range(gallery):
        picture(float(rng.random()), folder / f"gallery/{i}.png")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    return folder / "labels.csv", folder / "gallery"
