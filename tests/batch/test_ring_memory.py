"""Peak memory of a rank at a fixed batch per rank: a ring holds as much on four ranks as on two, a gather does not."""

from __future__ import annotations

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import contrastive_ext as ce
from contrastive_ext.batch import ring
from peak_memory import RETURN_BLOCKS, needs_proc
from two_ranks import on_both_ranks

PAIRS, FEATURES = 128, 4096  # of a rank; many features, so that memory is vectors and time is short
SHARD = 2 * PAIRS * FEATURES * 4  # bytes of two views
BACKEND = "cpu" if "cpu" in ce.available_backends() else "torch"
WORLDS = (1, 2, 4)
NOISE = 2**20 / SHARD  # resident pages come and go
WAYS = ("ring", "overlapping ring", "gather")
pytestmark = needs_proc


def _resident(field: str) -> int:
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _growth_of_the_peak(group: ce.AllRanks) -> int:
    z1, z2 = (torch.randn(PAIRS, FEATURES).requires_grad_() for _ in range(2))
    dist.barrier(group.group)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _resident("VmRSS")
    ce.fused_infonce_loss(z1, z2, 0.1, backend=BACKEND, group=group).backward()
    return _resident("VmHWM") - before


def _peaks(rank: int) -> dict[tuple[str, int], int]:
    """By how columns travel and number of ranks, of which the first take part."""
    found = {}
    for world in WORLDS:
        some = dist.new_group(range(world))
        for name in WAYS if rank < world else ():
            ring.OVERLAPS["cpu"] = name.startswith("overlapping")
            group = ce.AllRanks(some, exchange="gather" if name == "gather" else "ring")
            found[name, world] = min(_growth_of_the_peak(group) for _ in range(2))  # a first call touches what all have
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, dict[int, float]]:
    """Peaks in shards by how columns travel and number of ranks, the largest among them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RETURN_BLOCKS.items():
            patch.setenv(name, value)
        ranks = on_both_ranks(_peaks, tmp_path_factory.mktemp("ranks"), WORLDS[-1])
    return {n: {w: max(rank[n, w] for rank in ranks[:w]) / SHARD for w in WORLDS} for n in WAYS}


def test_a_ring_holds_as_much_on_four_ranks_as_on_two(shards):
    peaks = shards["ring"]
    assert peaks[4] <= 1.1 * peaks[2], peaks


# beside the computation two more are on their way: a shard that comes, a gradient that goes home
@pytest.mark.parametrize("name, more", [("ring", 4), ("overlapping ring", 6)])
def test_a_ring_holds_few_shards_more_than_a_rank_alone(shards, name, more):
    peaks = shards[name]
    assert peaks[4] - peaks[1] <= more + NOISE, peaks


def test_a_gather_holds_the_shards_of_all_ranks(shards):
    """So that these measurements can tell the two apart."""
    peaks = shards["gather"]
    assert peaks[4] - peaks[2] > 3, peaks
    assert peaks[4] > shards["ring"][4] + 3, shards


@pytest.mark.parametrize("exchange, world", list(itertools.product(("ring", "gather"), WORLDS[1:])))
def test_the_estimate_knows(shards, exchange, world, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in the measurement
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    estimate = ce.estimate_memory(PAIRS, FEATURES, world_size=world, exchange=exchange, backend=BACKEND)
    measured = shards[exchange][world] * SHARD
    assert measured / 1.5 <= estimate.fused <= 1.5 * measured, (estimate, measured)
