"""The streaming primitive of losses that weigh negatives by rank, and its gradient, without the matrix.

    lse_i = log sum_{j negative of i} omega(u_ij) exp(s_ij),   s_ij = scale <u_i, v_j>,   u_ij = rank in row i / N

A sibling of `row_stats` with the same anatomy: schema, shape function, autograd by hand, first derivative only. Ranks
span all columns of a row, so everything an anchor is compared with has to be one call: concatenate, do not merge. The
weights are constants of the gradient: dlse_i/ds_ij = omega e^{s_ij - lse_i}.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..checks import describe
from ..problem import schema
from ..problem.pairs import Gate
from ..problem.ranking import RankedStatistics, Ranking
from .problem_call import of_arguments, of_saved
from .registration import once_differentiable, register, register_autograd, route
from .row_stats import backward_shapes, checked_call


def ranked_stats(
    u: Tensor,
    v: Tensor | None = None,
    *,
    ranking: Ranking,
    scale: float | Tensor,
    num_images: int = 0,
    positive_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    ignored: Tensor | None = None,
    gate: Gate | None = None,
    diagnostics: bool = False,
    unit: bool = False,
    operand_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
) -> RankedStatistics:
    """Log-sum-exp over the negatives of every row, weighted by their rank in the row.

    u, v, scale, num_images, positive_offset, row_ids, col_ids, ignored, gate, unit, operand_dtype, backend
                 as in `row_stats`
    ranking      the weight as a function of the rank, and the number of histogram bins (0: exact ranks); its priors [N]
                 of u's dtype: backend "torch" alone, which "auto" then takes
    diagnostics  also what `RankedStatistics.aux` lists
    Returns      `RankedStatistics`; gradients flow from lse to u, v and scale
    Raises       ValueError/TypeError on shapes, dtypes, ranges; RuntimeError if `backend` cannot run the call
    Cost         exact: 8 N M D flops and two sorts of every row; histogram: 5 N M D (one set) or 8. Memory beyond u, v
                 and their gradients: a block of whole rows per thread, and (bins + 4) N numbers for a histogram
    """
    call = checked_call(
        u, v, scale=scale, num_images=num_images, positive_offset=positive_offset, row_ids=row_ids, col_ids=col_ids,
        ignored=ignored, gate=gate, unit=unit, operand_dtype=operand_dtype, backend=backend_of(ranking, backend, u),
    )  # fmt: skip
    operator = route("ranked_stats", _RankedStats.apply, u, v)
    return RankedStatistics(*operator(*call, *ranking_arguments(ranking), bool(diagnostics)))


def backend_of(ranking: Ranking, backend: str, u: Tensor) -> str:
    """The backend of a call on rows u: one alone knows a prior for every row, whose shape is checked."""
    priors = ranking.tau_plus
    if not isinstance(priors, Tensor):
        return backend
    if priors.shape != u.shape[:1] or priors.dtype != u.dtype or priors.device != u.device:
        raise ValueError(
            f"the priors of a ranking must be {u.dtype} [{u.shape[0]}] on {u.device}; got {describe(priors)}."
        )
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"backend={backend!r} weighs ranks by one prior for all rows: a tau_plus of each needs backend='torch', "
            "'auto' or 'reference'."
        )
    return "torch"


def ranking_arguments(ranking: Ranking) -> tuple[Tensor | None, list[float], int]:
    """In the order of `schema.PRIORS_AND_RANKING`."""
    priors, tau_plus = (ranking.tau_plus, 0.0) if isinstance(ranking.tau_plus, Tensor) else (None, ranking.tau_plus)
    return priors, [tau_plus, ranking.alpha, ranking.beta, ranking.eps], ranking.bins


def _forward(*args) -> tuple[Tensor, ...]:
    call, (*how, diagnostics) = of_arguments(args)
    problem, backend = call.problem()
    return tuple(backend.ranked_forward(problem, _ranking(*how), diagnostics=diagnostics))


def _backward(*args) -> tuple[Tensor, Tensor]:
    call, (priors, parameters, bins, *stats, grad_lse, need_u, need_v) = of_arguments(args)
    problem, backend = call.problem()
    ranking = _ranking(priors, parameters, bins)
    return backend.ranked_backward(problem, ranking, RankedStatistics(*stats), grad_lse, need_u=need_u, need_v=need_v)


def _forward_and_kept(args, call, wanted) -> tuple[tuple[Tensor, ...], ModuleType | None, list[Tensor]]:
    """As in row_stats.py."""
    priors, parameters, bins, diagnostics = wanted
    keeper = None if diagnostics or bins else call.keeper()
    if keeper is not None:
        made = keeper.ranked_forward(call.problem()[0], _ranking(priors, parameters, bins))
        if made is not None:
            return tuple(made.stats), keeper, [*made.blocks, *made.sums]
    with torch._C._AutoDispatchBelowAutograd():
        return route("ranked_stats", _forward, call.u, call.v)(*args), None, []


def _ranking(priors: Tensor | None, parameters: list[float], bins: int) -> Ranking:
    tau_plus, alpha, beta, eps = parameters
    return Ranking(tau_plus if priors is None else priors, alpha, beta, eps, bins)


def _forward_shapes(u, *rest) -> tuple[Tensor, ...]:
    bins, diagnostics = rest[-2:]
    n = u.shape[0]
    axis, below = ((3, n), (n, bins + 1)) if bins else ((0,), (0,))
    return u.new_empty(n), u.new_empty(6 if diagnostics else 1, n), u.new_empty(axis), u.new_empty(below)


class _RankedStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        call, wanted = of_arguments(args)
        (lse, aux, axis, below), ctx.keeper, kept = _forward_and_kept(args, call, wanted)
        u, v, scale, *pair_tensors = call.tensors()
        priors, *ctx.ranking, _ = wanted
        ctx.numbers = call.numbers()
        saved = (*pair_tensors, priors, lse, aux, axis, below) if ctx.keeper is None else kept
        ctx.save_for_backward(u, v, scale, *saved)
        ctx.mark_non_differentiable(aux, axis, below)
        ctx.set_materialize_grads(False)
        return lse, aux, axis, below

    @staticmethod
    def backward(ctx, grad_lse, *_):
        u, v, scale, *saved = ctx.saved_tensors
        scale_value, exponents, *_ = ctx.numbers
        need_u, need_v, need_scale = ctx.needs_input_grad[:3]
        du = dv = dscale = None
        if grad_lse is not None:
            needs = need_u or need_scale, need_v
            if ctx.keeper is not None:
                scale = scale_value if scale is None else scale
                du, dv = once_differentiable(
                    ctx.keeper.backward, u, v, scale, exponents, grad_lse[None], None, *needs, *saved
                )
            else:
                *pair_tensors, priors, lse, aux, axis, below = saved
                call = of_saved((u, v, scale, *pair_tensors), ctx.numbers)
                gradient = route("ranked_stats_backward", _backward, u, v, grad_lse)
                du, dv = once_differentiable(
                    gradient, *call, priors, *ctx.ranking, lse, aux, axis, below, grad_lse.contiguous(), *needs
                )
            if need_scale:
                dscale = (u * du).sum() / (scale if v is not None else 2 * scale)
        gradients = [du if need_u else None, dv if need_v else None, dscale]
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


_STATISTICS = "Tensor lse, Tensor aux, Tensor axis, Tensor below"
_HOW = schema.PRIORS_AND_RANKING
register("ranked_stats", schema.ranked_stats(schema.PROBLEM, _HOW), _forward, _forward_shapes)
_BACKWARD = schema.ranked_stats_backward(schema.PROBLEM, _STATISTICS, _HOW)
register("ranked_stats_backward", _BACKWARD, _backward, backward_shapes)
register_autograd("ranked_stats", _RankedStats)
