"""`nn.Module` twins of the loss functions: parameters at construction, the batch at the call; and a learnable scale."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .losses.base import LossOptions, RowLoss, fused_row_loss
from .losses.bayesian import Bayesian
from .losses.debiased import Debiased
from .losses.decoupled import Decoupled, fused_decoupled_loss
from .losses.hard_negative import HardNegative
from .losses.infonce import InfoNCE
from .ranking import Ranks
from .stats import LossStats


class RowLossModule(nn.Module):
    """Any `RowLoss` as a module: `RowLossModule(MyLoss(), temperature=0.1)(z1, z2)`.

    Keywords given here are defaults, keywords given to the call override them (a queue, a learned temperature).
    """

    def __init__(self, row_loss: RowLoss, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__()
        unknown = set(options) - set(LossOptions.__annotations__)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unexpected keywords {sorted(unknown)}; "
                f"known are {', '.join(LossOptions.__annotations__)}."
            )
        self.row_loss = row_loss
        self.temperature = temperature
        queue = options.pop("queue", None)
        self.queue = queue  # a NegativeQueue becomes a submodule: it moves and is saved with the loss
        self.options = options

    def forward(self, z1: Tensor, z2: Tensor, **call) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of the pairs z1, z2 [B, D]; call-time keywords as in the function."""
        arguments = {**self.options, "queue": self.queue, **call}
        if "temperature" not in call and "logit_scale" not in call:
            arguments["temperature"] = self.temperature
        return self._loss(z1, z2, **arguments)

    def _loss(self, z1: Tensor, z2: Tensor, **arguments) -> Tensor | tuple[Tensor, LossStats]:
        return fused_row_loss(self.row_loss, z1, z2, **arguments)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        temperature = self.row_loss.default_temperature if self.temperature is None else self.temperature
        return f"{self.row_loss}, temperature={temperature}{options}"


class InfoNCELoss(RowLossModule):
    """Module of `fused_infonce_loss`: InfoNCE / NT-Xent, CLIP with layout="symmetric"."""

    def __init__(self, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__(InfoNCE(), temperature, **options)


class DecoupledLoss(RowLossModule):
    """Module of `fused_decoupled_loss`; `positive_weight` is given to the call."""

    def __init__(self, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__(Decoupled(), temperature, **options)

    def _loss(self, z1: Tensor, z2: Tensor, **arguments) -> Tensor | tuple[Tensor, LossStats]:
        return fused_decoupled_loss(z1, z2, **arguments)


class DebiasedLoss(RowLossModule):
    """Module of `fused_debiased_loss`: DCL with prior `tau_plus`; `positives` is given to the call."""

    def __init__(self, temperature: float | None = None, tau_plus: float = 0.1, **options: Unpack[LossOptions]):
        super().__init__(Debiased(tau_plus), temperature, **options)


class HardNegativeLoss(RowLossModule):
    """Module of `fused_hard_negative_loss`: HCL with prior `tau_plus` and concentration `beta`."""

    def __init__(
        self,
        temperature: float | None = None,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        *,
        detach_weights: bool = False,
        **options: Unpack[LossOptions],
    ):
        super().__init__(HardNegative(tau_plus, beta, detach_weights), temperature, **options)


class BayesianLoss(RowLossModule):
    """Module of `fused_bayesian_loss`: BCL; `alpha` may be given to the call, for a schedule."""

    def __init__(
        self,
        temperature: float | None = None,
        tau_plus: float = 0.1,
        alpha: float = 0.9,
        beta: float = 0.9,
        *,
        ranks: Ranks = "auto",
        bins: int = 256,
        eps: float = 1e-3,
        **options: Unpack[LossOptions],
    ):
        super().__init__(Bayesian(tau_plus, alpha, beta, ranks, bins, eps), temperature, **options)

    def _loss(self, z1: Tensor, z2: Tensor, *, alpha: float | None = None, **arguments):
        assert isinstance(self.row_loss, Bayesian)
        row_loss = self.row_loss if alpha is None else replace(self.row_loss, alpha=alpha)
        return fused_row_loss(row_loss, z1, z2, **arguments)


class LogitScale(nn.Module):
    """A learnable 1/temperature, kept as its logarithm: `loss(z1, z2, logit_scale=scale())`.

    temperature       the initial temperature
    max_scale         upper bound of 1/temperature (CLIP: 100), held by clamping the parameter itself, so that it can
                      come down again; a clamp in the graph would stop its gradient for good
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0):
        super().__init__()
        if not 0 < 1 / temperature <= max_scale:
            raise ValueError(f"need 0 < 1/temperature <= max_scale; got {temperature=} and {max_scale=}.")
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self) -> Tensor:
        """0-d tensor 1/temperature."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}"
