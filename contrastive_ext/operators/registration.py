"""A streaming operator and its gradient as operators of torch, once differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..numerics import in_torch_func

_library = torch.library.Library("contrastive_ext", "FRAGMENT")


def register(name: str, schema: str, compute: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Define the operator `name`: what computes it on every device, and the shapes of its results."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"contrastive_ext::{name}", shapes, lib=_library)


def register_autograd(name: str, function: type[torch.autograd.Function]) -> None:
    """Let `function` differentiate the operator `name`; its gradient, `name`_backward, refuses to be differentiated."""
    backward = getattr(torch.ops.contrastive_ext, f"{name}_backward").default
    _library.impl(name, lambda *args: function.apply(*args), "Autograd")
    _library.impl(f"{name}_backward", lambda *args: FirstOrderOnly.apply(backward, *args), "Autograd")


def holds_numbers(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these only computes: nobody traces it, transforms it or watches operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or in_torch_func():
        return False
    return all(x is None or (type(x) in _PLAIN and not _is_batch(x)) for x in tensors)


_PLAIN = torch.Tensor, torch.nn.Parameter
_is_batch = torch._C._functorch.is_legacy_batchedtensor  # of gradients: is_grads_batched


def route(name: str, directly: Callable[..., Any], *tensors: torch.Tensor | None) -> Callable[..., Any]:
    """The operator `name` where it has to be seen as one, otherwise what it does, `directly`: two crossings from Python
    to the dispatcher and back less, some 20 us each of a small batch."""
    return directly if holds_numbers(*tensors) else getattr(torch.ops.contrastive_ext, name).default


class FirstOrderOnly(torch.autograd.Function):
    """A gradient under autograd: computes, and refuses to be differentiated again.

    The losses leave autocast in their forward; a backward may be called inside it all the same.
    """

    @staticmethod
    def forward(ctx, gradient, *args):
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            return gradient(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "contrastive_ext: the fused losses are once differentiable, a second derivative was asked for "
            "(create_graph=True). Use backend='reference', which is dense and twice differentiable."
        )


def once_differentiable(gradient, *args):
    """`FirstOrderOnly`, without its cost on the host where nothing will differentiate again."""
    if torch.is_grad_enabled():  # create_graph=True
        return FirstOrderOnly.apply(gradient, *args)
    with torch._C._DisableAutocast():
        return gradient(*args)
