"""How quiet Ray's C++ core is after `connect`."""

import ctypes
import os

import pytest


def test_the_level_of_the_environment_holds_after_its_line_is_hidden(cluster):
    import ray._raylet

    library = ctypes.CDLL(ray._raylet.__file__)
    try:
        level = ctypes.c_int.in_dll(library, "_ZN3ray6RayLog19severity_threshold_E")
    except ValueError:
        pytest.skip("this build of Ray does not show the level")
    names = {"debug": -1, "info": 0, "warning": 1, "error": 2, "fatal": 3}
    assert level.value == names[os.environ["RAY_BACKEND_LOG_LEVEL"]]
