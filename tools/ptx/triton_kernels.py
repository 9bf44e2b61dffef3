"""Kernels that Triton and Gluon have compiled, on the machine: launched with CPU tensors as with a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .bulk import TensorMap
from .machine import program
from .memory import GlobalMemory
from .report import Report
from .schedules import Schedule

SWIZZLES = (0, 32, 64, 128)  # bytes, by the number that the compiler writes down


class Arena:
    """Storages of tensors in global memory."""

    def __init__(self):
        self.memory = GlobalMemory()
        self.placed: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def address(self, tensor: torch.Tensor) -> int:
        """Of a tensor's first element; its whole storage comes along."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.placed:
            name = f"tensor {len(self.placed)} {list(tensor.shape)}"
            self.placed[storage.data_ptr()] = (
                storage,
                self.memory.place(_bytes(storage), name, storage.data_ptr() % 256),
            )
        return self.placed[storage.data_ptr()][1] + tensor.data_ptr() - storage.data_ptr()

    def take_back(self) -> None:
        """What the launch has written into the tensors."""
        for k, (storage, _) in enumerate(self.placed.values()):
            _bytes(storage)[:] = self.memory.array(self.memory.regions[k].name)


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _leaves(types: Any, values: Any):
    """(type, value) of everything inside of nested tuples that is no constant."""
    if isinstance(types, (tuple, list)):
        for inner, value in zip(types, values, strict=True):
            yield from _leaves(inner, value)
    elif types != "constexpr":
        yield types, values


def run_compiled(kernel: Any, grid: tuple[int, ...], values: list, schedule: Schedule, **options: Any) -> Report:
    """A launch of a compiled kernel with the values of all its arguments, constants included."""
    arena, arguments = Arena(), []
    descriptors = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for kind, value in _leaves(tuple(kernel.src.signature.values()), tuple(values)):
        if kind.startswith("*"):
            arguments.append(arena.address(value))
        elif kind.startswith("tensordesc"):
            arguments.append(_tensor_map(arena, value, next(descriptors)))
            arguments += [*value.shape, *value.strides]
        else:
            arguments.append(float(value) if kind in ("fp32", "fp64") else int(value))
    run = program(kernel.asm["ptx"])
    scratch = len(run.entry.parameters) - len(arguments)  # workspaces that nobody here asks for
    assert 0 <= scratch <= 2 and not kernel.metadata.global_scratch_size, kernel.metadata
    report = run.launch(
        grid, 32 * kernel.metadata.num_warps, arguments + [0] * scratch, arena.memory, shared=kernel.metadata.shared,
        schedule=schedule, lanes_may_differ=True, **options,
    )  # fmt: skip
    arena.take_back()
    return report


def _tensor_map(arena: Arena, descriptor: Any, meta: dict) -> TensorMap:
    base, element = descriptor.base, meta["elem_size"]
    assert element == base.element_size()
    return TensorMap(
        arena.address(base), element, tuple(reversed(descriptor.shape)),
        tuple(s * element for s in reversed(descriptor.strides[:-1])), tuple(reversed(meta["block_size"])),
        SWIZZLES[meta["swizzle"]],
    )  # fmt: skip


def launcher(schedule: Callable[[], Schedule], reports: list[tuple[str, Any, Report]], **options: Any) -> Callable:
    """What a launch does in place of the driver's; see launch_gate.pretend."""

    def of_kernel(kernel):
        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *values):
            report = run_compiled(kernel, (x, y, z), list(values), schedule(), **options)
            reports.append((kernel.metadata.name, kernel, report))

        return launch

    return of_kernel
