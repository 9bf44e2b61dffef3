"""The table of losses: the public function, its dense formula, the temperature it is measured at.

A new loss is one row of LOSSES: cases, smoke test, digits job, table and picture follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext
from contrastive_ext.numerics import SPLIT_PRODUCTS

from . import formulas, own_losses
from .case import PAIR_LAYOUTS, Case, Inputs
from .formulas import DenseLoss
from .own_losses import OwnLoss


@dataclass(frozen=True)
class LossRow:
    """A public loss and its dense formula; temperature is where it is used, and where a debiased row still learns."""

    title: str
    function: Callable[..., Tensor]
    dense: DenseLoss | OwnLoss
    temperature: float

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts it is defined in."""
        return (self.dense.layout,) if isinstance(self.dense, OwnLoss) else PAIR_LAYOUTS


LOSSES: dict[str, LossRow] = {
    "fused_infonce_loss": LossRow("InfoNCE", contrastive_ext.fused_infonce_loss, formulas.INFONCE, 0.1),
    "fused_decoupled_loss": LossRow("decoupled", contrastive_ext.fused_decoupled_loss, formulas.DECOUPLED, 0.1),
    "fused_debiased_loss": LossRow("debiased", contrastive_ext.fused_debiased_loss, formulas.DEBIASED, 0.5),
    "fused_bayesian_loss": LossRow("Bayesian", contrastive_ext.fused_bayesian_loss, formulas.BAYESIAN, 0.5),
    "fused_hard_negative_loss": LossRow(
        "hard negatives", contrastive_ext.fused_hard_negative_loss, formulas.HARD_NEGATIVE, 0.5
    ),
    "fused_false_negative_loss": LossRow(
        "FNC", contrastive_ext.fused_false_negative_loss, own_losses.FALSE_NEGATIVE, 0.1
    ),
    "fused_supcon_loss": LossRow("SupCon", contrastive_ext.fused_supcon_loss, own_losses.SUPCON, 0.1),
    "fused_labelled_infonce_loss": LossRow(
        "labelled InfoNCE", contrastive_ext.fused_labelled_infonce_loss, own_losses.LABELLED_INFONCE, 0.1
    ),
    "fused_sigmoid_loss": LossRow("sigmoid", contrastive_ext.fused_sigmoid_loss, own_losses.SIGMOID, 0.1),
    "fused_self_labeling_loss": LossRow(
        "SANE", contrastive_ext.fused_self_labeling_loss, own_losses.SELF_LABELING, 0.2
    ),
    "fused_soft_target_loss": LossRow(
        "soft targets", contrastive_ext.fused_soft_target_loss, own_losses.SOFT_TARGET, 0.1
    ),
}
PAIR_LOSSES = [name for name, row in LOSSES.items() if row.layouts == PAIR_LAYOUTS]


def dense_of(case: Case) -> DenseLoss | OwnLoss:
    """The dense formula of the case's loss."""
    return LOSSES[case.loss].dense


def is_ranked(case: Case) -> bool:
    """Whether the loss weighs negatives by their ranks."""
    dense = dense_of(case)
    return isinstance(dense, DenseLoss) and dense.ranks is not None


def inputs_of(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random views whose pairs have a cosine of about .9: a positive stands out, as in training."""
    generator, dense = torch.Generator(device).manual_seed(seed), dense_of(case)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, case.dim, generator=generator, device=device)

    if isinstance(dense, OwnLoss):
        return Inputs(*dense.draw(case, draw)).to(case.torch_dtype)
    z1 = draw(case.n // 2 if case.layout == "two_view" else case.n)
    z2 = z1 + 0.5 * draw(len(z1))
    queue = F.normalize(draw(case.m), dim=1).to(case.torch_dtype) if case.layout == "queue" else None
    return Inputs(*(z.to(case.torch_dtype).requires_grad_() for z in (z1, z2)), queue)


def fused(case: Case, inputs: Inputs, backend: str, reduction: str, **parameters) -> Tensor:
    """The public function on `inputs`."""
    function, dense = LOSSES[case.loss].function, dense_of(case)
    if isinstance(dense, OwnLoss):
        return dense.call(function, case, inputs, {"backend": backend, "reduction": reduction})
    options: dict = {"layout": case.layout}
    if case.layout == "queue":
        options = {"layout": "one_way", "queue": inputs.queue, "in_batch_negatives": False}
    if case.dtype in SPLIT_PRODUCTS:
        options["operand_dtype"] = case.dtype
    return function(
        inputs.z1, inputs.z2, case.temperature, backend=backend, reduction=reduction, **options, **parameters
    )
