"""Columns of all ranks that come round, one foreign shard at a time: the transport.

    step 0     rank r computes with its own shard
    step s     with that of rank r - s, which rank r - 1 has sent and which goes on to rank r + 1

After W - 1 steps every rank has met every shard. The gradient of a foreign shard goes straight home, to rank r - s,
which adds up what arrives in the order of the steps: the same bits every time, and nothing held that grows with W.

On accelerators the next shard and the gradient of the last step travel while a step computes: NCCL works on a stream of
its own, which `batch_isend_irecv` starts and `wait` joins. On CPUs, where both would use the same cores, they travel
between the steps, which holds less at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import Rows

OVERLAPS = {"cpu": False}  # by device type, others do: whether transfers run beside the computation


@dataclass(frozen=True)
class Ring:
    """Rows of all ranks, as shards that come round."""

    rows: Rows
    wire: torch.dtype  # holds the values of the vectors
    device: torch.device

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.rows.numbers)

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return dist.get_rank(self.rows.group)

    @property
    def others(self) -> int:
        """How many rows the other ranks have."""
        return sum(self.rows.numbers) - self.rows.numbers[self.rank]

    @property
    def overlaps(self) -> bool:
        """Whether transfers run beside the computation."""
        return OVERLAPS.get(self.device.type, True)

    def round(self, vectors: Tensor, *beside: Tensor | None) -> Iterator[tuple]:
        """Own vectors [n, D] and what is known beside of each (None stays None), then the same of every other rank."""
        shard = [vectors.to(self.wire), *(x for x in beside if x is not None)]
        travelling = self._pass_on(shard, 1) if self.overlaps and self.size > 1 else None
        yield (vectors, *beside)
        for step in range(1, self.size):
            shard = (travelling or self._pass_on(shard, step)).arrived()
            travelling = self._pass_on(shard, step + 1) if self.overlaps and step + 1 < self.size else None
            known = iter(shard[1:])
            yield (shard[0].to(vectors.dtype), *(None if x is None else next(known) for x in beside))

    def exchange(self, sent: list[Tensor], to: int, rows: int, source: int) -> _Transfer:
        """Send tensors to one rank while another's, the same but of `rows` rows, are received."""
        sent = [x.contiguous() for x in sent]
        received = [x.new_empty(rows, *x.shape[1:]) for x in sent]
        group = self.rows.group
        operations = [dist.P2POp(dist.isend, x, group=group, group_peer=to % self.size) for x in sent]
        operations += [dist.P2POp(dist.irecv, x, group=group, group_peer=source % self.size) for x in received]
        return _Transfer(dist.batch_isend_irecv(operations), sent, received)

    def _pass_on(self, shard: list[Tensor], step: int) -> _Transfer:
        """The shard that comes with this step, in exchange for the one before it."""
        return self.exchange(shard, self.rank + 1, self.rows.numbers[self.rank - step], self.rank - 1)


class Homeward:
    """Gradients of foreign shards on their way to the ranks that own them.

    own   that of this rank's shard, to which what comes is added in place; without a ring nothing does
    """

    def __init__(self, ring: Ring | None, own: Tensor):
        self._ring, self._own = ring, own
        self._coming: _Transfer | None = None

    def send(self, gradient: Tensor, step: int) -> None:
        """That of the shard of this step; what the rank which has this rank's shard in it has found comes back."""
        self._add()
        ring = self._ring
        assert ring is not None
        self._coming = ring.exchange([gradient], ring.rank - step, self._own.shape[0], ring.rank + step)
        if not ring.overlaps:
            self._add()

    def arrived(self) -> Tensor:
        """Own, all that was sent home added to it."""
        self._add()
        return self._own

    def _add(self) -> None:
        if self._coming is not None:
            (found,) = self._coming.arrived()
            self._coming = None
            self._own += found


@dataclass
class _Transfer:
    """What travels, held until it has arrived."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[Tensor]

    def arrived(self) -> list[Tensor]:
        """What was received."""
        for work in self.works:
            work.wait()
        self.sent = []
        return self.received
