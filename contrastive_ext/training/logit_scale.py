"""A learnable temperature, as CLIP has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_number


class LogitScale(nn.Module):
    """A learnable 1/temperature, kept as its logarithm: `loss(z1, z2, logit_scale=scale())`.

    temperature       the initial temperature, at most 2: what is larger looks like a scale
    max_scale         upper bound of 1/temperature (CLIP: 100), held by clamping the parameter itself, so that it can
                      come down again; a clamp in the graph would stop its gradient for good
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0):
        super().__init__()
        check_number("temperature", temperature)
        if temperature > 2:
            raise ValueError(f"{temperature} looks like a scale, give its temperature: LogitScale(1 / {temperature}).")
        if not temperature > 0 or not 1 / temperature <= max_scale:
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
