"""The roofline: hand calculations, and the distance to what was measured on a GPU."""

import pytest
import timm

from ktray.accounting.roofline import cpu_seconds, gpu_seconds
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.traffic import forward_traffic, train_traffic


def test_arithmetic_and_memory_are_added():
    # H100: 60% of 989 TFLOP/s, 80% of 3.35 TB/s, 2 bytes a value.
    expected = 1e15 / (0.6 * 989e12) + 2 * 1e12 / (0.8 * 3.35e12)
    assert gpu_seconds(1e15, 1e12, "NVIDIA H100 80GB HBM3") == pytest.approx(expected)
    assert gpu_seconds(1e15, 0, "NVIDIA L40S") < gpu_seconds(1e15, 0, "NVIDIA L4")
    assert gpu_seconds(1e15, 1e12, "Unheard-of 9000") == gpu_seconds(1e15, 1e12, "NVIDIA L4")
    assert cpu_seconds(6e10, 2) == 1.0


@pytest.mark.parametrize(
    ("model", "train", "measured", "factor"),
    [("vit_small_patch16_224", True, 5603, 1.3), ("vit_large_patch14_dinov2", False, 2308, 1.6)],
)
def test_transformers_are_planned_near_what_an_h200_reached(model, train, measured, factor):
    size = {"img_size": 224} if "dinov2" in model else {}
    built = on_meta(lambda: timm.create_model(model, num_classes=1000 if train else 0, **size))
    flops, values = (train_flops, train_traffic) if train else (forward_flops, forward_traffic)
    planned = 1 / gpu_seconds(flops(built, (3, 224, 224)), values(built, (3, 224, 224)), "NVIDIA H200")
    assert measured / factor < planned < measured * factor
