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
    hardness: float = 0.0  # of candidates: times the constant cosine it is added to their logits
    log_weight: Tensor | None = None  # of candidates: added to their logits


@dataclass
class Meeting:
    """Rows of anchors in one sum: groups of (anchors, candidates), as many anchors in each, and their positives.

    shown   [A, C] of the first group, True where a column is the anchor's own; None: as images say
    """

    groups: list[tuple[Side, Side]]
    partners: Tensor
    partner_guides: Tensor | None
    shown: Tensor | None = None
    own: Own | None = None

    @property
    def anchors(self) -> Side:
        return self.groups[0][0]


@dataclass
class Own:
    """Candidates [A, n, D] of one anchor each."""

    vectors: Tensor
    ids: Tensor | None = None
    guide: Tensor | None = None
    hardness: float = 0.0
    log_weight: Tensor | None = None


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
    similar: Tensor  # [R, C] logits without hardness and weights of columns
    positive_terms: int = 1  # how often the positive stands in the sum
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
    """What cancels candidates; guide "own": the rows themselves."""

    ids: Tensor | None = None
    queue_ids: Tensor | None = None
    negative_ids: Tensor | None = None
    guide: tuple[Tensor, Tensor] | str | None = None
    guide_queue: Tensor | None = None
    guide_negatives: Tensor | None = None
    margin: float = 0.0
    relative: bool = False

    def features(self, vectors: Tensor, given: Tensor | None) -> Tensor | None:
        if self.guide == "own":
            return unit(vectors.detach().double())
        return None if given is None or self.guide is None else unit(given.detach().double())


def problem(
    how: Arithmetic, z1: Tensor, z2: Tensor, scale: Tensor, layout: str | tuple, say: Cancelling, *,
    queue: Tensor | None = None, queue_filled: Tensor | None = None, negatives: Tensor | None = None,
    in_batch: bool = True, positives: Tensor | None = None, positive_index: Tensor | None = None,
    hardness: float = 0.0, hardness_on: str = "in_batch",
    queue_weight: Tensor | None = None, negatives_weight: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Who meets whom in a layout, as one matrix; scale is one number, or [B] one for every row."""
    how.scale = scale.max().item()
    u1, u2 = how.rows("z1", z1), how.rows("z2", z2)
    extra = None if negatives is None else how.rows("negatives", negatives)
    views = None if positives is None else how.rows("positives", positives)
    given = say.guide if isinstance(say.guide, tuple) else (None, None)
    g1, g2 = say.features(u1, given[0]), say.features(u2, given[1])
    first, second = torch.arange(len(u1)), torch.arange(len(u2))
    index = first if positive_index is None else positive_index
    ids = say.ids
    own = None if ids is None else ids[index]
    in_batch_hardness = hardness if hardness_on in ("in_batch", "all") else 0.0
    one = Side(u1, first, own, g1)
    two = Side(u2, second, ids, g2, in_batch_hardness)
    sets: list[Side] = []
    if queue is not None:
        exists = torch.ones(len(queue), dtype=torch.bool) if queue_filled is None else queue_filled
        held = None if say.queue_ids is None else say.queue_ids[exists]
        keys = how.constant(queue)
        g = say.features(keys, say.guide_queue)
        g = None if g is None else g[exists]
        image = torch.full((int(exists.sum()),), -1)
        weight = None if queue_weight is None else queue_weight[exists]
        sets.append(Side(keys[exists], image, held, g, in_batch_hardness, weight))
    unfilled = 0 if queue_filled is None else int((~queue_filled).sum())
    of_each = None
    if extra is not None:
        g = say.features(extra, say.guide_negatives)
        if extra.dim() == 2:
            image = torch.full((len(extra),), -1)
            sets.append(Side(extra, image, say.negative_ids, g, in_batch_hardness, negatives_weight))
        else:
            own_hardness = hardness if hardness_on in ("own", "all") else 0.0
            of_each = Own(extra, say.negative_ids, g, own_hardness, negatives_weight)
    partners, partner_guides = u2[index], None if g2 is None else g2[index]
    documents = Side(
        u2[: len(u1)], first, None if ids is None else ids[: len(u1)], None if g2 is None else g2[: len(u1)]
    )
    if layout == "two_view":
        both = Side(torch.cat([u1, u2]), first.repeat(2), _cat(own, own), _cat(g1, g2))
        meetings = [Meeting([(both, c) for c in (both, *sets)], torch.cat([u2, u1]), _cat(g2, g1))]
    else:
        shown = None
        if positive_index is not None:
            shown = torch.zeros(len(u1), len(u2), dtype=torch.bool)
            shown[first, index] = True
        candidates = ([two] if in_batch else []) + sets
        groups = [(one, c) for c in candidates]
        for direction in layout if isinstance(layout, tuple) else ():
            sides = {"q2q": (one, one), "d2q": (documents, one), "d2d": (documents, Side(u2, second, ids, g2))}
            groups += [sides[direction]] if direction != "q2d" else []
        if not groups:  # explicit negatives of each anchor alone
            groups = [(one, Side(u2[:0], second[:0]))]
        meetings = [Meeting(groups, partners, partner_guides, shown, of_each)]
        if layout == "symmetric":
            meetings.append(Meeting([(documents, one)], u1, g1))
    parts = []
    for meeting in meetings:
        anchors = meeting.anchors
        pos = scale * (anchors.vectors * meeting.partners).sum(1)
        blocks = []

        for at, (rows, columns) in enumerate(meeting.groups):
            block, keeps, counts = _block(how, rows, columns, scale, meeting, say, meeting.shown if at == 0 else None)
            blocks.append((block, keeps, counts, columns.hardness, columns.log_weight))
        if meeting.own is not None:
            each = meeting.own
            block = _column(scale) * (anchors.vectors[:, None] * each.vectors).sum(2)
            counts = torch.ones(block.shape, dtype=torch.bool)
            keeps = counts if each.ids is None or anchors.ids is None else each.ids != anchors.ids[:, None]
            if each.guide is not None:
                score = (anchors.guide[:, None] * each.guide).sum(2)
                keeps = _below(how, score, keeps, meeting, say)
            blocks.append((block, keeps, counts, each.hardness, each.log_weight))
        if unfilled:
            nobody = torch.zeros(len(pos), unfilled, dtype=torch.bool)
            blocks.append((torch.zeros(len(pos), unfilled, dtype=pos.dtype), nobody, ~nobody, 0.0, None))
        hard = [block + more * (block / _column(scale)).detach() for block, _, _, more, _ in blocks]
        hard = [x if w is None else x + w.to(x.dtype) for x, (*_, w) in zip(hard, blocks, strict=True)]
        correction = pos
        if views is not None:
            shown_image = anchors.image
            x = _column(scale) * torch.stack([(anchors.vectors * view[shown_image]).sum(1) for view in views], 1)
            correction = log_sum(x, torch.ones_like(x, dtype=torch.bool)) - math.log(len(views))
        lengths = anchors.vectors.detach().norm(dim=1) * meeting.partners.detach().norm(dim=1)
        similar, kept, candidate, *_ = zip(*blocks, strict=True)
        matrices = [torch.cat(x, 1) for x in (hard, kept, candidate, similar)]
        parts.append([*matrices, pos, correction, lengths])
    width = max(x.shape[1] for part in parts for x in part[:1])
    for part in parts:  # directions of different width: nothing beside the narrower one
        part[:4] = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in part[:4]]
    logits, kept, candidate, similar, pos, correction, lengths = (torch.cat(x) for x in zip(*parts, strict=True))
    for x in (logits, pos, correction):
        how.saw(x)
    terms = 2 if "d2q" in layout else 1
    return Problem(logits, kept, candidate, pos, correction, scale, lengths, u1.shape[1], similar, terms)


def _column(scale: Tensor) -> Tensor:
    """One number, or a column of one for every row."""
    return scale if scale.dim() == 0 else scale[:, None]


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


def _block(
    how: Arithmetic, anchors: Side, columns: Side, scale: Tensor, meeting: Meeting, say: Cancelling,
    shown: Tensor | None,
):  # fmt: skip
    logits = _column(scale) * (anchors.vectors @ columns.vectors.T)
    candidate = ~shown if shown is not None else (anchors.image[:, None] != columns.image) | (columns.image < 0)
    kept = candidate
    if anchors.ids is not None and columns.ids is not None:
        kept = kept & (anchors.ids[:, None] != columns.ids)
    if anchors.guide is not None and columns.guide is not None:
        kept = _below(how, anchors.guide @ columns.guide.T, kept, meeting, say)
    return logits, kept, candidate


def _below(how: Arithmetic, score: Tensor, kept: Tensor, meeting: Meeting, say: Cancelling) -> Tensor:
    """Which of the kept columns do not exceed the limit of the anchor's pair."""
    guide = meeting.anchors.guide
    width = guide.shape[1]
    positive = (guide * meeting.partner_guides).sum(1)
    limit = positive - (positive.abs() if say.relative else 1.0) * say.margin
    limit = limit + 4 * width**0.5 * torch.finfo(how.decides).eps
    how.decided(score - limit[:, None], kept, width**0.5, allowance=2)
    return kept & ~(score > limit[:, None])


def infonce(how: Arithmetic, p: Problem) -> Tensor:
    """log(m + e^{lse - p}), the positive m times in the sum."""
    more = math.log(p.positive_terms)
    return torch.where(p.negative.any(1), log1p_exp(p.lse() - p.pos - more) + more, 0.0 * p.pos + more)


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


def _debiased_tail(how: Arithmetic, p: Problem, log_sum_exp: Tensor, tau: float | Tensor) -> Tensor:
    """The loss of Ng = max((e^log_sum_exp - tau N e^c)/(1 - tau), N e^{-1/t}); below the floor there is no gradient."""
    tau = torch.as_tensor(tau, dtype=torch.float64)
    tau = tau.repeat(len(p.pos) // len(tau)) if tau.dim() else tau
    log_tau = tau.log()  # -inf of a prior of 0: nothing is taken away
    log_number, exists = p.count.clamp(min=1).log(), p.negative.any(1)
    log_floor = log_number - p.scale
    with torch.no_grad():  # who is on the floor, from float64 exponents relative to the largest
        shift = torch.maximum(log_sum_exp, log_floor).double()
        hidden = torch.exp(p.correction.double() + log_number.double() + log_tau - shift)
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
    # e^{c - lse + log tau N}: below 1 in every row that is not on the floor
    share = p.correction + log_number + log_tau.to(p.pos.dtype) - log_sum_exp
    ratio = torch.exp(share.masked_fill(clamped | (tau == 0), -torch.inf))
    rest = torch.log1p(-ratio.clamp(max=1 - torch.finfo(ratio.dtype).eps))
    log_raw = log_sum_exp + rest - torch.log1p(-tau).to(p.pos.dtype)
    return log1p_exp(torch.where(clamped, log_floor, log_raw) - p.pos)


def bayesian(
    how: Arithmetic, p: Problem, tau_plus: float | Tensor = 0.1, alpha: float = 0.9, beta: float = 0.9,
    eps: float = 1e-3, bins: int = 0,
) -> Tensor:  # fmt: skip
    """bins = 0: ranks by comparing every negative with every other; else those of a histogram over the row's range."""
    number = p.count.clamp(min=1).double()[:, None]
    if isinstance(tau_plus, Tensor):
        tau_plus = tau_plus.double().repeat(len(p.pos) // len(tau_plus))[:, None]
    x = (p.logits.detach() / _column(p.scale.detach())).double().masked_fill(~p.negative, torch.inf)
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
    size = bins * x.masked_fill(~negative, 0).abs().amax(1, True) / (high - low)
    how.decided(place - place.round(), inner, size, 24)  # 8 of rounding; the axis ends 16 below the highest
    counts = torch.zeros(len(x), bins, dtype=x.dtype).scatter_add_(1, bin_of, negative.to(x.dtype))
    below = (counts.cumsum(1) - counts).gather(1, bin_of)
    place = places(*(z.to(dtype) for z in (x, low, high))).double()  # as exact as the dtype under test makes it
    of_bin = counts.gather(1, bin_of) - 1
    u = (below + (place - bin_of).clamp(0, 1) * of_bin + 1) / number
    return u.clamp(max=1), 2 * torch.finfo(how.decides).eps * (1 + bins * of_bin / number / u)


def pair_outcome(how: Arithmetic, p: Problem, losses: Tensor, first_exponent: float, of_empty: bool = False) -> Outcome:
    """Losses with 0 for anchors without negatives (`of_empty`: the formula knows), and the statistics."""
    some = p.negative.any(1)
    losses = torch.where(some, losses, losses if of_empty else 0.0 * p.pos)
    number = max(1, int(some.sum()))
    scale, count = p.scale.detach(), p.count.clamp(min=1)

    def mean(x: Tensor) -> float:
        return (x.detach().where(some, torch.zeros_like(x)).sum() / number).item()

    hardest = p.similar.detach().masked_fill(~p.negative, -torch.inf).amax(1).where(some, torch.zeros(()).to(p.pos))
    allowed = 4 * p.width**0.5 * torch.finfo(how.decides).eps * scale
    allowed = allowed if how.normalize else allowed * p.lengths
    ahead = p.pos.detach() - hardest
    log_weight = torch.zeros_like(p.logits) if p.log_weight is None else p.log_weight
    weight = log_weight.exp().masked_fill(~p.negative, 0.0)
    terms = first_exponent * p.logits + log_weight
    stats = {
        "accuracy": (mean((ahead > 4 * allowed).to(p.pos)), mean((ahead > allowed / 4).to(p.pos))),
        "positive_similarity": mean(p.pos / scale),
        "negative_similarity": mean(p.similar.where(p.negative, torch.zeros_like(p.similar)).sum(1) / count / scale),
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
