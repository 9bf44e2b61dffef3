"""A first-in first-out queue of past keys: extra negatives without gradient (MoCo, He et al. 2020)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import numerics
from ..checks import can_read, check_tensor, describe
from ..numerics import SUPPORTED_DTYPES
from ..problem.pairs import NO_COLUMN_ID, UNFILLED, integers
from . import distributed

# Unit rows in bfloat16 are off unit length by up to 2^-8; a cosine beyond this is none.
LARGEST_COSINE = 1.01

_looked = False
_warned = False


class NegativeQueue(nn.Module):
    """The last `size` keys, as negatives for any loss: `loss(z1, z2, queue=queue)`, then `queue.enqueue(keys)`.

    size       K, keys held
    dim        D, features of a key
    dtype      storage dtype; float16 or bfloat16 halves the memory
    normalize  store keys as the losses take z1 and z2: unit rows, made in float32 (float64) before they are rounded to
               `dtype`; zero rows stay zero. False: as given, for losses with normalize=False, which refuse unit rows

    Rows that were never filled are ignored as negatives; they do not act as zero vectors. Everything is a persistent
    buffer (data, ids, pointer, count), so a checkpoint restores the queue exactly, and nothing is read on the host, so
    it works under torch.compile and never waits for the device.

    Several processes: `enqueue(keys, group=AllRanks())` keeps the queue equal on all ranks, as the losses expect. In a
    module under DistributedDataParallel anything else is lost: `broadcast_buffers` (on by default) overwrites all four
    buffers with those of rank 0 at the beginning of every forward.
    """

    data: Tensor
    ids: Tensor
    pointer: Tensor
    count: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, device=None, normalize: bool = True):
        super().__init__()
        if not all(isinstance(x, int) and x >= 1 for x in (size, dim)):
            raise ValueError(f"size and dim must be integers >= 1; got size={size!r}, dim={dim!r}.")
        if dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"dtype must be a floating-point dtype of 16, 32 or 64 bits; got {dtype!r}.")
        self.normalize = normalize
        self.register_buffer("data", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("ids", torch.full((size,), UNFILLED, dtype=torch.int64, device=device))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    @distributed.across_ranks
    @torch.no_grad()
    def enqueue(
        self,
        keys: Tensor,
        ids: Tensor | None = None,
        *,
        group: dist.ProcessGroup | distributed.AllRanks | None = None,
    ) -> None:
        """Append keys [n, D] (any n; of more than K the last K stay), overwriting the oldest.

        ids    [n] integers > -2^63 + 2, to ignore a key for anchors of the same id
        group  `AllRanks()` or a torch.distributed process group: keys of all its ranks are appended in rank order, so
               that the queue stays the same everywhere; every rank must bring the same n, or any
               n with `AllRanks(uneven=True)`. Keys are gathered, whatever the exchange of the losses
        """
        size, dim = self.data.shape
        device = self.data.device
        check_tensor("keys", keys)
        if keys.dim() != 2 or keys.shape[1] != dim or not keys.is_floating_point() or keys.device != device:
            raise ValueError(f"keys must be floating-point [n, {dim}] on {device}; got {describe(keys)}.")
        if ids is None:
            ids = torch.full((keys.shape[0],), NO_COLUMN_ID, dtype=torch.int64, device=device)
        else:
            ids = integers("ids", ids, keys.shape[0], device)
        keys = keys.detach()
        ranks = distributed.agree(group)
        if ranks is not None:
            everyone = ranks.rows(keys)
            keys, ids = everyone.gather(keys), everyone.gather(ids)
        appended = keys.shape[0]
        last = torch.arange(max(0, appended - size), appended, device=self.data.device)
        slots = (self.pointer + last) % size
        self.data.index_copy_(0, slots, self._stored(keys[-size:]))
        self.ids.index_copy_(0, slots, ids[-size:])
        self.pointer.add_(appended).remainder_(size)
        self.count.add_(appended).clamp_(max=size)

    def _stored(self, keys: Tensor) -> Tensor:
        if self.normalize:
            with numerics.without_autocast(keys):
                dtypes = (numerics.stats_dtype(x.dtype) for x in (keys, self.data))
                keys = numerics.normalize(keys.to(torch.promote_types(*dtypes)))
        return keys.to(self.data.dtype)

    def extra_repr(self) -> str:
        return (
            f"size={self.data.shape[0]}, dim={self.data.shape[1]}, dtype={self.data.dtype}, normalize={self.normalize}"
        )


def check_lengths(queue: Tensor | NegativeQueue | None, normalize: bool, name: str = "queue") -> None:
    """ValueError where a loss takes rows as they are and the queue's are unit rows.

    With `normalize` the rows of a queue should have unit length too. A CPU looks at the first queue that holds any;
    elsewhere looking would wait for the device, and `LossStats.to_dict` notices.
    """
    global _looked
    if isinstance(queue, NegativeQueue):
        if queue.normalize and not normalize:
            raise ValueError(
                f"with normalize=False the loss takes rows as given, but this {name} holds unit rows: make it "
                "NegativeQueue(..., normalize=False)."
            )
        queue = queue.data
    if queue is None or not normalize or not can_read(queue) or _looked or numerics.in_torch_func():
        return
    length = torch.linalg.vector_norm(queue.detach(), dim=1, dtype=numerics.stats_dtype(queue.dtype))
    length = length[length != 0]  # unfilled, or a memory that begins with zeros
    _looked = length.numel() > 0
    if bool(((length - 1).abs() > LARGEST_COSINE - 1).any()):
        warn_of_lengths(f"{name} holds rows of length {length.min().item():.3g} to {length.max().item():.3g}")


def warn_of_lengths(found: str) -> None:
    """Warn once that a queue's rows are not of unit length although the loss normalises."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"contrastive_ext: {found}, though normalize=True scales z1 and z2 to unit length: a queue is used as "
            "given, and longer rows outweigh all others. Keep keys in a NegativeQueue, which normalises them, or "
            "normalise the tensor.",
            stacklevel=2,
        )
