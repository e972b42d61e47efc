"""`connect`: the level of the log of Ray's C++ core, and the messages of a start that is slow or fails."""

import ctypes
import os
import time

import pytest

from ktray.distributed import connect as module
from ktray.distributed.explain import RESOURCES, exit_code
from ktray.errors import ResourceError


def test_the_level_of_the_environment_holds_after_its_line_is_hidden(cluster):
    import ray._raylet

    library = ctypes.CDLL(ray._raylet.__file__)
    try:
        level = ctypes.c_int.in_dll(library, "_ZN3ray6RayLog19severity_threshold_E")
    except ValueError:
        pytest.skip("this build of Ray does not show the level")
    names = {"debug": -1, "info": 0, "warning": 1, "error": 2, "fatal": 3}
    assert level.value == names[os.environ["RAY_BACKEND_LOG_LEVEL"]]


def test_the_address_that_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "check_answers", lambda address, **_: seen.append(address))
    monkeypatch.setattr("ktray.distributed.ray_internals.address_of_this_machine", lambda: "10.0.0.1:6379")
    found = [module._answering(address) for address in ("auto", "head:6379", "local")]
    assert found == ["10.0.0.1:6379 (auto)", "head:6379", "local"]
    assert seen == ["10.0.0.1:6379", "head:6379"]


def test_a_ray_that_starts_slowly_says_so_and_one_that_gives_up_is_no_fault_of_ktray(monkeypatch, caplog):
    monkeypatch.setattr(module, "_SLOW_START_S", 0.01)
    with caplog.at_level("INFO", "ktray"), module._slow_start_told():
        time.sleep(0.2)
    assert "Ray is starting" in caplog.text
    with pytest.raises(ResourceError, match="overloaded") as found, module._slow_start_told():
        raise Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed"
        )
    assert exit_code(found.value) == RESOURCES
    with pytest.raises(ValueError, match="another"), module._slow_start_told():
        raise ValueError("another error")
