"""Candidates of all ranks: gathered forward, their gradients summed back to the rank that owns them.

A rank keeps its own anchors and meets the candidates of all W ranks of a process group, in rank order. Its loss L_r is
the mean over its own anchors, as many on every rank: the loss of the whole batch is L = 1/W sum_r L_r. Backward, what
all ranks say about a column is added up, and the owner of z gets

    d(sum_r L_r)/dz = W dL/dz

DistributedDataParallel averages the parameters' gradients over ranks, which gives dL/dtheta exactly, and dL/dt for a
learned temperature. Gathering and summing back are adjoint to each other, so both can be differentiated again. Where
ranks may have other numbers of anchors, n_r of n in all, L = 1/W sum_r (W n_r / n) L_r: the factor is `Ranks.share`.

Ranks that say different things would hang a collective, garble its result or mean different losses. Hence a function
with `group=` is one of `across_ranks`: it checks its arguments, calls `agree`, and only then gathers.
"""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from numbers import Number
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_choice

EXCHANGES = ("gather", "ring")
Exchange = Literal["gather", "ring"]
_Function = TypeVar("_Function", bound=Callable)
# What ranks may say differently: it changes neither values nor which collectives run.
_OWN_BUSINESS = ("backend", "return_stats", "group")
# What may have another number of rows with `uneven`. Rows are the last axis but one, of vectors the only one.
_OF_ROWS = (
    "z1", "z2", "ids", "labels", "guide", "positive_index", "negatives", "positives", "positive_weight", "tau_plus",
    "temperature", "logit_scale", "row_loss", "features", "views", "support", "queries", "teacher", "keys", "q", "k",
    "q_mix", "perm", "theta",
)  # fmt: skip


@dataclass(frozen=True)
class AllRanks:
    """`group=AllRanks()`: all ranks of the default process group, which is looked up at every call.

    It may be given to a module before `init_process_group`, is copied and pickled like a number, and raises a
    RuntimeError where a call finds torch.distributed not initialised. `torch.distributed.group.WORLD` is None until
    then, and None means this rank alone.

    group     a process group in place of the default one; with it, it is copied and pickled as that group is
    exchange  "gather": a rank holds the columns of all W ranks and their gradient, O(W B D). "ring": it holds those of
              one other rank at a time, O(B D), and makes two turns per set of columns, forward and backward (losses
              over pairs or labelled rows; not for backend="reference" and exact ranks, which need all columns at
              once). Same values and gradients up to the order of sums; every call of a rank repeats bit for bit. Steps
              are as many as ranks: for batches that a gather cannot hold, of at least some thousand rows per rank
    uneven    ranks may have other numbers of rows, as in the last batch of an epoch. A rank's "mean" is then multiplied
              by W n_r / n, W ranks, n_r rows that enter its mean, n those of all ranks: the ranks' values average to
              the mean over all rows, and their gradients to its gradient. "sum" and "none" are as ever. Every set of
              columns costs one more small exchange. A rank without any row raises, on all ranks
    """

    group: dist.ProcessGroup | None = None
    _: KW_ONLY
    exchange: Exchange = "gather"
    uneven: bool = False

    def __post_init__(self) -> None:
        check_choice("exchange", self.exchange, EXCHANGES)
        if not isinstance(self.uneven, bool):
            raise TypeError(f"uneven must be True or False; got {self.uneven!r:.60}.")


@dataclass(frozen=True)
class Ranks:
    """The ranks that make the same call, and what this rank's mean counts for in theirs."""

    group: dist.ProcessGroup
    device: torch.device  # where small numbers travel
    exchange: Exchange = "gather"
    uneven: bool = False
    share: float = 1.0  # W n_r / n

    def rows(self, local: Tensor) -> Rows:
        """Whose rows are where, once `local` of all ranks is gathered; with `uneven` the ranks have to exchange it."""
        n, world = local.shape[0], dist.get_world_size(self.group)
        if not self.uneven:
            return Rows(self.group, (n,) * world)
        return Rows(self.group, tuple(_all_gather(torch.tensor([n], device=self.device), self.group).tolist()))

    def mean(self, number: Tensor) -> Tensor:
        """The mean over ranks of a 0-d tensor of theirs."""
        return _all_gather(number[None], self.group).mean()


@dataclass(frozen=True)
class Rows:
    """Rows of all ranks in rank order, and how many each of them has."""

    group: dist.ProcessGroup
    numbers: tuple[int, ...]

    @property
    def own(self) -> slice:
        """Where this rank's are."""
        rank = dist.get_rank(self.group)
        begin = sum(self.numbers[:rank])
        return slice(begin, begin + self.numbers[rank])

    @property
    def differ(self) -> bool:
        """Whether ranks have other numbers of rows."""
        return len(set(self.numbers)) > 1

    def gather(self, local: Tensor, wire: torch.dtype | None = None) -> Tensor:
        """Every rank's `local` [n, ...]; a gradient goes back as the sum over ranks.

        wire   a dtype that holds the values of `local`, in which to send them; gradients travel in the dtype of `local`
        """
        return _Gather.apply(local, self, wire or local.dtype)


def across_ranks(function: _Function) -> _Function:
    """Let `function`, which has a keyword `group`, be called with a process group or `AllRanks`.

    It has to call `agree` once, after its checks and before any collective. An error until then is told to the other
    ranks, which raise too instead of waiting. The whole call stays outside the graphs of torch.compile, so that
    values and gradients are those of eager mode with every compiler.
    """
    parameters = inspect.signature(function).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    @functools.wraps(function)
    def call(*args, group=None, **options):
        if group is None or isinstance(group, _Call):  # alone, or called by a function that has begun the call
            return function(*args, group=group, **options)
        said = {**defaults, **dict(zip(parameters, args, strict=False)), **options}
        if not torch.compiler.is_compiling():
            return _together(function, args, group, options, said)
        from .outside_graphs import outside_graphs

        return outside_graphs(_together, function, args, group, options, said)

    return cast(_Function, call)


def agree(group: object, rows: int = 1) -> Ranks | None:
    """All ranks, once every one is known to make the same call; None for None.

    rows   how many enter the mean of this rank, or a multiple that is the same on all ranks

    Ranks exchange three numbers, a checksum and the length of what they say and their rows, in one small collective: on
    the host where the group has a backend for it ("cpu:gloo,cuda:nccl"), else on the accelerator, which is then waited
    for. ValueError on every rank where one refused its arguments or they differ, naming ranks and arguments.
    """
    if group is None:
        return None
    assert isinstance(group, _Call), "only functions of across_ranks agree"
    return group.agree(rows)


def check_gathers(group: object, reason: str) -> None:
    """ValueError with the reason if the function of `across_ranks` that was given this group is to use a ring."""
    if isinstance(group, _Call) and group.exchange == "ring":
        raise ValueError(f"exchange='ring' is not possible here: {reason} Use AllRanks(exchange='gather').")


def size(group: object) -> int:
    """How many ranks will call the function of `across_ranks` that was given this group; 1 without any."""
    return dist.get_world_size(group.group) if isinstance(group, _Call) else 1


def _together(function: Callable, args: tuple, group: object, options: dict, said: dict[str, Any]):
    """The call of a function of `across_ranks` on this rank, whatever the others do with theirs."""
    how = group if isinstance(group, AllRanks) else AllRanks()
    call = _Call(_process_group(group), function.__name__, said, how)
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
        group = dist.group.WORLD if group.group is None else group.group
    if not isinstance(group, dist.ProcessGroup):  # where a process is no member new_group returns a placeholder
        raise TypeError(
            "group must be AllRanks(), a torch.distributed.ProcessGroup that this process belongs to, or None; "
            f"got {group!r}."
        )
    return group


class _Call:
    """A call that every rank of a group makes: its name, its arguments, and whether the ranks have met over it."""

    def __init__(self, group: dist.ProcessGroup, name: str, arguments: dict[str, Any], how: AllRanks):
        self.group, self.name, self.arguments = group, name, arguments
        self.exchange, self.uneven = how.exchange, how.uneven
        self.has_met = False

    def agree(self, rows: int) -> Ranks:
        """What the ranks are to each other; ValueError unless all say the same."""
        said = {n: self._said_of(n, x) for n, x in self.arguments.items() if n not in _OWN_BUSINESS}
        how = {"function": self.name, "exchange": self.exchange, "uneven": repr(self.uneven)}
        numbers, everyone = self._meet(how | said, rows)
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
        share = rows * len(numbers) / sum(numbers) if self.uneven else 1.0
        return Ranks(self.group, self._device(), self.exchange, self.uneven, share)

    def _said_of(self, name: str, x: object) -> str:
        if not self.uneven or name not in _OF_ROWS:
            return _describe(x)
        return _describe(x, first=name == "negatives", uneven=True)  # [B, n, D] of these

    def refuse(self, error: Exception) -> None:
        """Tell the others, who are waiting in `agree`, why this rank raises."""
        self._meet({"refused": f"{type(error).__name__}: {error}"})

    def _meet(self, said: dict[str, str], rows: int = 0) -> tuple[list[int], list[dict[str, str]]]:
        """The rows of every rank and what each says, in rank order; nothing of this if all say the same."""
        self.has_met = True
        text = json.dumps(said, sort_keys=True).encode()
        device = self._device()
        mine = torch.tensor([[zlib.crc32(text), len(text), rows]], device=device)
        everyone = _all_gather(mine, self.group).tolist()
        numbers = [n for *_, n in everyone]
        if all(x[:2] == everyone[0][:2] for x in everyone):
            return numbers, []
        longest = max(length for _, length, _ in everyone)
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)[None].to(device)
        return numbers, [json.loads(bytes(row)) for row in _all_gather(padded, self.group).tolist()]

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


def _describe(x: object, first: bool = False, uneven: bool = False) -> str:
    """What has to be equal on all ranks: of tensors all but the values, of others the value, or the type.

    uneven  the number of rows may differ; `first`: rows are the first axis of everything
    """
    if isinstance(x, Tensor):
        gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
        shape = list(map(str, x.shape))
        if uneven and shape:
            shape[0 if first else max(-2, -len(shape))] = "*"
        return f"{x.dtype} [{', '.join(shape)}] on {x.device.type}{gradient}"
    if isinstance(x, (tuple, list)):
        return f"({', '.join(_describe(y, first, uneven) for y in x)})"
    if is_dataclass(x):
        values = (f"{f.name}={_describe(getattr(x, f.name), first, uneven)}" for f in fields(x))
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
    def forward(ctx, local: Tensor, rows: Rows, wire: torch.dtype) -> Tensor:
        ctx.rows = rows
        most = max(rows.numbers)
        everyone = _all_gather(_padded(local.to(wire), most).contiguous(), rows.group)
        if rows.differ:
            everyone = torch.cat([x[:n] for x, n in zip(everyone.split(most), rows.numbers, strict=True)])
        return everyone.to(local.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumToOwner.apply(grad, ctx.rows), None, None


class _SumToOwner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, everyone: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        most = max(rows.numbers)
        if rows.differ:
            everyone = torch.cat([_padded(x, most) for x in everyone.split(rows.numbers)])
        own = everyone.new_empty(most, *everyone.shape[1:])
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        collective(own, everyone.contiguous(), group=rows.group)
        return own[: rows.numbers[dist.get_rank(rows.group)]]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.gather(grad), None


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros at its end."""
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
