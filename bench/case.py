"""One problem to measure, plain data: which loss, which layout, how large; and the tensors of a call.

    two_view   N = 2B anchors against the same 2B rows (M = N)
    symmetric  N = B rows against M = B columns and back (CLIP)
    queue      N = B anchors, each with its partner as positive, against M frozen keys (MoCo)

and one layout of its own for each loss that is no loss of pairs (own_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from contrastive_ext.numerics import SPLIT_PRODUCTS

PAIR_LAYOUTS = ("two_view", "symmetric", "queue")

# name -> (dtype of the inputs, TF32 products allowed)
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float64": (torch.float64, False),
    **dict.fromkeys(SPLIT_PRODUCTS, (torch.float32, False)),  # float32 inputs, operand_dtype= of that name
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; z1 and z2 need gradients (a loss may have z1 only), the others do not.

    constants   what else a loss takes: matrices are vectors of the case's dtype, the rest is used as it is
    """

    z1: Tensor
    z2: Tensor | None
    queue: Tensor | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken for."""
        return (self.z1,) if self.z2 is None else (self.z1, self.z2)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as leaves of another dtype."""
        z1, *z2 = (z.detach().to(dtype).requires_grad_() for z in self.leaves)
        constants = {name: x.to(dtype) if x.dim() == 2 else x for name, x in self.constants.items()}
        return Inputs(z1, z2[0] if z2 else None, None if self.queue is None else self.queue.to(dtype), constants)


@dataclass(frozen=True)
class Case:
    """One problem: n anchors of one side against m candidates with dim features."""

    loss: str
    layout: str
    n: int
    m: int
    dim: int
    dtype: str = "float32"
    temperature: float = 0.1
    compile: bool = False  # torch.compile takes tens of seconds a case: only where asked for
    fused_only: bool = False  # beyond what any baseline can do in reasonable time
    peers: bool = False  # other libraries too, where installed; some need N^3 memory: only where asked for
    learned: bool = False  # proofs: the gradient of a temperature tensor too

    @property
    def negatives(self) -> int:
        """Negatives of every anchor of a loss over pairs."""
        return self.m - {"two_view": 2, "symmetric": 1, "queue": 0}[self.layout]

    @property
    def tf32(self) -> bool:
        """Whether fp32 products may be computed in TF32."""
        return DTYPES[self.dtype][1]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        return DTYPES[self.dtype][0]

    @property
    def products_dtype(self) -> torch.dtype:
        """The dtype whose matrix products the case is made of."""
        return {"fp16x3": torch.float16, "bf16x3": torch.bfloat16}.get(self.dtype, self.torch_dtype)

    @property
    def name(self) -> str:
        """What the progress line, the table and --only see."""
        shape = f"{self.n}x{self.dim}" if self.n == self.m else f"{self.n}x{self.m}x{self.dim}"
        return f"{short_name(self.loss)} {self.layout} {shape} {self.dtype} t={self.temperature:g}"


def short_name(loss: str) -> str:
    """ "infonce" for "fused_infonce_loss"."""
    return loss.removeprefix("fused_").removesuffix("_loss")
