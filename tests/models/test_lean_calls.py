"""The optimizers and the counter do what torch's own do, and do not import the compiler."""

import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ktray.models import lean_calls as lean

X, Y = torch.randn(32, 5, generator=torch.manual_seed(0)), torch.arange(32) % 3


def fitted(kind, options, model):
    """The weights after some steps, of which some follow a restart from the state; and the last state."""
    optimizer = kind(model.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    for step in range(6):
        if step == 3:
            state = deepcopy(optimizer.state_dict())
            optimizer = kind(model.parameters(), **options)
            optimizer.load_state_dict(state)
        loss = optimizer.step(closure)
        assert loss.requires_grad
    return [p.detach().clone() for p in model.parameters()], optimizer.state_dict()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 0.1, "betas": (0.9, 0.99), "fused": True}),
        ("AdamW", {"lr": 0.1, "weight_decay": 0.3, "foreach": False}),
        ("LBFGS", {"max_iter": 5, "line_search_fn": "strong_wolfe"}),
    ],
)
def test_weights_and_state_are_those_of_torchs_own(name, options, monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    expected, expected_state = fitted(getattr(torch.optim, name), options, deepcopy(model))
    monkeypatch.setattr(lean, "sys", SimpleNamespace(modules={}))  # as if nobody had imported the compiler
    weights, state = fitted(getattr(lean, name), options, deepcopy(model))
    assert not torch.equal(weights[0], model.weight)
    for value, other in zip(weights, expected, strict=True):
        assert torch.equal(value, other)
    assert state["param_groups"] == expected_state["param_groups"]
    torch.testing.assert_close(state["state"], expected_state["state"], rtol=0, atol=0)


def test_hooks_of_a_step_are_called(monkeypatch):
    monkeypatch.setattr(lean, "sys", SimpleNamespace(modules={}))
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # from now on, torch's own class is wrapped for hooks
    for kind in (lean.AdamW, lean._lean(torch.optim.AdamW)):
        weight = nn.Parameter(torch.ones(1))
        optimizer, seen = kind([weight]), []
        optimizer.register_step_post_hook(lambda *arguments, seen=seen: seen.append(1))
        weight.sum().backward()
        optimizer.step()
        assert seen == [1]


def _python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# If the case of torch's own fails, the installed torch no longer needs ours.
@pytest.mark.parametrize(
    ("module", "imported"), [("ktray.models.lean_calls", False), ("torch.optim", True)], ids=["ours", "torch's"]
)
def test_optimizers_do_not_import_the_compiler(module, imported):
    assert (
        _python(f"""
import sys, torch
from {module} import AdamW, LBFGS
for kind in (AdamW, LBFGS):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.sum() < 3
print('torch._dynamo' in sys.modules)
""")
        == f"{imported}\n"
    )


@pytest.mark.parametrize(
    ("module", "imported"),
    [("ktray.models.lean_calls", False), ("torch.utils.flop_counter", True)],
    ids=["ours", "torch's"],
)
def test_counting_does_not_import_the_compiler(module, imported):
    assert (
        _python(f"""
import sys, torch
from {module} import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    torch.ones(2, 3) @ torch.ones(3, 5)
print('torch._dynamo' in sys.modules, counter.get_total_flops())
""")
        == f"{imported} 60\n"
    )


def test_once_the_compiler_is_imported_torchs_own_methods_are_called():
    assert (
        _python("""
import sys, torch
from ktray.models.lean_calls import without_compiler
called = []
def plain(x): called.append("plain"); return x
excluded = torch._disable_dynamo(plain)
lean = without_compiler(excluded)
assert lean(1) == 1 and 'torch._dynamo' not in sys.modules
import torch._dynamo
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(lambda x: lean(x + 1) * 2, backend=backend)
assert compiled(torch.ones(1)) == 4 and called == ["plain"] * 2
print(len(graphs))  # before and after the call that is excluded
""")
        == "2\n"
    )
