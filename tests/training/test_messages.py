"""Messages reach the driver through processes that have loaded neither torch nor Ray Train."""

import pickle
import subprocess
import sys

import pytest

from ktray.training.messages import BadImages, ControllerState, CurvePoint, Started, StepProgress, TeacherFlops

MESSAGES = [
    Started(0, 0, 0.0, workers=2, nodes=("a", "a")),
    StepProgress(3, 24, 300.0, data_wait=0.1),
    CurvePoint(3, {"loss": 0.5}),
    BadImages((("a.png", "truncated"),)),
    TeacherFlops(7.0),
    ControllerState("restarting", "worker 1: died"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_where_torch_is_not_loaded(message):
    code = (
        "import pickle, sys\n"
        "print(pickle.loads(sys.stdin.buffer.read()))\n"
        "assert not {'torch', 'ray'} & sys.modules.keys(), 'the mailbox would have to load them'\n"
    )
    read = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(message), capture_output=True, check=False)
    assert read.returncode == 0, read.stderr.decode()
    assert read.stdout.decode().strip() == repr(message)
