"""Candidates of all ranks: gathered forward, their gradients summed back to the rank that owns them.

A rank keeps its own anchors and meets the candidates of all W ranks of a process group, in rank order. Its loss L_r is
the mean over its own anchors, as many on every rank: the loss of the whole batch is L = 1/W sum_r L_r. Backward, what
all ranks say about a column is added up, and the owner of z gets

    d(sum_r L_r)/dz = W dL/dz

DistributedDataParallel averages the parameters' gradients over ranks, which gives dL/dtheta exactly, and dL/dt for a
learned temperature. Gathering and summing back are adjoint to each other, so both can be differentiated again.

Ranks that say different things would hang a collective, garble its result or mean different losses. Hence a function
with `group=` is one of `across_ranks`: it checks its arguments, calls `agree`, and only then gathers.
"""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable)
# What ranks may say differently: it changes neither values nor which collectives run.
_OWN_BUSINESS = ("backend", "return_stats", "group")


@dataclass(frozen=True)
class AllRanks:
    """`group=AllRanks()`: all ranks of the default process group, which is looked up at every call.

    It may be given to a module before `init_process_group`, is copied and pickled like a number, and raises a
    RuntimeError where a call finds torch.distributed not initialised. `torch.distributed.group.WORLD` is None until
    then, and None means this rank alone.
    """


def across_ranks(function: _Function) -> _Function:
    """Let `function`, which has a keyword `group`, be called with a process group or `AllRanks`.

    It has to call `agree(group)` once, after its checks and before any collective. An error until then is told to the
    other ranks, which raise too instead of waiting. The whole call stays outside the graphs of torch.compile, so that
    values and gradients are those of eager mode with every compiler.
    """
    parameters = inspect.signature(function).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    @functools.wraps(function)
    def call(*args, group=None, **options):
        if group is None or isinstance(group, _Call):  # alone, or called by a function that has begun the call
            return function(*args, group=group, **options)
        from .outside_graphs import outside_graphs

        said = {**defaults, **dict(zip(parameters, args, strict=False)), **options}
        return outside_graphs(_together, function, args, group, options, said)

    return cast(_Function, call)


def agree(group: object) -> dist.ProcessGroup | None:
    """The process group, once every rank is known to make the same call; None for None.

    Ranks compare two numbers, a checksum and the length of what they say, in one small collective: on the host where
    the group has a backend for it ("cpu:gloo,cuda:nccl"), else on the accelerator, which is then waited for.
    ValueError on every rank where one refused its arguments or they differ, naming ranks and arguments.
    """
    if group is None:
        return None
    assert isinstance(group, _Call), "only functions of across_ranks agree"
    group.agree()
    return group.group


def size(group: object) -> int:
    """How many ranks will call the function of `across_ranks` that was given this group; 1 without any."""
    return dist.get_world_size(group.group) if isinstance(group, _Call) else 1


def own_rows(local: Tensor, group: dist.ProcessGroup) -> slice:
    """Where the rows of `local` stand among those that `gather` brings."""
    begin = dist.get_rank(group) * local.shape[0]
    return slice(begin, begin + local.shape[0])


def gather(local: Tensor, group: dist.ProcessGroup, wire: torch.dtype | None = None) -> Tensor:
    """Rows of every rank's `local` [n, ...], in rank order; a gradient goes back as the sum over ranks.

    wire   a dtype that holds the values of `local`, in which to send them; gradients travel in the dtype of `local`
    """
    return _Gather.apply(local, group, wire or local.dtype)


def _together(function: Callable, args: tuple, group: object, options: dict, said: dict[str, Any]):
    """The call of a function of `across_ranks` on this rank, whatever the others do with theirs."""
    call = _Call(_process_group(group), function.__name__, said)
    try:
        result = function(*args, group=call, **options)
    except Exception as error:
        if not call.has_met:
            call.refuse(error)
        raise
    assert call.has_met, f"{function.__name__} must call agree(group)"
    return result


def _process_group(group: object) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group was given, but torch.distributed is not initialised: call init_process_group first, "
            "or leave group=None."
        )
    if isinstance(group, AllRanks):
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # where a process is no member new_group returns a placeholder
        raise TypeError(
            "group must be AllRanks(), a torch.distributed.ProcessGroup that this process belongs to, or None; "
            f"got {group!r}."
        )
    return group


class _Call:
    """A call that every rank of a group makes: its name, its arguments, and whether the ranks have met over it."""

    def __init__(self, group: dist.ProcessGroup, name: str, arguments: dict[str, Any]):
        self.group, self.name, self.arguments = group, name, arguments
        self.has_met = False

    def agree(self) -> None:
        """ValueError unless all ranks say the same."""
        said = {n: _describe(x) for n, x in self.arguments.items() if n not in _OWN_BUSINESS}
        everyone = self._meet({"function": self.name, **said})
        for rank, other in enumerate(everyone):
            if "refused" in other:
                raise ValueError(f"rank {rank} of the group refused this call: {other['refused']}")
        values = {name: [other.get(name, "missing") for other in everyone] for other in everyone for name in other}
        different = {name: _by_rank(x) for name, x in values.items() if len(set(x)) > 1}
        if "function" in different:  # its arguments differ too
            different = {"function": different["function"]}
        if different:
            what = "; ".join(f"{name} is {value}" for name, value in different.items())
            raise ValueError(f"every rank of the group must make the same call, but {what}.")

    def refuse(self, error: Exception) -> None:
        """Tell the others, who are waiting in `agree`, why this rank raises."""
        self._meet({"refused": f"{type(error).__name__}: {error}"})

    def _meet(self, said: dict[str, str]) -> list[dict[str, str]]:
        """What every rank says, in rank order; nothing if all say the same."""
        self.has_met = True
        text = json.dumps(said, sort_keys=True).encode()
        device = self._device()
        mine = torch.tensor([[zlib.crc32(text), len(text)]], device=device)
        everyone = _all_gather(mine, self.group).tolist()
        if all(x == everyone[0] for x in everyone):
            return []
        longest = max(length for _, length in everyone)
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)[None].to(device)
        return [json.loads(bytes(row)) for row in _all_gather(padded, self.group).tolist()]

    def _device(self) -> torch.device:
        served = [pair.partition(":")[0] for pair in dist.get_backend_config(self.group).split(",")]
        if "cpu" in served:
            return torch.device("cpu")
        for x in self.arguments.values():
            if isinstance(x, Tensor) and x.device.type in served:
                return x.device
        return torch.device(served[0], torch.accelerator.current_device_index())


def _by_rank(values: list[str]) -> str:
    """ "'one_way' on rank 0, 'two_view' on ranks 1, 2"; of many ranks the first few."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, same in ranks.items():
        some = ", ".join(map(str, same[:8])) + (f", ... ({len(same)} of them)" if len(same) > 8 else "")
        parts.append(f"{value} on rank{'s' if len(same) > 1 else ''} {some}")
    return ", ".join(parts)


def _describe(x: object) -> str:
    """What has to be equal on all ranks: of tensors all but the values, of others the value, or the type."""
    if isinstance(x, Tensor):
        gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
        return f"{x.dtype} {list(x.shape)} on {x.device.type}{gradient}"
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(_describe, x))})"
    if is_dataclass(x):
        values = (f"{f.name}={_describe(getattr(x, f.name))}" for f in fields(x))
        return f"{type(x).__name__}({', '.join(values)})"
    if x is None or isinstance(x, (str, Number, torch.dtype, nn.Module)):
        return repr(x)
    return type(x).__name__  # a repr may hold an address


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    everyone = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    # torch 2.13 renamed the collectives of whole tensors; 2.10 has only the old names
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(everyone, local, group=group)
    return everyone


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup, wire: torch.dtype) -> Tensor:
        ctx.group = group
        return _all_gather(local.to(wire).contiguous(), group).to(local.dtype)

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
