"""The one table of what is measured: losses, shapes, and the flops each method executes.

    two_view   N = 2B anchors against the same 2B rows (M = N)
    symmetric  N = B rows against M = B columns and back (CLIP)
    queue      N = B anchors, each with its partner as positive, against M frozen keys (MoCo)

A new loss is one row of LOSSES: cases, smoke test, digits job, table and picture follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext

from . import baselines
from .baselines import DenseLoss


@dataclass(frozen=True)
class LossRow:
    """A public loss and its dense formula; temperature is where it is used, and where a debiased row still learns."""

    function: Callable[..., Tensor]
    dense: DenseLoss
    temperature: float


LOSSES: dict[str, LossRow] = {
    "fused_infonce_loss": LossRow(contrastive_ext.fused_infonce_loss, baselines.INFONCE, 0.1),
    "fused_decoupled_loss": LossRow(contrastive_ext.fused_decoupled_loss, baselines.DECOUPLED, 0.1),
    "fused_debiased_loss": LossRow(contrastive_ext.fused_debiased_loss, baselines.DEBIASED, 0.5),
    "fused_bayesian_loss": LossRow(contrastive_ext.fused_bayesian_loss, baselines.BAYESIAN, 0.5),
    "fused_hard_negative_loss": LossRow(contrastive_ext.fused_hard_negative_loss, baselines.HARD_NEGATIVE, 0.5),
}
LAYOUTS = ("two_view", "symmetric", "queue")

# name -> (dtype of the inputs, TF32 products allowed)
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float64": (torch.float64, False),
}

# Flops of (forward, backward) per element of the N x M matrix and feature, as executed; a multiply-add is 2.
#   dense      keeps the matrix
#   recompute  forms it a second time in the backward
#   triangle   visits the upper triangle of one set only; s and two products per tile in the backward
#   rows       every row block visits all columns; one set needs s and one product, two sets swap roles and run again
#   histogram  whole rows in the forward, the triangle in the backward
#   sweeps     three forward sweeps for range, counts and sums of a histogram, `rows` in the backward
# The fused paths make a queue's gradient in the forward.
FLOPS = {
    "dense": {"two_view": (2, 4), "symmetric": (2, 4), "queue": (2, 2)},
    "recompute": {"two_view": (2, 6), "symmetric": (4, 12), "queue": (2, 4)},
    "triangle": {"two_view": (1, 3), "symmetric": (2, 6), "queue": (4, 0)},
    "rows": {"two_view": (2, 4), "symmetric": (2, 8), "queue": (4, 0)},
    "histogram": {"two_view": (2, 3), "symmetric": (4, 12), "queue": (2, 4)},
    "sweeps": {"two_view": (6, 4), "symmetric": (12, 8), "queue": (6, 2)},
}
ALGORITHMS = {"chunked": "recompute", "torch": "triangle", "cpu": "triangle", "triton": "rows", "cuda": "rows"}
# A loss of ranks sees whole rows; what is not listed recomputes.
RANKED_ALGORITHMS = {
    "cpu, histogram": "histogram",
    "triton, histogram": "sweeps",
    "eager": "dense",
    "comparison": "dense",
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; z1 and z2 need gradients, the queue does not."""

    z1: Tensor
    z2: Tensor
    queue: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values as leaves of another dtype."""
        z1, z2 = (z.detach().to(dtype).requires_grad_() for z in (self.z1, self.z2))
        return Inputs(z1, z2, None if self.queue is None else self.queue.to(dtype))


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

    @property
    def dense(self) -> DenseLoss:
        """The loss's dense formula."""
        return LOSSES[self.loss].dense

    @property
    def negatives(self) -> int:
        """Negatives of every anchor."""
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
    def name(self) -> str:
        """What the progress line, the table and --only see."""
        shape = f"{self.n}x{self.dim}" if self.n == self.m else f"{self.n}x{self.m}x{self.dim}"
        return f"{short_name(self.loss)} {self.layout} {shape} {self.dtype} t={self.temperature:g}"

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random views whose pairs have a cosine of about .9: a positive stands out, as in training."""
        generator = torch.Generator(device).manual_seed(seed)
        pairs = self.n // 2 if self.layout == "two_view" else self.n

        def draw(rows: int) -> Tensor:
            return torch.randn(rows, self.dim, generator=generator, device=device)

        z1 = draw(pairs)
        z2 = z1 + 0.5 * draw(pairs)
        queue = F.normalize(draw(self.m), dim=1).to(self.torch_dtype) if self.layout == "queue" else None
        return Inputs(*(z.to(self.torch_dtype).requires_grad_() for z in (z1, z2)), queue)


def short_name(loss: str) -> str:
    """ "infonce" for "fused_infonce_loss"."""
    return loss.removeprefix("fused_").removesuffix("_loss")


def executed_flops(method: str, case: Case) -> tuple[float, float]:
    """Matrix flops of forward and backward as `method` executes them; methods without a row are dense."""
    algorithm = ALGORITHMS.get(method, "dense")
    if case.dense.ranks is not None:
        algorithm = RANKED_ALGORITHMS.get(method, "recompute")
    forward, backward = FLOPS[algorithm][case.layout]
    elements = float(case.n) * case.m * case.dim
    return forward * elements, backward * elements


def fused(case: Case, inputs: Inputs, backend: str, reduction: str, **parameters) -> Tensor:
    """The public function on `inputs`."""
    function = LOSSES[case.loss].function
    options: dict = {"layout": case.layout}
    if case.layout == "queue":
        options = {"layout": "one_way", "queue": inputs.queue, "in_batch_negatives": False}
    return function(
        inputs.z1, inputs.z2, case.temperature, backend=backend, reduction=reduction, **options, **parameters
    )


def _case(loss: str, layout: str, n: int, m: int | None = None, dim: int = 128, **options) -> Case:
    name = f"fused_{loss}_loss"
    return Case(name, layout, n, n if m is None else m, dim, **{"temperature": LOSSES[name].temperature} | options)


def _other_losses() -> list[str]:
    return [short_name(name) for name in LOSSES if name != "fused_infonce_loss"]


def cpu_cases(quick: bool) -> list[Case]:
    """Growing N for InfoNCE, one size of the other losses, layouts and of bf16; the costliest case last."""
    sizes = (1024, 2048) if quick else (1024, 2048, 4096, 8192)
    growing = [_case("infonce", "two_view", n, compile=n == 4096) for n in sizes]
    others = [_case(loss, "two_view", 2048 if quick else 4096) for loss in _other_losses()]
    if quick:
        return growing + others
    return [
        *growing,
        *others,
        _case("bayesian", "two_view", 512),  # what comparing all negatives of a row with each other can still do
        _case("infonce", "symmetric", 4096),
        _case("infonce", "queue", 1024, 16384),
        _case("infonce", "two_view", 4096, dtype="bfloat16"),
        _case("infonce", "two_view", 16384),
    ]


def cuda_cases(quick: bool) -> list[Case]:
    """The shapes of the GPU protocol, the most telling first: a run cut short has measured those."""
    sizes = (1024, 4096) if quick else (16384, 65536, 4096, 1024)
    cases = [_case("infonce", "two_view", n, dtype="bfloat16", compile=True) for n in sizes]
    cases += [_case(loss, "two_view", sizes[0], dtype="bfloat16", compile=True) for loss in _other_losses()]
    if quick:
        return cases
    cases += [
        _case("infonce", "two_view", 16384, dtype=dtype, compile=True) for dtype in ("float32", "tf32", "float16")
    ]
    cases += [_case("infonce", "two_view", 16384, dim=dim, dtype="bfloat16") for dim in (256, 512, 768, 1024)]
    cases += [_case("infonce", "queue", n, 65536, dtype="bfloat16") for n in (256, 1024, 4096)]
    cases += [_case("infonce", "symmetric", n, dim=512, dtype="bfloat16") for n in (4096, 16384, 65536)]
    cases += [_case("infonce", "two_view", 65536, dim=dim, dtype="bfloat16") for dim in (256, 512, 768, 1024)]
    cases += [_case("infonce", "symmetric", 65536, dim=768, dtype="bfloat16")]
    cases += [_case(loss, "two_view", n, dtype="bfloat16") for loss in _other_losses() for n in (4096, 65536)]
    cases += [_case("infonce", "two_view", 16384, dtype="bfloat16", temperature=t) for t in (0.5, 0.07, 0.01)]
    # ragged: no tile size divides them
    cases += [_case("infonce", "two_view", 70, dtype="bfloat16"), _case("infonce", "symmetric", 4097, dtype="bfloat16")]
    cases += [_case("infonce", "two_view", 262144, dtype="bfloat16", fused_only=True)]
    return cases


def smoke_cases() -> list[Case]:
    """Every loss and layout at sizes that no tile divides, small enough for compute-sanitizer."""
    return [
        _case(short_name(name), layout, n, m, dim, dtype=dtype)
        for name in LOSSES
        for layout, n, m, dim in (("two_view", 70, 70, 32), ("symmetric", 67, 67, 40), ("queue", 33, 129, 32))
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ]
