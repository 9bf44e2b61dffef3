"""Candidates of all ranks: gathered forward, their gradients summed back to the rank that owns them.

A rank keeps its own anchors and meets the candidates of all W ranks of a process group, in rank order. Its loss L_r is
the mean over its own anchors, as many on every rank: the loss of the whole batch is L = 1/W sum_r L_r. Backward, what
all ranks say about a column is added up, and the owner of z gets

    d(sum_r L_r)/dz = W dL/dz

DistributedDataParallel averages the parameters' gradients over ranks, which gives dL/dtheta exactly, and dL/dt for a
learned temperature. Gathering and summing back are adjoint to each other, so both can be differentiated again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .numerics import SUPPORTED_DTYPES

_FIELDS = ("number of rows", "row length", "dtype (0 fp16, 1 bf16, 2 fp32, 3 fp64)", "requires_grad")


@torch.compiler.disable  # reads numbers on the host
def agree(group: dist.ProcessGroup, **tensors: Tensor | None) -> None:
    """Raise on every rank unless all bring tensors of the same shape, dtype and need of a gradient; None has 0 rows.

    To be called before they are gathered: unequal shards would hang a collective or garble its result. Waits for the
    device. RuntimeError without torch.distributed, TypeError unless `group` is a process group with this process in it,
    ValueError with what each rank brings.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group was given, but torch.distributed is not initialised: call init_process_group first, "
            "or leave group=None."
        )
    if not isinstance(group, dist.ProcessGroup):  # where a process is no member new_group returns a placeholder
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process belongs to, or None; got {group!r}."
        )
    device = next(x.device for x in tensors.values() if x is not None)
    mine = torch.tensor([n for x in tensors.values() for n in _numbers(x)], device=device)
    what = [f"{field} of {name}" for name in tensors for field in _FIELDS]
    for same, values in zip(what, gather(mine[None], group).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"every rank of the group must bring the same {same}; got {values}, in rank order.")


def _numbers(x: Tensor | None) -> list[int]:
    if x is None:
        return [0] * len(_FIELDS)
    dtype = SUPPORTED_DTYPES.index(x.dtype) if x.dtype in SUPPORTED_DTYPES else -1
    return [len(x), x.shape[1:].numel(), dtype, int(x.requires_grad and torch.is_grad_enabled())]


def gather(local: Tensor, group: dist.ProcessGroup, wire: torch.dtype | None = None) -> Tensor:
    """Rows of every rank's `local` [n, ...], in rank order; a gradient goes back as the sum over ranks.

    wire   a dtype that holds the values of `local`, in which to send them; gradients travel in the dtype of `local`
    """
    return _Gather.apply(local, group, wire or local.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup, wire: torch.dtype) -> Tensor:
        ctx.group = group
        sent = local.to(wire).contiguous()
        everyone = sent.new_empty(dist.get_world_size(group) * len(sent), *sent.shape[1:])
        # torch 2.13 renamed the collectives of whole tensors; 2.10 has only the old names
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        collective(everyone, sent, group=group)
        return everyone.to(local.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumToOwner.apply(grad, ctx.group), None, None


class _SumToOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, everyone: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        own = everyone.new_empty(len(everyone) // dist.get_world_size(group), *everyone.shape[1:])
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        collective(own, everyone.contiguous(), group=group)
        return own

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.group), None
