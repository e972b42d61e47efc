import math

import pytest
import torch

from ktray.data.mixing import mixup
from ktray.models.maps import resize_map
from ktray.objectives.matching import ClassMatching, MapMatching, SetMatching, ValueMatching, by_position
from ktray.objectives.oriented import Oriented


def pixel_loss(student: torch.Tensor, targets: torch.Tensor, temperature: float) -> float:
    """The equation of the module, one position after the other."""
    resized = torch.nn.functional.interpolate(student, targets.shape[2:], mode="bilinear").double()
    n, classes, rows, columns = targets.shape
    total = 0.0
    for i in range(n):
        for y in range(rows):
            for x in range(columns):
                scores = [math.exp(float(resized[i, c, y, x]) / temperature) for c in range(classes)]
                for c in range(classes):
                    p = float(targets[i, c, y, x])
                    total += p * (math.log(p) - math.log(scores[c] / sum(scores))) if p > 0 else 0.0
    return temperature**2 * total / (n * rows * columns)


def pixelwise(student: torch.Tensor, teacher: torch.Tensor, objective: Oriented, seed: int = 0) -> torch.Tensor:
    objective.match_with(MapMatching())
    batch = {"images": torch.rand(len(teacher), 3, 8, 8), "logits": teacher}
    batch = objective.prepare(batch, torch.Generator().manual_seed(seed))
    return objective.loss(student, batch)["loss"]


@pytest.mark.parametrize("grid", [(3, 4), (6, 8), (2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_pixelwise_kl_equals_a_sum_over_positions(grid, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, *grid), 2 * torch.randn(2, 5, 3, 4)
    loss = pixelwise(student, teacher, Oriented(temperature=temperature))
    assert float(loss) == pytest.approx(pixel_loss(student, (teacher / temperature).softmax(1), temperature), rel=1e-5)


def test_mixup_mixes_maps_as_it_mixes_images():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    loss = pixelwise(student, teacher, Oriented(mixup=0.5), seed=5)
    _, mixed = mixup(torch.rand(4, 3, 8, 8), teacher.softmax(1), 0.5, torch.Generator().manual_seed(5))
    assert not torch.allclose(mixed, teacher.softmax(1))
    assert float(loss) == pytest.approx(pixel_loss(student, mixed, 1.0), rel=1e-5)


def test_a_student_that_agrees_everywhere_has_no_loss_and_no_gradient():
    teacher = torch.randn(2, 4, 3, 3)
    student = (teacher + 3).requires_grad_()
    loss = pixelwise(student, teacher, Oriented(temperature=2.0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_rows_are_positions_of_the_teachers_map_in_order():
    student, targets = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 5)
    out, rows = by_position(student, targets)
    assert out.shape == rows.shape == (40, 3)
    assert torch.equal(rows[1 * 20 + 2 * 5 + 3], targets[1, :, 2, 3])
    assert torch.allclose(out[1 * 20 + 2 * 5 + 3], resize_map(student, (4, 5))[1, :, 2, 3])


def test_logits_of_images_are_maps_of_one_position():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    images, maps = ClassMatching(), MapMatching()
    found = images.loss(student, images.targets(teacher, 2.0), 2.0)
    expected = maps.loss(student[:, :, None, None], maps.targets(teacher[:, :, None, None], 2.0), 2.0)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert found["agreement"] == expected["agreement"]


def test_numbers_are_matched_by_their_squared_error():
    objective = Oriented(temperature=3.0)
    objective.match_with(ValueMatching())
    batch = objective.prepare(
        {"images": torch.rand(2, 3, 4, 4), "logits": torch.tensor([[1.0], [4.0]])}, torch.Generator()
    )
    assert objective.loss(torch.tensor([[2.0], [2.0]]), batch)["loss"].item() == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sets_match_class_by_class_by_the_divergence_of_two_outcomes(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4), 3 * torch.randn(3, 4)
    teacher[0, 0], teacher[1, 1] = 200.0, -200.0  # certain predictions
    objective = Oriented(temperature=temperature)
    objective.match_with(SetMatching())
    batch = objective.prepare({"images": torch.rand(3, 3, 8, 8), "logits": teacher}, torch.Generator())
    found = objective.loss(student, batch)
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        q, p = (1 / (1 + math.exp(-z / temperature)) for z in (s, t))
        total += sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 1e-30)
    assert float(found["loss"]) == pytest.approx(temperature**2 * total / 12, rel=1e-5)
    agree = ((student > 0) == (teacher > 0)).float().mean()
    assert float(found["agreement"]) == pytest.approx(float(agree))


def test_a_student_that_agrees_on_every_set_has_no_loss_and_no_gradient():
    teacher = torch.tensor([[2.0, -3.0, 0.1], [0.0, 50.0, -1.0]])
    matching, student = SetMatching(), teacher.clone().requires_grad_()
    loss = matching.loss(student, matching.targets(teacher, 2.0), 2.0)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6
