"""What is held on machines with different prices, against sums worked out by hand."""

import pytest

from ktray.accounting.held import Held, Machine, cluster_holds, workers_hold

CHEAP = Machine("a", {"cores": 2, "gpus": [], "instance": "cheap"})
DEAR = Machine("b", {"cores": 2, "gpus": [], "instance": "dear"})
L4 = Machine("c", {"cores": 16, "gpus": [{"name": "NVIDIA L4"}] * 2}, gpus=2)
H100 = Machine("d", {"cores": 16, "gpus": [{"name": "NVIDIA H100 80GB HBM3"}] * 4}, gpus=4)
NEW = Machine("e", {"cores": 16, "gpus": [{"name": "Unheard-of 9000"}]}, gpus=1)
PRICES = {"cheap": 0.1, "dear": 0.5, "L4": 1.0, "H100": 7.0}


def test_workers_hold_their_gpus_or_their_machines():
    assert workers_hold([L4, H100, H100], 1.0, PRICES) == Held(3.0, 15.0)
    assert workers_hold([H100], 0.25, PRICES) == Held(0.25, 1.75)
    assert workers_hold([CHEAP, CHEAP, DEAR], 0.0, PRICES) == Held(2.0, pytest.approx(0.6))
    assert workers_hold([L4, NEW], 1.0, PRICES) == Held(2.0, None)


def test_a_stage_on_the_cluster_holds_the_gpus_and_the_machines_without():
    assert cluster_holds([CHEAP, DEAR], 0.0, 1.0, PRICES) == Held(2.0, pytest.approx(0.6))
    # 6 GPUs at 2 x 1 + 4 x 7, and a machine that decodes.
    assert cluster_holds([L4, H100, DEAR], 6.0, 1.0, PRICES) == Held(7.0, 30.5)
    # One of two jobs: half of everything.
    assert cluster_holds([L4, H100, DEAR], 3.0, 0.5, PRICES) == Held(3.5, pytest.approx(15.25))
    assert cluster_holds([CHEAP, DEAR] * 2, 0.0, 0.5, PRICES) == Held(2.0, pytest.approx(0.6))
    assert cluster_holds([], 0.0, 1.0, PRICES) == Held(1.0, None)
    # Two jobs on one machine hold it both.
    assert cluster_holds([DEAR], 0.0, 0.5, PRICES) == Held(1.0, 0.5)


def test_some_of_the_devices_have_the_mean_price():
    assert Held(4, 10.0).of(2) == Held(2, 5.0)
    assert Held(4, None).of(2) == Held(2, None)
