"""The tables of the suite: one row per loss, per way of using it, per shape, per kind of input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import contrastive_ext as ce


@dataclass(frozen=True)
class Loss:
    """A public loss with parameters; `vectors` makes the tensors only this loss takes from (z1, number of pairs)."""

    name: str
    function: Callable
    module: type
    parameters: dict = field(default_factory=dict)
    vectors: Callable[[Tensor], dict[str, Tensor]] = lambda z1: {}


def _weights(z1: Tensor) -> dict[str, Tensor]:
    return {"positive_weight": torch.rand(len(z1), device=z1.device) + 0.5}


def _two_positives(z1: Tensor) -> dict[str, Tensor]:
    return {"positives": (z1 + 0.3 * torch.randn(2, *z1.shape, device=z1.device)).to(z1.dtype)}


LOSSES = [
    Loss("infonce", ce.fused_infonce_loss, ce.InfoNCELoss),
    Loss("decoupled", ce.fused_decoupled_loss, ce.DecoupledLoss),
    Loss("dclw", ce.fused_decoupled_loss, ce.DecoupledLoss, vectors=_weights),
    Loss("debiased", ce.fused_debiased_loss, ce.DebiasedLoss, {"tau_plus": 0.1}),
    Loss("debiased_positives", ce.fused_debiased_loss, ce.DebiasedLoss, {"tau_plus": 0.05}, _two_positives),
    Loss("hard", ce.fused_hard_negative_loss, ce.HardNegativeLoss, {"tau_plus": 0.1, "beta": 1.0}),
    Loss("hard_fractional", ce.fused_hard_negative_loss, ce.HardNegativeLoss, {"tau_plus": 0.05, "beta": 0.3}),
    Loss("hard_detached", ce.fused_hard_negative_loss, ce.HardNegativeLoss, {"beta": 2.0, "detach_weights": True}),
]

# Losses of ranks: neighbours in a row may swap by rounding, many at once where vectors are identical, so that only what
# keeps ranks apart can be compared. tests/losses/test_bayesian.py says which of the promises hold, and how.
RANKED = [
    Loss("bayesian", ce.fused_bayesian_loss, ce.BayesianLoss, {"alpha": 0.8, "beta": 0.7}),
    Loss("bayesian_histogram", ce.fused_bayesian_loss, ce.BayesianLoss, {"ranks": "histogram", "bins": 8}),
]


@dataclass(frozen=True)
class Usage:
    """A layout with its extras: options(z1, z2) -> (z2, keyword arguments)."""

    name: str
    options: Callable[[Tensor, Tensor], tuple[Tensor, dict]]


def _noise(z: Tensor, *shape: int) -> Tensor:
    unit = torch.nn.functional.normalize(torch.randn(*shape, z.shape[1], device=z.device, dtype=torch.float64), dim=-1)
    return unit.to(z.dtype)


def _part_filled_queue(z: Tensor) -> ce.NegativeQueue:
    dtype = torch.float32 if z.dtype != torch.float64 else z.dtype
    # as given: the truth of a call is a call with normalize=False, which refuses a queue that makes unit rows
    queue = ce.NegativeQueue(9, z.shape[1], dtype=dtype, device=z.device, normalize=False)
    queue.enqueue(_noise(z, 5))
    return queue


def _classes(z: Tensor, length: int) -> Tensor:
    return torch.randint(0, 5, (length,), device=z.device)


def _guide(z: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Another model's features: views of an image agree, some images agree too."""
    image = torch.randn(columns, 3, device=z.device)
    return tuple(image[:n] + 0.4 * torch.randn(n, 3, device=z.device) for n in (len(z), columns))


def _with_queue_ids(a: Tensor, b: Tensor) -> tuple[Tensor, dict]:
    return b, {"ids": _classes(a, len(a)), "queue": ce.Columns(_noise(a, 7), ids=_classes(a, 7))}


def _with_guided_queue(a: Tensor, b: Tensor) -> tuple[Tensor, dict]:
    guide = ce.Guide(*_guide(a, len(b) + 4), margin=0.2, relative=True)
    queue = ce.Columns(_noise(a, 7), guide=torch.randn(7, 3, device=a.device))
    return torch.cat([b, _noise(b, 4)]), {"layout": "one_way", "queue": queue, "guide": guide}


def _with_guide_and_labels(a: Tensor, b: Tensor) -> tuple[Tensor, dict]:
    return b, {"layout": "symmetric", "guide": _guide(a, len(b)), "labels": _classes(a, len(a))}


USAGES = [
    Usage("two_view", lambda a, b: (b, {})),
    Usage("two_view_queue", lambda a, b: (b, {"queue": _noise(a, 7)})),
    Usage("two_view_part_filled_queue", lambda a, b: (b, {"queue": _part_filled_queue(a)})),
    Usage("one_way", lambda a, b: (b, {"layout": "one_way"})),
    Usage("one_way_more_columns", lambda a, b: (torch.cat([b, _noise(b, 4)]), {"layout": "one_way"})),
    Usage("one_way_queue", lambda a, b: (b, {"layout": "one_way", "queue": _noise(a, 7)})),
    Usage("moco", lambda a, b: (b, {"layout": "one_way", "queue": _noise(a, 7), "in_batch_negatives": False})),
    Usage("shared_negatives", lambda a, b: (b, {"layout": "one_way", "negatives": _noise(a, 6)})),
    Usage("own_negatives", lambda a, b: (b, {"layout": "one_way", "negatives": _noise(a, len(a), 3)})),
    Usage("ids", lambda a, b: (b, {"ids": _classes(a, len(a))})),
    Usage("ids_queue", _with_queue_ids),
    Usage("guide", lambda a, b: (b, {"guide": ce.Guide(*_guide(a, len(b)), margin=0.1)})),
    Usage("guide_queue", _with_guided_queue),
    Usage("guide_symmetric", _with_guide_and_labels),
    Usage("symmetric", lambda a, b: (b, {"layout": "symmetric"})),
]
# ranks span all candidates of an anchor, which are therefore the same for all anchors
RANKED_USAGES = [usage for usage in USAGES if usage.name != "own_negatives"]

# (pairs, features, reason)
SHAPES = [
    (1, 8, "no negatives in the batch"),
    (2, 1, "one feature, two negatives"),
    (3, 5, "smaller than any vector register"),
    (33, 17, "ragged in every direction"),
    (70, 64, "not a multiple of a tile"),
    (257, 130, "crosses tile edges, more than 128 features"),
]


def random_pairs(b: int, d: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    """An untrained encoder: unrelated views, lengths far from 1."""
    z1, z2 = 3 * torch.randn(2, b, d, dtype=torch.float64)
    return z1.to(device, dtype), z2.to(device, dtype)


def peaked_pairs(b: int, d: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    """A converged encoder: the views of an image nearly agree, images are spread out."""
    z = torch.nn.functional.normalize(torch.randn(b, d, dtype=torch.float64), dim=-1)
    z1, z2 = (z + 0.1 * torch.randn(2, b, d, dtype=torch.float64) / d**0.5).unbind(0)
    return z1.to(device, dtype), z2.to(device, dtype)


def crowded_pairs(b: int, d: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    """A fresh encoder behind a ReLU: every vector points the same way, mean cosine .99."""
    center = torch.ones(d, dtype=torch.float64)
    z1, z2 = (center + 0.1 * torch.randn(2, b, d, dtype=torch.float64)).unbind(0)
    return z1.to(device, dtype), z2.to(device, dtype)


def degenerate_pairs(b: int, d: int, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor]:
    """Zero rows, identical rows, opposite views."""
    z1, z2 = random_pairs(b, d, torch.float64)
    z1[::3], z2[1::4] = 0, z1[0]
    z2[2::5] = -z1[2::5]
    return z1.to(device, dtype), z2.to(device, dtype)


INPUTS = {"random": random_pairs, "peaked": peaked_pairs, "crowded": crowded_pairs, "degenerate": degenerate_pairs}
