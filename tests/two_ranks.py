"""Two processes that run a function together; tests look at what each of them found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

WORLD = 2


def on_both_ranks(function: Callable[[int], dict], folder: Path) -> list[dict]:
    """What `function(rank)` returns on each rank of a gloo group; it stands in a module and returns what pickles."""
    mp.spawn(_run, (function, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _run(rank: int, function: Callable[[int], dict], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(minutes=2)
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
