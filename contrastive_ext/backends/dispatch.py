"""Which backend computes a call: one ordered table, one reason per backend that cannot.

`backend="auto"` takes the first backend of the table that can and, on a GPU, prefers one whose kernels are proven on
that architecture (`VERIFIED`). A named backend never falls back: it runs or raises with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..numerics import in_torch_func
from ..problem.problem import Problem, Statistics, Upstream
from ..problem.ranking import RankedStatistics
from ..problem.short_road import WholeLossOps
from . import cpu, cuda, native
from .torch import kept as torch_kept
from .torch import ranked_stats as torch_ranked
from .torch import row_stats as torch_blocks
from .torch import whole_loss as torch_whole_loss
from .triton import ranked_stats as triton_ranked
from .triton import row_stats as triton
from .triton import top_columns as triton_top_columns
from .triton import whole_loss as triton_whole_loss
from .verified import VERIFIED

REFERENCE = "reference"  # dense and differentiable twice; computed by the losses themselves, see reference.py


@dataclass(frozen=True)
class Backend:
    """A way to compute `Statistics` and `RankedStatistics` and their gradients; `why_not` says why it cannot, or None.

    `needs_proof`: its kernels count as working only where VERIFIED names a results file for the architecture.
    `whole_loss`: its operators of the short road for inputs of a dtype and so many exponentials, or None.
    `kept`: the module with its forward and backward of small problems, which keep their matrix, or None.
    `note`: what a user should know who takes it; `explain` shows it.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype, torch.dtype, int], str | None]
    forward: Callable[..., Statistics]
    backward: Callable[[Problem, Upstream], tuple[Tensor, Tensor]]
    top_columns: Callable[..., tuple[Tensor, Tensor]]
    ranked_forward: Callable[..., RankedStatistics]
    ranked_backward: Callable[..., tuple[Tensor, Tensor]]
    whole_loss: Callable[[torch.dtype, int], WholeLossOps | None] = lambda dtype, numbers: None
    kept: ModuleType | None = None
    needs_proof: bool = False
    note: str = ""


def _backend(module, ranked, lists, **more) -> Backend:
    return Backend(
        module.NAME, module.why_not, module.forward, module.backward, lists.top_columns,
        ranked.ranked_forward, ranked.ranked_backward, **more,
    )  # fmt: skip


BACKENDS: tuple[Backend, ...] = (
    _backend(cuda, cuda, cuda, needs_proof=True, note=cuda.NOTE),
    _backend(triton, triton_ranked, triton_top_columns, whole_loss=triton_whole_loss.whole_loss, needs_proof=True),
    _backend(cpu, cpu, cpu, whole_loss=cpu.whole_loss),
    _backend(torch_blocks, torch_ranked, torch_blocks, whole_loss=torch_whole_loss.whole_loss, kept=torch_kept),
)

_announced: set[tuple[str, str]] = set()


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, in the order `auto` tries them; "reference" is last."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    runs = [b.name for b in BACKENDS if any(b.why_not(d, torch.float32, torch.float32, 128) is None for d in devices)]
    return [*runs, REFERENCE]


def backend_names() -> list[str]:
    """Every name `backend=` accepts."""
    return ["auto", *(b.name for b in BACKENDS), REFERENCE]


def check_backend_name(name: str) -> None:
    """ValueError for a name that is not in the table, RuntimeError under torch.func unless it is the reference."""
    if name not in backend_names():
        raise ValueError(f"backend must be one of {', '.join(backend_names())}; got {name!r}.")
    if name != REFERENCE and in_torch_func():
        raise RuntimeError(
            "contrastive_ext: the fused losses know no torch.func transform (grad, vmap, jvp, hessian ...). "
            "Use backend='reference', which is plain PyTorch."
        )


def select(name: str, device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype, dim: int) -> Backend:
    """The backend for a call; RuntimeError with its reason if a named one cannot run it."""
    if name == "auto":
        return _automatic(device, dtype, operand_dtype, dim)
    backend = next(b for b in BACKENDS if b.name == name)
    reason = backend.why_not(device, dtype, operand_dtype, dim)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason} Use backend='auto' or {_others(name)}.")
    return backend


def _automatic(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype, dim: int) -> Backend:
    able = [b for b in BACKENDS if b.why_not(device, dtype, operand_dtype, dim) is None]
    # unproven CUDA kernels are never taken automatically
    able = [b for b in able if b.name != cuda.NAME or _is_verified(b, device, operand_dtype)]
    chosen = able[0]
    if chosen.needs_proof and not _is_verified(chosen, device, operand_dtype):
        _announce(
            chosen,
            device,
            f"the {chosen.name} kernels have not been verified on {architecture(device)} yet; "
            "using them. `python -m contrastive_ext doctor` shows what has been.",
        )
    if chosen.name == torch_blocks.NAME and device.type == "cpu" and native.why_missing() and native.could_be_built():
        _announce(chosen, device, f"backend 'torch' computes, slower than 'cpu' would here: {native.why_missing()}")
    return chosen


def _is_verified(backend: Backend, device: torch.device, operand_dtype: torch.dtype) -> bool:
    return (backend.name, architecture(device), operand_dtype) in VERIFIED


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" or the device type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", "").split(":")[0] or f"sm_{properties.major}{properties.minor}"


def _announce(backend: Backend, device: torch.device, text: str) -> None:
    """Say once in a process what the user of this automatic choice should know."""
    key = (backend.name, architecture(device))
    if key not in _announced:
        _announced.add(key)
        warnings.warn(f"contrastive_ext: {text}", stacklevel=2)


def _others(name: str) -> str:
    return ", ".join(repr(n) for n in available_backends() if n != name)
