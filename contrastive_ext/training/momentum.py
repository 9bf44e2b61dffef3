"""What momentum-contrast training needs around the loss: the averaged encoder, mixed inputs, the schedule of mu."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def momentum_update(online: nn.Module, target: nn.Module, m: float) -> None:
    """target = m target + (1 - m) online for every parameter; buffers (batch-norm statistics) are copied.

    online, target  modules of one architecture; `target = copy.deepcopy(online)` makes it
    m               in [0, 1]; He et al. (arXiv:1911.05722) use 0.99 to 0.999
    Raises          ValueError if names or shapes differ, if the two share memory, or m is out of range
    """
    if not 0 <= m <= 1:
        raise ValueError(f"m must be in [0, 1]; got {m}.")
    for kind in ("parameters", "buffers"):
        ours, theirs = (dict(getattr(module, f"named_{kind}")()) for module in (online, target))
        if {n: x.shape for n, x in ours.items()} != {n: x.shape for n, x in theirs.items()}:
            raise ValueError(f"online and target must have the same {kind}; differing: {_differing(ours, theirs)}.")
        if _share_memory(ours.values(), theirs.values()):
            raise ValueError("online and target share tensors: make target with copy.deepcopy(online).")
        written = set()
        for name, x in theirs.items():
            start, end = _span(x)
            if (start, end) in written:
                continue  # another name of the same memory (tied weights) has moved it already
            if end > start:
                written.add((start, end))
            if kind == "parameters":
                x.lerp_(ours[name].to(x), 1 - m)
            else:
                x.copy_(ours[name])


def _span(x: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's memory, the last excluded; an empty span where there is none to ask for."""
    if x.device.type == "meta" or x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _share_memory(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether any tensor of one overlaps any of the other in memory; being the same object is only one way to."""
    spans = sorted([(*_span(x), 0) for x in ours] + [(*_span(x), 1) for x in theirs])
    reach = [0, 0]
    for start, end, owner in spans:
        if start < min(end, reach[1 - owner]):
            return True
        reach[owner] = max(reach[owner], end)
    return False


def _differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    names = (n for n in {**ours, **theirs} if n not in ours or n not in theirs or ours[n].shape != theirs[n].shape)
    return ", ".join(sorted(names))


@torch.no_grad()
def momentum_mixup(
    x: Tensor, x_momentum: Tensor, kappa: float = 2.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed inputs theta_i x_i + (1 - theta_i) x_momentum_perm(i) for `fused_self_labeling_loss`.

    x, x_momentum  [s, ...] floating-point inputs: the online encoder's view and the momentum encoder's
    kappa          > 0 of theta ~ Beta(kappa, kappa); 2 for CIFAR-10, 0.1 for ImageNet
    generator      source of randomness on x's device; None: the global one
    Returns        mixed inputs [s, ...] in x's dtype, perm int64 [s], theta float32 [s]. Every sample draws a theta of
                   its own: the paper indexes it by i, and the gradient sees more of the distribution per batch.
    """
    if not isinstance(x, Tensor) or not isinstance(x_momentum, Tensor):
        raise TypeError(f"x and x_momentum must be tensors; got {type(x).__name__} and {type(x_momentum).__name__}.")
    if x.shape != x_momentum.shape or x.dim() < 1 or x.dtype != x_momentum.dtype or x.device != x_momentum.device:
        raise ValueError(
            f"x and x_momentum must be alike, [s, ...]; got {x.dtype} {list(x.shape)} on {x.device} and "
            f"{x_momentum.dtype} {list(x_momentum.shape)} on {x_momentum.device}."
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point: mixing rounds integers; got {x.dtype}.")
    if not 0 < kappa < math.inf:
        raise ValueError(f"kappa must be > 0 and finite; got {kappa}.")
    theta = _symmetric_beta(len(x), kappa, x.device, generator)
    perm = torch.randperm(len(x), device=x.device, generator=generator)
    weight = theta.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.lerp(x_momentum[perm], x, weight), perm, theta


def _symmetric_beta(n: int, kappa: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    # theta = g/(g + g') of two Gamma(kappa) draws, as logarithms: at kappa = .1 the draws themselves underflow. A draw
    # of Gamma(kappa) is one of Gamma(1 + kappa) times u^(1/kappa). torch.distributions takes no generator.
    gamma = torch._standard_gamma(torch.full((2, n), 1.0 + kappa, device=device), generator=generator)
    uniform = 1 - torch.rand(2, n, device=device, generator=generator)  # (0, 1]
    one, other = gamma.log() + uniform.log() / kappa
    return torch.sigmoid(one - other)


def mu_schedule(step: int, total: int, m1: float = 0.0, m2: float = 1.0) -> float:
    """mu at `step` of `total`: from m1 to m2 along half a cosine, m2 - (m2 - m1) (cos(pi step/total) + 1)/2.

    step     0 to total
    m1, m2   0 -> 1 for CIFAR-10, 0.5 -> 10 for ImageNet
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"need total >= 1 and 0 <= step <= total; got step={step}, total={total}.")
    return m2 - (m2 - m1) * (math.cos(math.pi * step / total) + 1) / 2
