"""One call held to the truth: loss, gradients under a random upstream gradient, statistics; the rule of accuracy.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from accuracy import ULPS, assert_close
from amx_model import the_model_multiplies
from draw import SIXTEEN_BITS
from truth import Arithmetic, Outcome


@dataclass
class Call:
    """A public loss with all arguments of one call, and the formula that says what must come out.

    inputs     differentiable tensors by keyword, a learned temperature among them
    wanted     those whose gradient is asked for
    constants  every other argument
    truth      (Arithmetic, inputs in its dtype) -> Outcome
    around     what wraps an input in the call
    overwrite  tensors that the caller may overwrite between forward and backward (a queue)
    """

    function: Callable
    module: type
    inputs: dict[str, Tensor]
    wanted: set[str]
    constants: dict
    truth: Callable[[Arithmetic, dict[str, Tensor]], Outcome]
    dtype: torch.dtype
    operands: torch.dtype
    normalize: bool
    reduction: str
    return_stats: bool
    exact: bool = False
    as_module: bool = False
    autocast: bool = False
    group: bool = False
    overwrite: list[Tensor] = field(default_factory=list)
    around: dict[str, Callable] = field(default_factory=dict)  # what an input is wrapped in

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass
class Result:
    loss: Tensor
    grads: dict[str, Tensor]
    stats: dict | None
    how: Arithmetic | None = None
    terms: dict[str, float] = field(default_factory=dict)
    upstream: float = 1.0  # the largest upstream gradient


def expected(call: Call, compute: torch.dtype, upstream: Tensor | None) -> Result:
    """What the formula gives in `compute`."""
    how = Arithmetic(compute, call.operands, call.normalize, call.exact)
    leaves = {name: x.detach().to(compute).contiguous().requires_grad_() for name, x in call.inputs.items()}
    outcome = call.truth(how, leaves)
    loss = outcome.reduced(call.reduction)
    weights = torch.ones_like(loss) if upstream is None else upstream.to(compute)
    of = list(leaves.values()) + how.logits
    grads = torch.autograd.grad((loss * weights).sum(), of, allow_unused=True, retain_graph=outcome.differences)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(of, grads, strict=True)]
    named = dict(zip(leaves, grads, strict=False))
    # a gradient is a sum of operands, weighted by the gradients of the logits: sizes of what may cancel in it
    through, everything = [_largest_sum(g) for g in grads[len(leaves) :]], [g.abs().sum() for g in grads[len(leaves) :]]
    if outcome.differences:
        rows = torch.autograd.grad((loss * weights).sum(), outcome.losses)[0].abs()
        through.append(4 * rows.max().item())
        everything.append(2 * rows.sum())
    terms = {"loss": float(outcome.losses.numel()) if call.reduction == "sum" else 1.0}
    for name, x in leaves.items():
        if name in how.named:
            lengths = x.detach().norm(dim=-1) if call.normalize else torch.ones((), dtype=compute)
            shortest = lengths.where(lengths > 0, torch.inf).min().item()
            terms[name] = sum(through) * how.scale * how.largest_entry / shortest
        else:
            terms[name] = sum(x.item() for x in everything) * how.largest_logit / x.abs().min().item()
    return Result(loss.detach(), named, outcome.stats, how, terms, weights.abs().max().item())


def _largest_sum(gradient: Tensor) -> float:
    """The largest sum of absolute values over a row or a column."""
    size = gradient.abs().flatten(1) if gradient.dim() > 1 else gradient.abs()[:, None]
    return max(size.sum(1).max().item(), size.sum(0).max().item() if gradient.dim() > 1 else 0.0)


def upstream_like(loss: Tensor, gradients: dict[str, Tensor], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random upstream gradient; for float16 as large as a GradScaler makes it, so that gradients do not underflow."""
    upstream = torch.randn(loss.shape, dtype=torch.float64, generator=generator)
    upstream = upstream.sign() * (0.25 + upstream.abs())
    if dtype == torch.float16:
        largest = max(g.abs().max().item() for g in gradients.values() if g.dim())
        power = 0 if largest == 0 else min(20, max(0, int(6 - math.log2(largest))))
        upstream = upstream * 2.0**power
    return upstream.float().double()  # a number that float32 holds


def ours(call: Call, backend: str, upstream: Tensor) -> Result:
    """Loss, gradients and statistics of a backend."""
    by_the_model = backend == "cpu" and call.constants.get("operand_dtype") == "bf16x3"  # AMX alone has such products
    with the_model_multiplies() if by_the_model else nullcontext():
        return _ours(call, backend, upstream)


def _ours(call: Call, backend: str, upstream: Tensor) -> Result:
    leaves = {name: x.detach().requires_grad_(name in call.wanted) for name, x in call.inputs.items()}
    wrapped = {name: call.around[name](x) if name in call.around else x for name, x in leaves.items()}
    arguments = {**call.constants, **wrapped, "backend": backend}
    if call.group:
        arguments["group"] = dist.group.WORLD
    function = call.function
    if call.as_module:
        function, arguments = _module(call, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16) if call.autocast else nullcontext():
        out = function(**arguments)
    loss, stats = out if call.return_stats else (out, None)
    overwrite = [] if backend == "reference" else call.overwrite
    kept = [x.clone() for x in overwrite]
    for x in overwrite:
        x.fill_(torch.nan)
    try:
        of = [leaves[name] for name in leaves if name in call.wanted]
        grads = torch.autograd.grad(loss, of, upstream.to(loss.dtype), allow_unused=True)
    finally:
        for x, before in zip(overwrite, kept, strict=True):
            x.copy_(before)
    named = dict(zip([name for name in leaves if name in call.wanted], grads, strict=True))
    named = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in named.items()}
    return Result(loss.detach(), named, None if stats is None else stats.to_dict())


def _module(call: Call, arguments: dict) -> tuple[Callable, dict]:
    """The same call through the module: numbers and words at construction, tensors at the call."""
    parameters = inspect.signature(call.module.__init__).parameters
    takes_options = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = inspect.signature(call.function).parameters

    def at_construction(name: str, value) -> bool:
        if isinstance(value, (Tensor, tuple)) or name == "group" or (name == "queue" and "queue" not in parameters):
            return False
        return name in parameters or (takes_options and name in own and name not in ("positives", "positive_weight"))

    built = {name: x for name, x in arguments.items() if at_construction(name, x)}
    return call.module(**built), {name: x for name, x in arguments.items() if name not in built}


def truths(call: Call, seed: int) -> tuple[Result, Result, Tensor]:
    """The truth, the dense formula in the dtype under test, and the upstream gradient of both.

    Of float64 the dense formula is the truth itself: its error is that of float32, as much smaller as an ulp is.
    """
    first = expected(call, torch.float64, None)
    upstream = upstream_like(first.loss, first.grads, call.dtype, torch.Generator().manual_seed(seed))
    truth, dense = expected(call, torch.float64, upstream), expected(call, torch.float32, upstream)
    if call.dtype == torch.float64:
        grads = {name: _shrunk(g, truth.grads[name]) for name, g in dense.grads.items()}
        dense = Result(_shrunk(dense.loss, truth.loss), grads, truth.stats)
    return truth, dense, upstream


def _shrunk(dense: Tensor, truth: Tensor) -> Tensor:
    return truth + (dense.double() - truth).nan_to_num(0.0, 0.0, 0.0) * 2.0**-29


def compare(call: Call, backend: str, got: Result, dense: Result, truth: Result) -> None:
    assert got.loss.dtype == call.compute and got.loss.shape == truth.loss.shape
    # an error of a weight counts like one of its logit
    logit = truth.how.largest_logit + truth.how.blur / torch.finfo(call.compute).eps
    # on a GPU the weights of a gradient, or of a mean of keys, are operands of a product too and rounded to its dtype
    rounded = call.operands if backend == "triton" and call.operands in SIXTEEN_BITS else call.compute
    sharp = logit + torch.finfo(rounded).eps / torch.finfo(call.compute).eps / ULPS
    of_loss = sharp * max(1.0, logit) if truth.how.means and rounded != call.compute else logit
    assert_close("loss", got.loss, dense.loss, truth.loss, of_loss, truth.terms["loss"], call.compute)
    for name, gradient in got.grads.items():
        leaf = call.inputs[name]
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
        want, base = truth.grads[name], dense.grads[name]
        how = sharp, truth.terms[name], leaf.dtype, truth.upstream
        assert_close(f"gradient of {name}", gradient, base, want, *how)
    if got.stats is not None:
        compare_stats(got.stats, dense.stats, truth.stats, of_loss, call.compute)


def compare_stats(got: dict, dense: dict, truth: dict, logit: float, dtype: torch.dtype) -> None:
    missing = {name for name in truth if truth[name] == truth[name]} - set(got)
    assert not missing, f"statistics {missing} are not reported"
    unknown = set(got) - set(truth) - {"cancelled_fraction", "effective_negatives"}
    assert not unknown, f"the truth knows no statistics {unknown}"
    for name, want in truth.items():
        value = got[name]
        low, high = want if isinstance(want, tuple) else (want, want)
        if low != low:
            assert value != value, f"{name}: {value} where nothing is defined"
            continue
        base = dense[name] if not isinstance(want, tuple) else low
        slack = 2 * abs(base - low) + 4 * ULPS * torch.finfo(dtype).eps * max(1.0, logit) * max(1.0, abs(high))
        assert low - slack <= value <= high + slack, f"{name}: {value:.9g}, truth {want}, allowed {slack:.3g}"
