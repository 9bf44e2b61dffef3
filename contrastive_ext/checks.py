"""What an argument is, asked before anybody looks inside it: every refusal says what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

LARGEST_ROUNDING = 2.0**-7  # of the difference of two log-sum-exps, as a share of that of their exponents


def describe(x: object) -> str:
    """dtype, shape and device of a tensor, or what else it is, for an error message."""
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def can_read(x: Tensor) -> bool:
    """Whether values of x may be looked at: they exist, outside a graph, and no device has to be waited for."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def check_tensor(name: str, x: object) -> None:
    """TypeError unless x is a dense tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}.")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got {'a nested one' if x.is_nested else x.layout}.")


def check_number(name: str, x: object) -> None:
    """TypeError unless x is a number; a tensor is none: what takes numbers only would drop its gradient."""
    if isinstance(x, (int, float)):
        return  # first, since torch.compile knows no hasattr of a symbolic number
    if isinstance(x, Tensor) or not hasattr(x, "__float__") or getattr(x, "shape", ()) != ():
        raise TypeError(f"{name} must be a number; got {describe(x)}.")


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """ValueError unless value is one of the allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")


def check_keywords(called: str, given: Iterable[str], known: Collection[str]) -> None:
    """TypeError that names what the user called unless it knows all keywords given."""
    for name in given:
        if name not in known:
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}; known are {', '.join(known)}.")


def check_positive(name: str, x: float, dtype: torch.dtype) -> None:
    """TypeError unless x is a number, ValueError unless x > 0 and 1/x are finite in the dtype that computes."""
    check_number(name, x)
    normal = torch.finfo(dtype)  # the inverse of a normal number is finite
    if not normal.tiny <= x <= normal.max:
        raise ValueError(f"{name} must be > 0 and finite in {dtype}; got {x}.")


def check_exponents(exponents: tuple[float, ...], scale: float | Tensor, dtype: torch.dtype) -> None:
    """ValueError unless every beta > 0, and 2 beta/temperature is finite in the dtype that computes.

    Two log-sum-exps are there to be subtracted: their rounding, beta/temperature ulps, must leave digits of what they
    differ by. A scale on a device is not looked at.
    """
    known = scale.max().item() if isinstance(scale, Tensor) and can_read(scale) else scale
    reach = 1.0 if isinstance(known, Tensor) else max(1.0, known)
    normal = torch.finfo(dtype)
    if not all(normal.tiny <= beta and 2 * beta * reach <= normal.max for beta in exponents):
        raise ValueError(
            f"exponents (of hard negatives beta, 1 + beta) must be positive, and finite in {dtype} when multiplied by "
            f"2/temperature; got {exponents} and 1/temperature = {known}."
        )
    rounding = max(exponents) * reach * normal.eps
    if len(exponents) == 2 and rounding > LARGEST_ROUNDING * abs(exponents[1] - exponents[0]):
        raise ValueError(
            f"exponents (of hard negatives beta, 1 + beta) times 1/temperature are so large that {dtype} cannot tell "
            f"their log-sum-exps apart: for hard negatives (1 + beta)/temperature goes up to "
            f"{LARGEST_ROUNDING / normal.eps:.3g} there; got {exponents} and 1/temperature = {known}."
        )
