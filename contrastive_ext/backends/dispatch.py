"""Which backend computes a call: one ordered table, one reason per backend that cannot.

`backend="auto"` takes the first backend of the table that can and, on a GPU, prefers one whose kernels are proven on
that architecture (`VERIFIED`). A named backend never falls back: it runs or raises with its reason.
"""

from __future__ import annotations

import warnings

import torch

from ..numerics import in_torch_func
from . import cpu, cuda, native, triton
from . import torch as plain_torch
from .backend import Backend
from .verified import VERIFIED

REFERENCE = "reference"  # dense and differentiable twice; computed by the losses themselves (losses/dense.py)


BACKENDS: tuple[Backend, ...] = (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, plain_torch.BACKEND)

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


def select(name: str, device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> Backend:
    """The backend for a call; RuntimeError with its reason if a named one cannot run it."""
    if name == "auto":
        return _automatic(device, dtype, operand_dtype, dim)
    backend = next(b for b in BACKENDS if b.name == name)
    reason = backend.why_not(device, dtype, operand_dtype, dim)
    if reason is not None:
        able = [repr(b.name) for b in BACKENDS if b.why_not(device, dtype, operand_dtype, dim) is None]
        names = [*(["'auto'", *able] if able else []), repr(REFERENCE)]
        raise RuntimeError(f"backend {name!r} cannot run this call: {reason} Use backend={' or '.join(names)}.")
    return backend


def _automatic(device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | str, dim: int) -> Backend:
    reasons = {b.name: b.why_not(device, dtype, operand_dtype, dim) for b in BACKENDS}
    able = [b for b in BACKENDS if reasons[b.name] is None]
    if not able:  # `torch` runs everything but products of split operands
        whys = " ".join(f"{name}: {why}" for name, why in reasons.items())
        raise RuntimeError(f"no backend has operand_dtype={operand_dtype!r} for this call. {whys}")
    # unproven CUDA kernels are never taken automatically
    able = [b for b in able if b.name != cuda.BACKEND.name or _is_verified(b, device, operand_dtype)]
    chosen = able[0]
    if chosen.needs_proof and not _is_verified(chosen, device, operand_dtype):
        _announce(
            chosen,
            device,
            f"the {chosen.name} kernels have not been verified on {architecture(device)} yet; "
            "using them. `python -m contrastive_ext doctor` shows what has been.",
        )
    if (
        chosen.name == plain_torch.BACKEND.name
        and device.type == "cpu"
        and native.why_missing()
        and native.could_be_built()
    ):
        _announce(chosen, device, f"backend 'torch' computes, slower than 'cpu' would here: {native.why_missing()}")
    return chosen


def _is_verified(backend: Backend, device: torch.device, operand_dtype: torch.dtype | str) -> bool:
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
