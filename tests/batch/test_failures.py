"""Failure drills on three gloo ranks: one is killed between forward and backward, one is late by seconds.

Ranks that say different things, dtypes or a frozen side among them: test_distributed_calls.py and test_ring.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import contrastive_ext as ce
from rows import random_pairs
from two_ranks import assert_same

WORLD, PAIRS, FEATURES = 3, 4, 5  # pairs of a rank
TIMEOUT = 15  # seconds of the group
LATE = 3
EXCHANGES = ("gather", "ring")


def _inputs(rank: int) -> list[torch.Tensor]:
    mine = slice(rank * PAIRS, (rank + 1) * PAIRS)
    torch.manual_seed(0)
    return [z[mine].requires_grad_() for z in random_pairs(WORLD * PAIRS, FEATURES, torch.float64)]


def _killed(rank: int, exchange: str) -> dict:
    loss = ce.fused_infonce_loss(*_inputs(rank), group=ce.AllRanks(exchange=exchange))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        loss.backward()
    except RuntimeError as error:
        return {"said": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    return {"said": "nothing"}


def _late(rank: int) -> dict:
    found = {}
    for exchange in EXCHANGES:
        z = _inputs(rank)
        time.sleep(LATE if rank == 1 else 0)
        loss = ce.fused_infonce_loss(*z, group=ce.AllRanks(exchange=exchange))
        time.sleep(LATE if rank == 1 else 0)
        loss.backward()
        found[exchange] = loss.detach(), z[0].grad
    return found


def _run(rank: int, drill: Callable, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    torch.save(drill(rank), f"{folder}/{rank}.pt")


def _drilled(drill: Callable, folder: Path) -> list[dict | None]:
    """What each rank found, None of one that ended without a word; mp.spawn would end the others with it."""
    spawn = mp.get_context("spawn")
    ranks = [spawn.Process(target=_run, args=(rank, drill, str(folder))) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(4 * TIMEOUT)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} ranks still wait after {4 * TIMEOUT} s"
    files = [folder / f"{rank}.pt" for rank in range(WORLD)]
    return [torch.load(file) if file.exists() else None for file in files]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_killed_rank_ends_the_others_within_the_timeout(exchange, tmp_path):
    first, killed, last = _drilled(partial(_killed, exchange=exchange), tmp_path)
    assert killed is None
    for survivor in (first, last):
        assert survivor is not None
        said = survivor["said"].lower()
        assert "error" in said and any(word in said for word in ("closed by peer", "reset by peer", "timed out")), said
        assert survivor["seconds"] < TIMEOUT + 2


def test_a_late_rank_is_waited_for(tmp_path):
    z = [torch.cat(parts).detach().requires_grad_() for parts in zip(*map(_inputs, range(WORLD)), strict=True)]
    rows = ce.fused_infonce_loss(*z, reduction="none").view(2, WORLD, PAIRS)
    (gradient,) = torch.autograd.grad(rows.mean(), z[:1])
    for rank, found in enumerate(_drilled(_late, tmp_path)):
        assert found is not None
        mine = WORLD * gradient[rank * PAIRS : (rank + 1) * PAIRS]
        for exchange, (loss, own) in found.items():
            assert_same([(exchange, loss, rows[:, rank].mean().detach()), (exchange, own, mine)])
