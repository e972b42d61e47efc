from itertools import pairwise

import pytest
import torch

from ktray.training.virtual_ranks import MOST, ranks_of_worker, virtual_ranks
from ktray.training.worker import WorkerContext


@pytest.mark.parametrize("of", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_each_lane_has_one_worker_and_workers_share_alike(world, of):
    shares = [ranks_of_worker(rank, world, of) for rank in range(world)]
    assert [lane for part in shares for lane in part] == list(range(of))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_fixed_number_of_workers_has_a_lane_each():
    assert [virtual_ranks(n, n, 50) for n in (1, 3, 8)] == [1, 3, 8]


@pytest.mark.parametrize(
    ("low", "high", "batches", "expected"),
    [
        (1, 2, (64,), 2),
        (1, 4, (60,), 12),  # as many for each of 1, 2, 3 and 4 workers
        (1, 4, (64,), 8),  # of three workers two have three lanes
        (1, 3, (64, 24), 8),  # lanes divide both batches
        (1, 4, (53,), 4),  # nothing divides a prime: rows are rounded up
        (2, 4, (3,), 4),
    ],
)
def test_lanes_divide_the_batches_and_even_out_the_workers(low, high, batches, expected):
    assert virtual_ranks(low, high, *batches) == expected


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 4), (2, 6), (1, 8), (4, 16)])
@pytest.mark.parametrize("batch", [16, 48, 64, 512])
def test_every_worker_has_a_lane_and_none_much_more_than_its_share(low, high, batch):
    of = virtual_ranks(low, high, batch)
    assert high <= of <= MOST * high
    assert batch % of == 0
    for world in range(low, high + 1):
        counts = [len(ranks_of_worker(rank, world, of)) for rank in range(world)]
        assert min(counts) >= 1
        assert max(counts) * world / of < 2
    assert all(a <= b for a, b in pairwise([ranks_of_worker(0, w, of).stop for w in range(high, low - 1, -1)]))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_mean_over_workers_of_weighted_losses_is_the_mean_over_the_whole_batch(world):
    batch = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    losses = []
    rows = 0
    for rank in range(world):
        env = WorkerContext(torch.device("cpu"), rank, world, 1.0, span=(1, 4)).divide(64)
        mine = batch[env.own_ranks.start * env.rows(64) : env.own_ranks.stop * env.rows(64)]
        losses.append(env.weight * (mine**2).mean())
        rows += len(mine)
        assert env.max_ranks == env.rank_count == 8, "one worker alone feeds all virtual ranks"
    assert rows == len(batch)
    torch.testing.assert_close(torch.stack(losses).mean(), (batch**2).mean())
