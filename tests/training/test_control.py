import pytest
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)

from ktray.errors import KtrayError
from ktray.training.control import again


@pytest.mark.parametrize(
    ("error", "failures", "limit", "expected"),
    [
        (WorkerGroupStartupFailedError("a node died"), 0, 2, True),
        (RuntimeError("connectFullMesh failed"), 1, 2, True),
        (RuntimeError("connectFullMesh failed"), 2, 2, False),
        (RuntimeError("connectFullMesh failed"), 99, -1, True),
        (RuntimeError("connectFullMesh failed"), 0, 0, False),
        (WorkerGroupStartupTimeoutError(2), 99, 0, None),
        (InsufficientClusterResourcesError("never"), 0, -1, False),
        (KtrayError("Bad", "Mend."), 0, -1, False),
    ],
)
def test_a_failed_set_up_is_tried_again_within_bounds_and_waiting_is_no_failure(error, failures, limit, expected):
    assert again(error, failures, limit) is expected
