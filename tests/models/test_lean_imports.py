"""In processes of their own, because a module is imported once in a process."""

import subprocess
import sys

import pytest


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["torchvision", "timm.data", "ktray.stages.transfer"])
def test_nothing_imports_the_compiler(name):
    _python(f"import sys, ktray, {name}; assert not [name for name in sys.modules if 'torch._dynamo' in name]")


def test_torchvision_still_imports_it_on_its_own():
    # If this fails, a version of torchvision is installed that does not need ktray.models.lean_imports.
    _python("import sys, torchvision; assert 'torch._dynamo.utils' in sys.modules")


def test_the_compiler_and_roi_align_work_afterwards():
    _python("""
import sys, ktray, torchvision, torch
assert torchvision.__spec__.loader is torchvision.__loader__ and "Lean" not in type(torchvision.__loader__).__name__
from torchvision.ops import roi_align
image, box = torch.arange(16.0).reshape(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 4, 4]])
expected = [[2.5, 4.5], [10.5, 12.5]]  # by hand: means of four bilinear samples at 0.5 and 1.5, 2.5 and 3.5, aligned
assert torch.allclose(roi_align(image, box, 2, sampling_ratio=2, aligned=True)[0, 0], torch.tensor(expected))
from torchvision.ops.roi_align import is_compile_supported
import torch._dynamo.utils
assert is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
assert torch._dynamo.utils.__file__ and torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
""")


def test_who_asks_for_more_while_torchvision_is_imported_gets_the_real_module():
    _python("""
import sys, torch
from ktray.models import lean_imports
with lean_imports._stand_ins():
    import torch._dynamo
    assert "__file__" not in vars(torch._dynamo)
    from torch._dynamo import config
    import torch._dynamo.config
    assert config is torch._dynamo.config and sys.modules["torch._dynamo"].__file__
assert sys.modules["torch._dynamo.utils"].__file__
""")


def test_what_timm_excludes_from_compilation_stays_excluded():
    _python("""
import sys, torch
from ktray.models import lean_imports
with lean_imports._stand_ins():
    @torch.compiler.disable
    def told(x):
        return x + torch.compiler.is_compiling()
assert not [name for name in sys.modules if "torch._dynamo" in name]
assert told(torch.zeros(1)) == 0
assert torch.compile(lambda x: told(x) * 2, backend="eager")(torch.zeros(1)) == 0
assert torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")(torch.zeros(1)) == 1
""")


def test_a_compiler_that_is_imported_already_stays():
    _python("""
import sys, torch._dynamo.utils
before = sys.modules["torch._dynamo.utils"]
import ktray, torchvision
assert sys.modules["torch._dynamo.utils"] is before and torchvision.ops.roi_align is not None
""")


def test_installing_twice_changes_nothing():
    assert (
        _python("""
import sys, ktray
from ktray.models import lean_imports
lean_imports.install()
print(sum(isinstance(finder, lean_imports._LeanFinder) for finder in sys.meta_path))
""").strip()
        == "1"
    )
