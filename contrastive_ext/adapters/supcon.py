"""`SupConLoss` of SupContrast, without the matrix of logits: `from contrastive_ext.adapters.supcon import SupConLoss`.

What differs. A `mask` is taken where it is what labels say, and refused otherwise: masks of other relations are N x N
by nature. contrast_mode="one" computes the rows of all views and uses those of the first. A row alone in its class with
one view has loss 0 and counts in the mean, as in the current version; older ones gave NaN. 16-bit features are computed
and returned in float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..batch.call import check_call
from ..checks import check_choice, check_positive, check_tensor, describe
from ..losses.supcon import fused_supcon_loss
from .hosts import alone


class SupConLoss(nn.Module):
    """Supervised contrastive loss times temperature/base_temperature; without labels that of SimCLR.

    temperature       > 0
    contrast_mode     "all": every view is an anchor; "one": the first
    base_temperature  > 0
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: Literal["all", "one"] = "all",
        base_temperature: float = 0.07,
    ):
        super().__init__()
        check_call({"temperature": temperature})
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        check_positive("base_temperature", base_temperature, torch.float32)
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """0-d loss of features [B, V, ...] that the caller has normalised, the rest flattened.

        labels   [B] integers, or None: every image is its own class
        mask     [B, B], 1 where two images have the same class; looking at it waits for the device
        Raises   ValueError or TypeError on shapes, dtypes, both labels and mask, a mask of no labels
        Memory   O(B V D), a mask aside; time O((B V)^2 D); once differentiable
        """
        check_tensor("features", features)
        if features.dim() < 3:
            raise ValueError(f"features must be [B, V, D], views second; got {describe(features)}.")
        views = features.flatten(2).transpose(0, 1)
        if labels is not None and mask is not None:
            raise ValueError("give labels or mask, not both.")
        if mask is not None:
            labels = _labels_of(mask, views.shape[1])
        elif labels is None:
            labels = torch.arange(views.shape[1], device=features.device)
        rows = alone(fused_supcon_loss(views, labels, self.temperature, normalize=False, reduction="none"))
        anchors = rows if self.contrast_mode == "all" else rows[0]
        return self.temperature / self.base_temperature * anchors.mean()

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}"
        )


def _labels_of(mask: Tensor, images: int) -> Tensor:
    """[B] the first member of every image's class; ValueError if the mask has no classes."""
    check_tensor("mask", mask)
    if mask.shape != (images, images):
        raise ValueError(f"mask must be [{images}, {images}]; got {describe(mask)}.")
    labels = (mask != 0).to(torch.uint8).argmax(1)
    if not torch.equal(mask, (labels[:, None] == labels).to(mask.dtype)):
        raise ValueError(
            "mask must be 1 where two images have the same class and 0 elsewhere, as labels would say: weights, "
            "asymmetric or overlapping relations have no form without the whole matrix; give labels."
        )
    return labels
