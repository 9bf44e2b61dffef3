"""The one table of what is measured: losses, shapes, and the flops each method executes.

    two_view   N = 2B anchors against the same 2B rows (M = N)
    symmetric  N = B rows against M = B columns and back (CLIP)
    queue      N = B anchors, each with its partner as positive, against M frozen keys (MoCo)

and one layout of its own for each loss that is no loss of pairs (own_losses.py).

A new loss is one row of LOSSES: cases, smoke test, digits job, table and picture follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext

from . import baselines, own_losses
from .baselines import DenseLoss
from .own_losses import OwnLoss

PAIR_LAYOUTS = ("two_view", "symmetric", "queue")


@dataclass(frozen=True)
class LossRow:
    """A public loss and its dense formula; temperature is where it is used, and where a debiased row still learns."""

    function: Callable[..., Tensor]
    dense: DenseLoss | OwnLoss
    temperature: float

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts it is defined in."""
        return (self.dense.layout,) if isinstance(self.dense, OwnLoss) else PAIR_LAYOUTS


LOSSES: dict[str, LossRow] = {
    "fused_infonce_loss": LossRow(contrastive_ext.fused_infonce_loss, baselines.INFONCE, 0.1),
    "fused_decoupled_loss": LossRow(contrastive_ext.fused_decoupled_loss, baselines.DECOUPLED, 0.1),
    "fused_debiased_loss": LossRow(contrastive_ext.fused_debiased_loss, baselines.DEBIASED, 0.5),
    "fused_bayesian_loss": LossRow(contrastive_ext.fused_bayesian_loss, baselines.BAYESIAN, 0.5),
    "fused_hard_negative_loss": LossRow(contrastive_ext.fused_hard_negative_loss, baselines.HARD_NEGATIVE, 0.5),
    "fused_false_negative_loss": LossRow(contrastive_ext.fused_false_negative_loss, own_losses.FALSE_NEGATIVE, 0.1),
    "fused_supcon_loss": LossRow(contrastive_ext.fused_supcon_loss, own_losses.SUPCON, 0.1),
    "fused_self_labeling_loss": LossRow(contrastive_ext.fused_self_labeling_loss, own_losses.SELF_LABELING, 0.2),
    "fused_soft_target_loss": LossRow(contrastive_ext.fused_soft_target_loss, own_losses.SOFT_TARGET, 0.1),
}
PAIR_LOSSES = [name for name, row in LOSSES.items() if row.layouts == PAIR_LAYOUTS]

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
#   tiles      as rows, but the forward of one set visits the upper triangle
#   stored     as tiles, but both sides, or both triangles of one set, share the weights
#   histogram  whole rows in the forward, the triangle in the backward
#   sweeps     three forward sweeps for range, counts and sums of a histogram, `rows` in the backward
# The fused paths make a queue's gradient in the forward. Self-labels: the labels of a block and of its partners;
# views: scores and logits, the fused detection is a sweep of its own.
FLOPS = {
    "dense": {
        "two_view": (2, 4), "symmetric": (2, 4), "queue": (2, 2), "self_labels": (8, 4), "soft_targets": (4, 2),
        "views": (4, 4), "labelled": (2, 4),
    },
    "recompute": {
        "two_view": (2, 6), "symmetric": (4, 12), "queue": (2, 4), "self_labels": (8, 12), "soft_targets": (4, 6),
        "views": (4, 8), "labelled": (2, 6),
    },
    "triangle": {
        "two_view": (1, 3), "symmetric": (2, 6), "queue": (4, 0), "self_labels": (12, 0), "soft_targets": (8, 0),
        "views": (3, 3), "labelled": (1, 3),
    },
    "rows": {
        "two_view": (2, 4), "symmetric": (2, 8), "queue": (4, 0), "self_labels": (12, 0), "soft_targets": (8, 0),
        "views": (4, 4), "labelled": (2, 4),
    },
    "histogram": {"two_view": (2, 3), "symmetric": (4, 12), "queue": (2, 4)},
    "sweeps": {"two_view": (6, 4), "symmetric": (12, 8), "queue": (6, 2)},
}  # fmt: skip
FLOPS["tiles"] = FLOPS["rows"] | {"two_view": (1, 4), "views": (3, 4), "labelled": (1, 4)}
FLOPS["stored"] = FLOPS["tiles"] | {"symmetric": (2, 6), "two_view": (1, 3), "views": (3, 3), "labelled": (1, 3)}
ALGORITHMS = {"chunked": "recompute", "torch": "triangle", "cpu": "triangle", "triton": "tiles", "cuda": "rows"}
STORED_FROM = 257  # features from which `triton` stores weights for both sides
# A loss of ranks sees whole rows; what is not listed recomputes.
RANKED_ALGORITHMS = {
    "cpu, histogram": "histogram",
    "triton, histogram": "sweeps",
    "eager": "dense",
    "comparison": "dense",
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
    def dense(self) -> DenseLoss | OwnLoss:
        """The loss's dense formula."""
        return LOSSES[self.loss].dense

    @property
    def is_ranked(self) -> bool:
        """Whether the loss weighs negatives by their ranks."""
        return isinstance(self.dense, DenseLoss) and self.dense.ranks is not None

    @property
    def negatives(self) -> int:
        """Negatives of every anchor of a loss over pairs."""
        return self.m - {"two_view": 2, "symmetric": 1, "queue": 0}[self.layout]

    @property
    def columns(self) -> int:
        """Candidates of every anchor: the m given ones, and the batch's own keys where the loss has such."""
        return self.m + (self.n if isinstance(self.dense, OwnLoss) and self.dense.batch_keys else 0)

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

        if isinstance(self.dense, OwnLoss):
            return Inputs(*self.dense.draw(self, draw)).to(self.torch_dtype)
        z1 = draw(pairs)
        z2 = z1 + 0.5 * draw(pairs)
        queue = F.normalize(draw(self.m), dim=1).to(self.torch_dtype) if self.layout == "queue" else None
        return Inputs(*(z.to(self.torch_dtype).requires_grad_() for z in (z1, z2)), queue)


def short_name(loss: str) -> str:
    """ "infonce" for "fused_infonce_loss"."""
    return loss.removeprefix("fused_").removesuffix("_loss")


def executed_flops(method: str, case: Case, processors: int | None = None) -> tuple[float, float]:
    """Matrix flops of forward and backward as `method` executes them; methods without a row are dense.

    processors  of the GPU, on which a batch too small to occupy it is no triangle; None: large enough
    """
    algorithm = ALGORITHMS.get(method, "dense")
    if algorithm == "tiles" and case.dim >= STORED_FROM:
        algorithm = "stored"
    if case.is_ranked:
        algorithm = RANKED_ALGORITHMS.get(method, "recompute")
    forward, backward = FLOPS[algorithm][case.layout]
    if processors is not None and method == "triton" and not case.is_ranked and forward % 2:
        forward, backward = _as_laid_out(case, processors, forward, backward)
    elements = float(case.n) * case.columns * case.dim
    return forward * elements, backward * elements


def _as_laid_out(case: Case, processors: int, forward: float, backward: float) -> tuple[float, float]:
    """One set as contrastive_ext.backends.triton.forward lays it out: squares where triangles do not pay."""
    from contrastive_ext.backends.triton import forward as triton_forward
    from contrastive_ext.backends.triton import launch as triton_launch

    products = {"float32": "ieee", "tf32": "tf32", "float64": "fp64"}.get(case.dtype, "16-bit")
    config = triton_launch.kernels().configs.choose(
        "forward", products, case.dim, triton_launch.architecture(torch.device("cuda"))
    )
    if -(-case.n // config.block_m) < triton_forward.TRIANGLE_FROM * processors:
        forward += 1
    if case.dim >= STORED_FROM:  # blocks on the diagonal are multiplied whole
        is_wide = case.dim > triton_launch.WIDE_FEATURES
        limit = triton_launch.WIDE_WORKSPACE_BYTES if is_wide else triton_launch.WORKSPACE_BYTES
        side = math.isqrt(limit // case.torch_dtype.itemsize)
        backward += 1 / -(-case.n // side)
    return forward, backward


def fused(case: Case, inputs: Inputs, backend: str, reduction: str, **parameters) -> Tensor:
    """The public function on `inputs`."""
    function = LOSSES[case.loss].function
    if isinstance(case.dense, OwnLoss):
        return case.dense.call(function, case, inputs, {"backend": backend, "reduction": reduction})
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
    return [short_name(name) for name in PAIR_LOSSES if name != "fused_infonce_loss"]


def cpu_cases(quick: bool) -> list[Case]:
    """Growing N for InfoNCE, a small and a large batch of the others, layouts and bf16; the costliest case last."""
    sizes = (256, 1024, 2048) if quick else (128, 256, 1024, 2048, 4096, 8192)
    growing = [_case("infonce", "two_view", n, compile=n == 4096) for n in sizes]
    others = [_case(loss, "two_view", 256) for loss in ("debiased", "hard_negative")]
    others += [_case(loss, "two_view", 2048 if quick else 4096) for loss in _other_losses() if loss != "bayesian"]
    others += [_case("bayesian", "two_view", 512)]  # what comparing all negatives of a row with each other can still do
    if quick:
        return growing + others
    return [
        *growing,
        *others,
        # small: `torch` keeps its block and must not be slower than eager
        *(_case("infonce", "symmetric", n) for n in (256, 4096)),
        *(_case("infonce", "queue", n, m) for n, m in ((256, 1024), (1024, 16384))),
        *(_case(loss, layout, 256) for loss, layout in (("false_negative", "views"), ("supcon", "labelled"))),
        _case("soft_target", "soft_targets", 256, 1024),
        _case("false_negative", "views", 4096),
        _case("supcon", "labelled", 4096),
        _case("self_labeling", "self_labels", 1024, 16384),
        _case("soft_target", "soft_targets", 1024, 16384),
        _case("bayesian", "two_view", 2048),
        _case("self_labeling", "self_labels", 256, 65536),
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
    cases += [_case("self_labeling", "self_labels", n, 65536, dtype="bfloat16") for n in (256, 1024, 4096)]
    cases += [_case("soft_target", "soft_targets", 1024, 65536, dtype="bfloat16")]
    cases += [
        _case(loss, layout, 16384, dtype="bfloat16")
        for loss, layout in (("false_negative", "views"), ("supcon", "labelled"))
    ]
    cases += [_case("infonce", "symmetric", n, dim=512, dtype="bfloat16") for n in (4096, 16384, 65536)]
    cases += [_case("infonce", "two_view", 65536, dim=dim, dtype="bfloat16") for dim in (256, 512, 768, 1024)]
    cases += [_case("infonce", "symmetric", 65536, dim=768, dtype="bfloat16")]
    cases += [_case(loss, "two_view", n, dtype="bfloat16") for loss in _other_losses() for n in (4096, 65536)]
    cases += [_case("infonce", "two_view", 16384, dtype="bfloat16", temperature=t) for t in (0.5, 0.07, 0.01)]
    # ragged: no tile size divides them
    cases += [_case("infonce", "two_view", 70, dtype="bfloat16"), _case("infonce", "symmetric", 4097, dtype="bfloat16")]
    cases += [_case("infonce", "two_view", 262144, dtype="bfloat16", fused_only=True)]
    return cases


def proof_cases() -> list[Case]:
    """What the GPU kernels have paths for, at shapes that take them: triangles, launches, widths, ragged ends."""
    wide, large = (64, 128, 256, 512, 768, 1024), 17024
    cases = [_case("infonce", "two_view", large, dim=d, dtype=t) for d in wide for t in ("float16", "bfloat16")]
    cases += [_case("infonce", "symmetric", 8192, dim=d, dtype="bfloat16") for d in (128, 512, 768)]
    cases += [_case("infonce", "symmetric", 4097, dim=d, dtype=t) for d, t in ((128, "float16"), (768, "bfloat16"))]
    cases += [_case("infonce", "queue", 1024, 65536, dtype=t) for t in ("float16", "bfloat16")]
    cases += [_case(loss, "two_view", large, dtype="bfloat16") for loss in ("hard_negative", "debiased", "decoupled")]
    cases += [_case("infonce", "two_view", large, dtype="bfloat16", temperature=0.01)]
    cases += [
        _case("infonce", "two_view", large, dtype=t, learned=True, temperature=0.07) for t in ("float16", "bfloat16")
    ]
    cases += [_case("infonce", "two_view", 4096, dim=d, dtype=t) for d in (128, 512) for t in ("float32", "tf32")]
    cases += [_case("bayesian", "two_view", 4096, dtype="bfloat16")]
    cases += [
        _case("false_negative", "views", 4096, dtype="bfloat16"),
        _case("supcon", "labelled", 4096, dtype="bfloat16"),
    ]
    cases += [_case("self_labeling", "self_labels", 1024, 65536, dtype="bfloat16")]
    cases += [_case("soft_target", "soft_targets", 1024, 65536, dtype="bfloat16")]
    return [
        *cases,
        _case("infonce", "two_view", 70000, dtype="bfloat16"),
        _case("infonce", "two_view", 1024, dtype="float64"),
    ]


def speed_cases() -> list[Case]:
    """The table of goals: shapes whose share of the library's rate is quoted, the most telling first."""
    large = 32768
    cases = [_case("infonce", "two_view", large, dim=d, dtype="bfloat16") for d in (128, 256, 512, 768, 1024, 64)]
    cases += [_case("infonce", "two_view", 65536, dtype="bfloat16")]
    cases += [_case("infonce", "queue", n, 65536, dtype="bfloat16") for n in (1024, 4096)]
    cases += [_case("infonce", "symmetric", large, dim=d, dtype="bfloat16") for d in (128, 512, 768)]
    cases += [_case("infonce", "two_view", n, dtype="bfloat16") for n in (1024, 4096, 16384)]
    cases += [_case(loss, "two_view", large, dtype="bfloat16") for loss in ("debiased", "hard_negative")]
    cases += [_case("infonce", "two_view", large, dtype=t) for t in ("float16", "tf32")]
    return cases


def tiny(case: Case) -> Case:
    """The same case at a size for a rehearsal."""
    return replace(case, n=min(case.n, 64), m=min(case.m, 64 if case.n == case.m else 96), dim=min(case.dim, 40))


_SMOKE_SHAPES = {
    "two_view": (70, 70, 32), "views": (70, 70, 32), "labelled": (70, 70, 32), "symmetric": (67, 67, 40),
    "queue": (33, 129, 32),
}  # fmt: skip


def smoke_cases() -> list[Case]:
    """Every loss and layout at sizes that no tile divides, small enough for compute-sanitizer."""
    small = [
        _case(short_name(name), layout, n, m, dim, dtype=dtype)
        for name, row in LOSSES.items()
        for layout in row.layouts
        for n, m, dim in (_SMOKE_SHAPES.get(layout, _SMOKE_SHAPES["queue"]),)
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ]
    # what the Hopper kernels compute, over several of their tiles
    return small + [_case("infonce", "two_view", 300, dtype=dtype) for dtype in ("bfloat16", "float16")]
