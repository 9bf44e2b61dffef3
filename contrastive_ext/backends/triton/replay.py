"""Calls that only launch kernels, replayed: what they launch follows from sizes and options, so it is worked out once.

The third call of a kind allocates what the second has allocated and launches what it has launched, with its own tensors
in the places of the others: no tile is chosen, no argument put together or examined by Triton, which is most of what a
small batch costs on the host. A kind is all that a launch may depend on: options, sizes, dtypes, alignments, the
precision of products, tiles that autotune prefers. The second call is watched: where PyTorch computes something itself,
or a tensor comes from elsewhere, calls of this kind go on as written.

Every launch of the backend goes through `start`: one beside it would be missing in a replay.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import launch

MOST_KINDS = 256  # remembered; a training of ever new sizes must not fill the memory
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEW = ("alias", "as_strided", "detach", "expand", "select", "slice", "t", "transpose", "unsqueeze", "view")

_running = threading.local()
_everyone: list[Replayed] = []


def forget() -> None:
    """Every call from here on is of a kind that was never seen."""
    for replayed in _everyone:
        replayed.forget()


def recordings() -> int:
    """How many kinds of call are replayed by now."""
    return sum(recording is not None for replayed in _everyone for recording in replayed.kinds.values())


def start(kernel, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
    """kernel[grid](*args, **more)."""
    watch = getattr(_running, "watch", None)
    if watch is None:
        kernel[grid](*args, **more)
        return
    with _disable_current_modes():  # the interpreter copies tensors
        compiled = kernel[grid](*args, **more)
    named = dict(zip(kernel.arg_names, args, strict=False)) | more
    watch.launches.append((compiled or kernel, (*grid, 1, 1)[:3], [named[name] for name in kernel.arg_names]))


class Replayed:
    """`function(*tensors, *options)` -> tensors; replayed where it is nothing but launches."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function = function
        self.kinds: dict[Hashable, Recording | None] = {}
        self.seen: set[Hashable] = set()
        _everyone.append(self)

    def __call__(self, tensors: tuple[Tensor | None, ...], options: tuple[Hashable, ...]) -> tuple[Tensor, ...]:
        assert tensors[0] is not None
        preferred = launch.kernels().configs.preferred
        facts = tuple([x if x is None else _facts(x) for x in tensors])
        kind = (options, facts, launch.kind_of_products(tensors[0]), tuple(preferred.items()))
        recording = self.kinds.get(kind)
        if recording is not None:
            return recording.replay(tensors)
        if kind not in self.seen or kind in self.kinds:
            if len(self.seen) >= MOST_KINDS:
                self.forget()
            self.seen.add(kind)
            return self.function(*tensors, *options)
        with _Watch(tensors) as watch:
            results = self.function(*tensors, *options)
        self.kinds[kind] = watch.recording(results)
        return results

    def forget(self) -> None:
        """Every kind of call is a new one."""
        self.seen.clear()
        self.kinds.clear()


def _facts(x: Tensor) -> tuple[Hashable, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


class Recording(NamedTuple):
    """What a call did.

    allocations  size, strides, dtype, device of what it allocated, None where nobody used it; with its tensors, in this
                 order, the sources
    launches     kernel with its grid, arguments, and which of them hold tensors: (position, what finds them)
    results      positions of its results among the sources
    lines        of the table of tiles that it asked for, for autotune
    """

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device] | None]
    launches: list[tuple[Callable[..., Any], list[Any], list[tuple[int, Any]]]]
    results: list[int]
    lines: set

    def replay(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """The same with other tensors."""
        assert tensors[0] is not None
        launch.kernels().configs.asked.update(self.lines)
        sources: list[Any] = [*tensors]
        with launch.on_device(tensors[0].device):
            for made in self.allocations:
                if made is not None:
                    size, stride, dtype, device = made
                    sources.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
                else:
                    sources.append(None)
            for run, constant, places in self.launches:
                arguments = constant.copy()
                for position, place in places:
                    arguments[position] = place.find(sources)
                run(*arguments)
        return tuple([sources[i] for i in self.results])


class _Place(NamedTuple):
    """A tensor that begins `offset` numbers after the source of this position; kernels ask for addresses alone."""

    source: int
    offset: int

    def find(self, sources: list[Any]) -> Tensor:
        base = sources[self.source]
        return base if self.offset == 0 else base.as_strided((1,), (1,), base.storage_offset() + self.offset)


class _Group(NamedTuple):
    """A tuple with tensors in it."""

    parts: tuple[Any, ...]

    def find(self, sources: list[Any]) -> tuple[Any, ...]:
        return tuple([part.find(sources) if isinstance(part, _FINDS) else part for part in self.parts])


class _Descriptor(NamedTuple):
    """A tensor descriptor."""

    descriptor: Any
    base: _Place

    def find(self, sources: list[Any]) -> Any:
        found = object.__new__(type(self.descriptor))  # of checked sizes
        found.__dict__.update(self.descriptor.__dict__, base=self.base.find(sources))
        return found


_FINDS = (_Place, _Group, _Descriptor)


class _Elsewhere(Exception):
    """A tensor that is neither an argument nor allocated by the call."""


class _Watch(TorchDispatchMode):
    """Notes what a call allocates and launches."""

    def __init__(self, tensors: tuple[Tensor | None, ...]):
        super().__init__()
        self.sources: list[Tensor | None] = [*tensors]  # alive: no address serves two of them
        self.number, self.launches, self.computes = len(tensors), [], False  # type: int, list, bool
        self.used: set[int] = set()
        self.configs = launch.kernels().configs

    def __enter__(self):
        self.asked = set(self.configs.asked)
        self.configs.asked.clear()
        _running.watch = self
        return super().__enter__()

    def __exit__(self, *error):
        _running.watch = None
        self.lines = set(self.configs.asked)
        self.configs.asked |= self.asked
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ALLOCATE:
            self.sources.append(result)
        elif name not in VIEW:
            self.computes = True
        return result

    def recording(self, results: tuple[Tensor, ...]) -> Recording | None:
        """What it noted; None: such a call cannot be replayed."""
        given = [x for x in self.sources[: self.number] if x is not None]
        spans = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in given)
        overlap = any(first[1] > second[0] for first, second in itertools.pairwise(spans))
        if self.computes or overlap or not all(x.is_contiguous() for x in given):
            return None
        try:
            launches = [(kernel[grid], *self._located(arguments)) for kernel, grid, arguments in self.launches]
            places = [self._place(x) for x in results]
        except _Elsewhere:
            return None
        if not all(self._is_whole(place, x) for place, x in zip(places, results, strict=True)):
            return None
        allocations = [
            (tuple(x.shape), x.stride(), x.dtype, x.device) if x is not None and i in self.used else None
            for i, x in enumerate(self.sources[self.number :], self.number)
        ]
        return Recording(allocations, launches, [place.source for place in places], self.lines)

    def _is_whole(self, place: _Place, x: Tensor) -> bool:
        source = self.sources[place.source]
        return source is not None and place.offset == 0 and (source.shape, source.stride()) == (x.shape, x.stride())

    def _located(self, arguments: list[Any]) -> tuple[list[Any], list[tuple[int, Any]]]:
        """The arguments with None for those that hold tensors, and how to find those."""
        found = [self._find(x) for x in arguments]
        constant = [None if isinstance(x, _FINDS) else x for x in found]
        return constant, [(i, x) for i, x in enumerate(found) if isinstance(x, _FINDS)]

    def _find(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._place(value)
        if isinstance(value, tuple):
            parts = tuple(self._find(part) for part in value)
            return _Group(parts) if any(isinstance(part, _FINDS) for part in parts) else value
        if hasattr(value, "block_shape"):
            without_base = copy.copy(value)
            without_base.base = None
            return _Descriptor(without_base, self._place(value.base))
        return value

    def _place(self, x: Tensor) -> _Place:
        found = next((_Place(i, 0) for i, source in enumerate(self.sources) if source is x), None)
        for i, source in enumerate(self.sources):
            if found is None and source is not None and (source.dtype, source.device) == (x.dtype, x.device):
                offset = (x.data_ptr() - source.data_ptr()) // x.element_size()
                found = _Place(i, offset) if 0 <= offset < source.numel() else None
        if found is None:
            raise _Elsewhere
        self.used.add(found.source)
        return found
