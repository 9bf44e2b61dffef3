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


def check_group(group: dist.ProcessGroup) -> None:
    """RuntimeError without torch.distributed, TypeError unless `group` is a process group with this process in it."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group was given, but torch.distributed is not initialised: call init_process_group first, "
            "or leave group=None."
        )
    if not isinstance(group, dist.ProcessGroup):  # where a process is no member new_group returns a placeholder
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process belongs to, or None; got {group!r}."
        )


@torch.compiler.disable  # reads numbers on the host
def agree(group: dist.ProcessGroup, device: torch.device, numbers: dict[str, int]) -> None:
    """ValueError on every rank, with the numbers of each, unless they are the same on all ranks of `group`.

    To be called before a gather: unequal shards would hang it or garble its result. Waits for the device.
    """
    mine = torch.tensor(list(numbers.values()), device=device)
    for name, values in zip(numbers, gather(mine[None], group).T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"every rank of the group must bring the same {name}; got {values}, in rank order.")


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
