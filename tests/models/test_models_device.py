"""A process uses a GPU only if it was assigned one, whatever torch sees."""

import pytest
import torch

from ktray.models import device as module


@pytest.fixture(autouse=True)
def nobody_has_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_assigned", None)


@pytest.mark.parametrize(("seen", "assigned", "kind"), [
    (True, None, "cuda"), (True, True, "cuda"), (True, False, "cpu"),
    (False, None, "cpu"), (False, True, "cpu"), (False, False, "cpu"),
])  # fmt: skip
def test_the_device_is_the_assigned_one(
    monkeypatch: pytest.MonkeyPatch, seen: bool, assigned: bool | None, kind: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    if assigned is not None:
        module.assign(assigned)
    assert module.device().type == kind
