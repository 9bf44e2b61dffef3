"""The truth: every loss as its paper writes it, on whole matrices, in plain PyTorch. Shares no code with the package.

The same lines run in float64, which is the truth, and in the dtype under test, which is the dense formula the error
rule compares with. What the package decides (who is cancelled, detected, ranked) is decided here in float64 from the
operands' values, and every decision leaves its distance to the limit in `Arithmetic.clearance`: below 1 rounding could
decide otherwise, and a test has to draw other numbers. The positive stays outside every sum, all is in log space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Arithmetic:
    """How one evaluation computes: in which dtype, on unit or given rows, on operands rounded to which dtype.

    compute    float64 for the truth
    operands   dtype that the rows are rounded to once they are unit rows; gradients pass the rounding
    exact      products of the inputs are exact numbers of every dtype, so that ties are ties everywhere
    """

    def __init__(self, compute: torch.dtype, operands: torch.dtype, normalize: bool, exact: bool = False):
        self.compute, self.operands, self.normalize, self.exact = compute, operands, normalize, exact
        self.decides = torch.float64 if operands == torch.float64 else torch.float32  # what the package decides in
        self.named: set[str] = set()
        self.clearance = math.inf
        self.largest_logit = self.largest_entry = 0.0
        self.means = False  # whether a mean of keys under a softmax enters the loss
        self.scale, self.blur = 1.0, 0.0  # blur: relative error that the dtype under test leaves in a weight
        self.logits: list[Tensor] = []  # every matrix that gradients pass through

    def rows(self, name: str, z: Tensor) -> Tensor:
        """Operands of a differentiable input."""
        z = z.to(self.compute)
        if self.normalize:
            z = unit(z)
        self.named.add(name)
        return self.rounded(z)

    def constant(self, z: Tensor, normalize: bool = False) -> Tensor:
        """Operands of an input without gradient."""
        z = z.detach().to(self.compute)
        return self.rounded(unit(z) if normalize else z)

    def rounded(self, z: Tensor) -> Tensor:
        self.largest_entry = max(self.largest_entry, z.detach().abs().max().item())
        if self.operands not in (torch.float16, torch.bfloat16):
            return z
        return z + (z.detach().to(self.operands).to(z.dtype) - z.detach())

    def decided(self, distance: Tensor, asked: Tensor, size: float | Tensor = 1.0, allowance: float = 64) -> None:
        """Note how far from their limits decisions are, in units of `allowance` eps times their size."""
        share = distance.abs() / (allowance * torch.finfo(self.decides).eps * size)
        if self.exact:
            asked = asked & (distance != 0)
        if asked.any():
            self.clearance = min(self.clearance, share[asked].min().item())

    def saw(self, logits: Tensor, exponent: float = 1.0) -> None:
        if logits.requires_grad:
            self.logits.append(logits)
        finite = logits.detach()[logits.detach().isfinite()]
        if finite.numel():
            self.largest_logit = max(self.largest_logit, exponent * finite.abs().max().item())


def unit(z: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and gets no gradient."""
    zero = (z.detach() == 0).all(-1, keepdim=True)
    filled = torch.where(zero, torch.ones_like(z), z)
    return torch.where(zero, torch.zeros_like(z), filled / filled.square().sum(-1, keepdim=True).sqrt())


def log_sum(x: Tensor, mask: Tensor) -> Tensor:
    """[R] log of the sum of e^x over a mask [R, C]; rows with an empty one give 0, which nobody may use."""
    empty = ~mask.any(1)
    shift = x.detach().masked_fill(~mask, -torch.inf).amax(1).masked_fill(empty, 0.0)
    terms = torch.exp((x - shift[:, None]).masked_fill(~mask, -torch.inf)).sum(1)
    return terms.masked_fill(empty, 1.0).log() + shift


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


@dataclass
class Outcome:
    """What a formula gives.

    losses       of every anchor
    stats        by name a number, or the two between which it must lie; one that is undefined is left out
    in_mean      anchors that the mean is over; None: all
    differences  the gradient is a softmax minus other weights on the same columns, two terms that may cancel
    """

    losses: Tensor
    stats: dict[str, float | tuple[float, float]] = field(default_factory=dict)
    in_mean: Tensor | None = None
    differences: bool = False

    def reduced(self, reduction: str) -> Tensor:
        if reduction == "none":
            return self.losses
        number = self.losses.numel() if self.in_mean is None else max(1, int(self.in_mean.sum()))
        return self.losses.sum() if reduction == "sum" else self.losses.sum() / number


# Losses over pairs: anchors against candidates.


@dataclass
class Side:
    """Anchors or candidates: vectors, and for each its image (-1: none), id (None: none carries one) and guide."""

    vectors: Tensor
    image: Tensor
    ids: Tensor | None = None
    guide: Tensor | None = None
    guided: bool = True  # False: explicit negatives, which a guide never cancels


@dataclass
class Problem:
    logits: Tensor  # [R, C]
    negative: Tensor  # [R, C]
    candidate: Tensor  # [R, C] negatives before ids, guides and padding are looked at
    pos: Tensor  # [R]
    correction: Tensor  # [R]
    scale: Tensor
    lengths: Tensor  # [R] product of the lengths of the anchor and its positive
    width: int
    # what a formula leaves for the statistics
    on_floor: tuple[Tensor, Tensor] | None = None  # [R] anchors that certainly are on the floor, that may be
    log_weight: Tensor | None = None  # [R, C] of the weights on e^logit

    @property
    def count(self) -> Tensor:
        return self.negative.sum(1).to(self.logits.dtype)

    def lse(self, exponent: float = 1.0, log_weight: Tensor | None = None) -> Tensor:
        x = exponent * self.logits if log_weight is None else self.logits + log_weight
        return log_sum(x, self.negative)


@dataclass
class Cancelling:
    """What cancels candidates."""

    ids: Tensor | None = None
    queue_ids: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None
    guide_queue: Tensor | None = None
    margin: float = 0.0
    relative: bool = False


def problem(
    how: Arithmetic, z1: Tensor, z2: Tensor, scale: Tensor, layout: str, cancelling: Cancelling, *,
    queue: Tensor | None = None, queue_filled: Tensor | None = None, negatives: Tensor | None = None,
    in_batch: bool = True, positives: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Who meets whom in a layout, as one matrix."""
    how.scale = scale.item()
    u1, u2 = how.rows("z1", z1), how.rows("z2", z2)
    extra = None if negatives is None else how.rows("negatives", negatives)
    views = None if positives is None else how.rows("positives", positives)
    g1, g2 = (None, None) if cancelling.guide is None else (unit(g.detach().double()) for g in cancelling.guide)
    first, second = torch.arange(len(u1)), torch.arange(len(u2))
    ids = cancelling.ids
    own = None if ids is None else ids[: len(u1)]
    one, two = Side(u1, first, own, g1), Side(u2, second, ids, g2)
    sets: list[Side] = []
    if queue is not None:
        g = None if cancelling.guide_queue is None else unit(cancelling.guide_queue.detach().double())
        exists = torch.ones(len(queue), dtype=torch.bool) if queue_filled is None else queue_filled
        held = None if cancelling.queue_ids is None else cancelling.queue_ids[exists]
        g = None if g is None else g[exists]
        sets.append(Side(how.constant(queue)[exists], torch.full((int(exists.sum()),), -1), held, g))
    unfilled = 0 if queue_filled is None else int((~queue_filled).sum())
    if extra is not None and extra.dim() == 2:
        sets.append(Side(extra, torch.full((len(extra),), -1), guided=False))
    if layout == "two_view":
        both = Side(torch.cat([u1, u2]), first.repeat(2), _cat(own, own), _cat(g1, g2))
        meetings = [(both, [both, *sets], torch.cat([u2, u1]), _cat(g2, g1))]
    elif layout == "symmetric":
        meetings = [(one, [two], u2, g2), (two, [one], u1, g1)]
    else:
        meetings = [(one, ([two] if in_batch else []) + sets, u2[: len(u1)], None if g2 is None else g2[: len(u1)])]
    parts = []
    for anchors, candidates, partners, partner_guides in meetings:
        pos = scale * (anchors.vectors * partners).sum(1)
        blocks = [_block(how, anchors, c, scale, partner_guides, cancelling) for c in candidates]
        logits, kept, candidate = (list(x) for x in zip(*blocks, strict=True)) if blocks else ([], [], [])
        if extra is not None and extra.dim() == 3:
            logits.append(scale * (anchors.vectors[:, None] * extra).sum(2))
            kept.append(torch.ones(logits[-1].shape, dtype=torch.bool))
            candidate.append(kept[-1])
        if unfilled:
            logits.append(torch.zeros(len(pos), unfilled, dtype=pos.dtype))
            kept.append(torch.zeros(len(pos), unfilled, dtype=torch.bool))
            candidate.append(~kept[-1])
        correction = pos
        if views is not None:
            shown = anchors.image
            x = scale * torch.stack([(anchors.vectors * view[shown]).sum(1) for view in views], 1)
            correction = log_sum(x, torch.ones_like(x, dtype=torch.bool)) - math.log(len(views))
        lengths = anchors.vectors.detach().norm(dim=1) * partners.detach().norm(dim=1)
        parts.append((*(torch.cat(x, 1) for x in (logits, kept, candidate)), pos, correction, lengths))
    logits, kept, candidate, pos, correction, lengths = (torch.cat(x) for x in zip(*parts, strict=True))
    for x in (logits, pos, correction):
        how.saw(x)
    return Problem(logits, kept, candidate, pos, correction, scale, lengths, u1.shape[1])


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


def _block(
    how: Arithmetic, anchors: Side, columns: Side, scale: Tensor, partner_guides: Tensor | None, say: Cancelling
):
    logits = scale * (anchors.vectors @ columns.vectors.T)
    candidate = (anchors.image[:, None] != columns.image) | (columns.image < 0)
    kept = candidate
    if anchors.ids is not None and columns.ids is not None:
        kept = kept & (anchors.ids[:, None] != columns.ids)
    if anchors.guide is not None and columns.guide is not None and columns.guided:
        width = anchors.guide.shape[1]
        positive = (anchors.guide * partner_guides).sum(1)
        limit = positive - (positive.abs() if say.relative else 1.0) * say.margin
        limit = limit + 4 * width**0.5 * torch.finfo(how.decides).eps
        score = anchors.guide @ columns.guide.T
        how.decided(score - limit[:, None], kept, width**0.5, allowance=2)
        kept = kept & ~(score > limit[:, None])
    return logits, kept, candidate


def infonce(how: Arithmetic, p: Problem) -> Tensor:
    return log1p_exp(p.lse() - p.pos)


def decoupled(how: Arithmetic, p: Problem, positive_weight: Tensor | None = None) -> Tensor:
    weight = 1.0 if positive_weight is None else positive_weight.to(p.pos.dtype)
    if positive_weight is not None and len(p.pos) != len(positive_weight):
        weight = weight.repeat(2)
    return p.lse() - weight * p.pos


def hinge(how: Arithmetic, p: Problem, margin: float) -> Tensor:
    """A user's loss, the README's."""
    x = p.lse() - p.count.clamp(min=1).log() - p.pos + margin * p.scale
    how.decided(x.detach().double(), p.negative.any(1), 1.0 + how.largest_logit)
    return x.clamp(min=0)


def debiased(how: Arithmetic, p: Problem, tau_plus: float = 0.1) -> Tensor:
    return _debiased_tail(how, p, p.lse(), tau_plus)


def hard(how: Arithmetic, p: Problem, tau_plus: float = 0.1, beta: float = 1.0, detach_weights: bool = False) -> Tensor:
    how.saw(p.logits.detach(), 1 + beta)
    log_number = p.count.clamp(min=1).log()
    if detach_weights:
        log_weight = (beta * p.logits - p.lse(beta)[:, None] + log_number[:, None]).detach()
        return _debiased_tail(how, p, p.lse(log_weight=log_weight), tau_plus)
    return _debiased_tail(how, p, log_number + p.lse(1 + beta) - p.lse(beta), tau_plus)


def _debiased_tail(how: Arithmetic, p: Problem, log_sum_exp: Tensor, tau: float) -> Tensor:
    """The loss of Ng = max((e^log_sum_exp - tau N e^c)/(1 - tau), N e^{-1/t}); below the floor there is no gradient."""
    log_number, exists = p.count.clamp(min=1).log(), p.negative.any(1)
    log_floor = log_number - p.scale
    with torch.no_grad():  # who is on the floor, from float64 exponents relative to the largest
        shift = torch.maximum(log_sum_exp, log_floor).double()
        hidden = torch.zeros_like(shift)
        if tau > 0:
            hidden = torch.exp(p.correction.double() + log_number.double() + math.log(tau) - shift)
        raw = (torch.exp(log_sum_exp.double() - shift) - hidden) / (1 - tau)
        distance = raw - torch.exp(log_floor.double() - shift)
        clamped = distance < 0
        size = (1 + hidden.clamp(max=1e3) + how.largest_logit) / (1 - tau)
        how.decided(distance, exists, size)
        near = distance.abs() < 64 * torch.finfo(how.decides).eps * size
        # raw is a difference: its relative error is that of its terms, as much larger as they are
        steep = (raw + 2 * hidden / (1 - tau)) / raw
        steepest = max([0.0, *steep[exists & ~clamped].tolist()])
        how.blur = max(how.blur, steepest * how.largest_logit * torch.finfo(how.decides).eps)
    p.on_floor = (clamped & ~near & exists, (clamped | near) & exists)
    ratio = torch.zeros_like(log_sum_exp)
    if tau > 0:  # e^{c - lse + log tau N}: below 1 in every row that is not on the floor
        ratio = torch.exp((p.correction + log_number + math.log(tau) - log_sum_exp).masked_fill(clamped, -torch.inf))
    log_raw = log_sum_exp + torch.log1p(-ratio.clamp(max=1 - torch.finfo(ratio.dtype).eps)) - math.log1p(-tau)
    return log1p_exp(torch.where(clamped, log_floor, log_raw) - p.pos)


def bayesian(
    how: Arithmetic, p: Problem, tau_plus: float = 0.1, alpha: float = 0.9, beta: float = 0.9, eps: float = 1e-3,
    bins: int = 0,
) -> Tensor:  # fmt: skip
    """bins = 0: ranks by comparing every negative with every other; else those of a histogram over the row's range."""
    number = p.count.clamp(min=1).double()[:, None]
    x = (p.logits.detach() / p.scale.detach()).double().masked_fill(~p.negative, torch.inf)
    size = 1.0 + x[p.negative].abs().max().item() if p.negative.any() else 1.0
    if bins:
        u, rounding = _histogram_rank(how, x, p.negative, number, bins)
    else:
        u = (x[:, None, :] <= x[:, :, None]).logical_and(p.negative[:, None, :]).sum(2) / number
        ordered = x.sort(1).values
        gap = ordered.diff(dim=1)
        pair = ordered[:, 1:].isfinite() & ~((ordered[:, 1:] == 0) & (ordered[:, :-1] == 0))
        how.decided(gap.masked_fill(~pair, 1.0), pair, size, allowance=8)
        rounding = torch.where(u < 1, torch.finfo(how.decides).eps, 0.0)  # u = 1 is no quotient
    a = (1 - 2 * alpha) * (1 - 2 * tau_plus) + eps
    b = 2 * (alpha * (1 - tau_plus) + (1 - alpha) * tau_plus)

    def weight(u: Tensor, rest_of_u: Tensor, blur: float | Tensor = 0.0) -> Tensor:
        root = (b * b + 4 * a * u).clamp(min=0).sqrt() * (1 + blur)
        phi, rest = 2 * u / (b + root), 2 * (rest_of_u + eps) / (2 * a + b + root)  # 1 - phi: a + b = 1 + eps
        omega = 2 * alpha * (1 - beta) * rest + 2 * (1 - alpha) * beta * phi
        return omega / (alpha * (1 - beta) + (1 - alpha) * beta + eps) / (b * rest + (2 - b) * phi)

    with (
        torch.no_grad()
    ):  # how exactly the dtype under test can know a weight: u is rounded, the root is of a difference
        exact = weight(u, 1 - u)
        blur = torch.finfo(how.decides).eps * b * b / (b * b + 4 * a * u).clamp(min=torch.finfo(how.decides).eps)
        for moved in (weight(u, 1 - u, blur), weight(u * (1 - rounding), 1 - u * (1 - rounding))):
            how.blur += max([0.0, *(moved / exact - 1).abs()[p.negative & (exact > 0)].tolist()])
    u, low = u.to(p.logits.dtype), (1 - u).to(p.logits.dtype)
    omega = weight(u, low)
    weightless = p.negative & (omega <= 0)  # the highest rank with beta = eps = 0: a negative that counts for nothing
    p.log_weight = omega.masked_fill(~p.negative | weightless, 1.0).log().masked_fill(weightless, -torch.inf)
    some = p.negative & ~weightless
    sum_of_weighted = log_sum((p.logits + p.log_weight).masked_fill(weightless, 0.0), some)
    return torch.where(some.any(1), log1p_exp(sum_of_weighted - p.pos), 0.0 * p.pos)


def _histogram_rank(how: Arithmetic, x: Tensor, negative: Tensor, number: Tensor, bins: int):
    dtype = how.compute
    low = x.amin(1, keepdim=True)
    high = x.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    flat = ~(high > low)

    def places(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        place = ((x - low) / (high - low)).where(negative & ~flat, 0.0) * bins
        return torch.where(flat, float(bins), place)

    place = places(x, low, high)
    bin_of = place.floor().clamp(max=bins - 1).long()
    inner = negative & (x > low) & (x < high)
    how.decided(place - place.round(), inner, bins * x.masked_fill(~negative, 0).abs().amax(1, True) / (high - low), 8)
    counts = torch.zeros(len(x), bins, dtype=x.dtype).scatter_add_(1, bin_of, negative.to(x.dtype))
    below = (counts.cumsum(1) - counts).gather(1, bin_of)
    place = places(*(z.to(dtype) for z in (x, low, high))).double()  # as exact as the dtype under test makes it
    of_bin = counts.gather(1, bin_of) - 1
    u = (below + (place - bin_of).clamp(0, 1) * of_bin + 1) / number
    return u.clamp(max=1), 2 * torch.finfo(how.decides).eps * (1 + bins * of_bin / number / u)


def pair_outcome(how: Arithmetic, p: Problem, losses: Tensor, first_exponent: float) -> Outcome:
    """Losses with 0 for anchors without negatives, and the statistics of `return_stats`."""
    some = p.negative.any(1)
    losses = torch.where(some, losses, 0.0 * p.pos)
    number = max(1, int(some.sum()))
    scale, count = p.scale.detach(), p.count.clamp(min=1)

    def mean(x: Tensor) -> float:
        return (x.detach().where(some, torch.zeros_like(x)).sum() / number).item()

    hardest = p.logits.detach().masked_fill(~p.negative, -torch.inf).amax(1).where(some, torch.zeros(()).to(p.pos))
    allowed = 4 * p.width**0.5 * torch.finfo(how.decides).eps * scale
    allowed = allowed if how.normalize else allowed * p.lengths
    ahead = p.pos.detach() - hardest
    log_weight = torch.zeros_like(p.logits) if p.log_weight is None else p.log_weight
    weight = log_weight.exp().masked_fill(~p.negative, 0.0)
    terms = first_exponent * p.logits + log_weight
    stats = {
        "accuracy": (mean((ahead > 4 * allowed).to(p.pos)), mean((ahead > allowed / 4).to(p.pos))),
        "positive_similarity": mean(p.pos / scale),
        "negative_similarity": mean(p.logits.where(p.negative, torch.zeros_like(p.logits)).sum(1) / count / scale),
        "hardest_negative": mean(hardest / scale),
        "effective_negatives": mean(torch.exp(2 * log_sum(terms, p.negative) - log_sum(2 * terms, p.negative))),
        "mean_weight": mean(weight.sum(1) / count),
        "max_weight": mean(weight.amax(1)),
        "clamped_fraction": (0.0, 0.0) if p.on_floor is None else tuple(mean(x.to(p.pos)) for x in p.on_floor),
        "empty_rows": float((~some).sum()),
    }
    if (p.negative.any(1) & ~(weight > 0).any(1)).any():
        del stats["effective_negatives"]  # an anchor whose only negatives have weight 0
    if p.candidate.any():
        stats["cancelled_fraction"] = 1 - p.negative.sum().item() / p.candidate.sum().item()
    return Outcome(losses, stats)
