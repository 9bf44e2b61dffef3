"""Two processes, or more, that run a function together; tests look at what each of them found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import contrastive_ext as ce

WORLD = 2


def on_both_ranks(
    function: Callable[[int], dict], folder: Path, world: int = WORLD, backend: str = "gloo"
) -> list[dict]:
    """What `function(rank)` returns on each rank of a group; it stands in a module and returns what pickles."""
    mp.spawn(_run, (function, str(folder), world, backend), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _run(rank: int, function: Callable[[int], dict], folder: str, world: int, backend: str) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    torch.save(function(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_same(compared: list[tuple[str, Tensor, Tensor]]) -> None:
    """Float64 results of every label agree up to the order of sums."""
    assert compared
    for label, ours, expected in compared:
        # sums over shards in another order: absolute errors are those of the largest element
        atol = 1e-13 + 1e-12 * expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol, msg=lambda text, label=label: f"{label}: {text}")


def mine_of(rank: int, length: int, pairs: int, uneven: bool = False, world: int = WORLD) -> Tensor:
    """Indices of this rank's rows of `length` whose first `pairs` belong to pairs; the rest is shared out as well.

    uneven   shares are W, W - 1, ..., 1 of both
    """
    parts = torch.arange(pairs), torch.arange(pairs, length)
    if uneven:
        shares, all_shares = [sum(range(n)) for n in range(world, 1, -1)], sum(range(world + 1))
        cuts = [[len(x) - len(x) * rest // all_shares for rest in shares] for x in parts]
        return torch.cat([x.tensor_split(cut)[rank] for x, cut in zip(parts, cuts, strict=True)])
    return torch.cat([x.chunk(world)[rank] if len(x) else x for x in parts])


def shard(rank: int, options: dict, pairs: int, uneven: bool = False, world: int = WORLD) -> dict:
    """This rank's part of the keywords of a call with the whole batch of `pairs`."""

    def mine(x: Tensor, own: int = pairs) -> Tensor:
        return x[mine_of(rank, len(x), own, uneven, world)]

    local = dict(options)
    for name in ("ids", "labels", "positive_weight"):
        if name in options:
            local[name] = mine(options[name])
    if "guide" in options:
        guide = ce.Guide.of(options["guide"])
        local["guide"] = replace(guide, g1=mine(guide.g1), g2=mine(guide.g2))
    if "positives" in options:
        local["positives"] = options["positives"][:, mine_of(rank, pairs, pairs, uneven, world)]
    if "negatives" in options:  # [K, D] for all anchors are shared out, [B, n, D] belong to pairs
        local["negatives"] = mine(options["negatives"], len(options["negatives"]))
    return local


def averaged(gradients, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """What DistributedDataParallel makes of the gradients of the ranks, or of those of a group."""
    totals = [gradient.clone() for gradient in gradients]
    for total in totals:
        dist.all_reduce(total, group=group)
    return [total / dist.get_world_size(group) for total in totals]
