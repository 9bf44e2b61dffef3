"""Self-labelling refinery and momentum mixup (SANE): soft labels over the keys in place of one positive.

Keys are k_1..k_s (the positives of q_1..q_s) and a queue; labels come from similarities between keys,

    p_i = softmax_k(<k_i, key_k>/(t t')),   q_i = the same without key i,   z_i = 1 + mu max p_i + mu max q_i
    ybar_i = (1 - alpha_i - beta_i) e_i + alpha_i p_i + beta_i q_i,   alpha_i = mu max p_i/z_i,  beta_i = mu max q_i/z_i
    L = (1 - lam) CE(q, e) + lam CE(q_mix, y'),    y'_i = theta_i ybar_i + (1 - theta_i) ybar_perm(i)

The teacher's sweep leaves the own key out: q_i as "p_i without i, renormalised" loses every digit at t t' = .03. p_i is
q_i scaled by r_i = 1 - p_ii = sigmoid(lse_-i - x_ii) beside p_ii, so two weights make a label, its own key's and q_i's:
ybar_i = (1 - w_i) e_i + w_i q_i, w_i = alpha_i r_i + beta_i. Its mean key is k_i + w_i (Q_i - k_i), Q_i the mean under
q_i: no label is ever stored. In the student's sweep the key of the heavier image of a mixed pair stays outside the sum,
as a positive does (soft_target.py says why a target's mean is enough).

Zhao et al., NeurIPS 2021, arXiv:2106.14749.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import numerics
from ..batch import distributed
from ..batch.call import Call
from ..batch.columns import Columns, ColumnSet
from ..batch.queue import NegativeQueue
from ..checks import can_read, check_number, check_positive, describe
from ..numerics import softplus
from ..operators.unit_rows import operand
from .overloads import returns_stats
from .soft_target import check_vectors, cross_entropy, dense_keys, entropy, older_keys, sweep_keys
from .stats import Record

DEFAULT_TEMPERATURE = 0.2


@dataclass(frozen=True)
class SelfLabelingStats(Record):
    """Averages over the batch. Without q_mix there are no labels but one-hot ones.

    instance_loss        CE(q, e), InfoNCE over all keys
    mixed_loss           CE(q_mix, y'); 0 without q_mix
    accuracy             share of q whose own key is more similar than any other key, by more than rounding
    positive_similarity  similarity of q to its own key
    alpha, beta          weights of p and q in the labels
    own_weight           what a label leaves on its own key
    label_entropy        entropy of a label, nats
    keys                 number of keys, unfilled ones not counted
    """

    instance_loss: Tensor
    mixed_loss: Tensor
    accuracy: Tensor
    positive_similarity: Tensor
    alpha: Tensor
    beta: Tensor
    own_weight: Tensor
    label_entropy: Tensor
    keys: Tensor


class Mixing(NamedTuple):
    """Which images were mixed: theta_i of image i and 1 - theta_i of image perm_i, whose key is row `partner`_i."""

    perm: Tensor
    partner: Tensor
    theta: Tensor


class Labels(NamedTuple):
    """Vectors [s] of the labels ybar = (1 - spread) e + spread q."""

    spread: Tensor
    alpha: Tensor
    beta: Tensor
    entropy: Tensor


@returns_stats
@distributed.across_ranks
def fused_self_labeling_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | NegativeQueue | Columns | None,
    q_mix: Tensor | None = None,
    perm: Tensor | None = None,
    theta: Tensor | float | None = None,
    temperature: float | Tensor | None = None,
    *,
    label_temperature: float = 0.8,
    mu: float = 1.0,
    lam: float = 0.5,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
    backend: str = "auto",
    group: dist.ProcessGroup | distributed.AllRanks | None = None,
) -> Tensor | tuple[Tensor, SelfLabelingStats]:
    """Self-labelling refinery with momentum mixup (SANE), without forming any of the three s x (s + K) matrices.

    L = (1 - lam) CE(q, e) + lam CE(q_mix, theta ybar + (1 - theta) ybar[perm]) over the s + K keys [k; queue]

    q            [s, D] fp16/bf16/fp32/fp64, the encoder's vectors of one view
    k            [s, D] the momentum encoder's vectors of the other view, constant; row i is the positive of q_i
    queue        [K, D] tensor or NegativeQueue: older keys, used as given; None: only k
    q_mix        [s, D] the encoder's vectors of the mixed inputs (`momentum_mixup`); None: L = CE(q, e), InfoNCE
    perm, theta  int64 [s] and floating-point [s] (or one number) in [0, 1] of `momentum_mixup`
    temperature  t > 0, or a 0-d tensor to learn it; the labels see it as a constant; default 0.2
    label_temperature  t' > 0: labels are made at temperature t t'
    mu           >= 0, weight of the labels' soft part (`mu_schedule`); 0: one-hot labels
    lam          in [0, 1], share of the mixed term
    normalize    scale q, k and q_mix to unit length first
    reduction    "mean", "sum" or "none"
    return_stats also return a `SelfLabelingStats` record from the same sweeps
    backend      "auto", or a name from `available_backends()`; "reference" is dense and twice differentiable
    group        `AllRanks()` or a process group as in `fused_row_loss`: keys are the k of all its ranks and the queue,
                 which has to be the same on all; the loss is of a rank's own images, among which `perm` mixes
    Returns      0-d float32 (float64 for float64 inputs) or [s] ("none"); nats
    Raises       ValueError/TypeError on shapes, dtypes, ranges and for one image in all without any queue, which leaves
                 nothing to compare with; RuntimeError if `backend` cannot run, with the reason
    Memory       O((s + K) D), the queue is not copied; 12 s (s + K) D flops in the forward, the backward is O(s D)
    Paper        arXiv:2106.14749. CIFAR-10: these defaults, K = 4096, mu 0 -> 1; ImageNet: t' 1, mu .5 -> 10, K = 65536
    """
    call = Call(
        temperature=temperature, default_temperature=DEFAULT_TEMPERATURE, normalize=normalize, reduction=reduction,
        return_stats=return_stats, backend=backend,
    )  # fmt: skip
    call.check_values()
    check_values(label_temperature, mu, lam)
    distributed.check_gathers(group, "its keys are constants, which are gathered once.")
    _check(q, k, queue, q_mix, perm, theta, label_temperature, mu, distributed.size(group))
    with numerics.without_autocast(q):
        dtype = numerics.stats_dtype(q.dtype)
        scale = call.scale(q)
        label_scale = (scale.detach() if isinstance(scale, Tensor) else scale) / label_temperature
        if not isinstance(label_scale, Tensor) or can_read(label_scale):
            check_positive("1/(temperature * label_temperature)", float(label_scale), dtype)
        older = older_keys(queue, q, normalize)
        ranks = call.agree(group, q)
        k, own = operand(k.detach(), normalize, backend=backend), slice(0, k.shape[0])
        if ranks is not None:
            everyone = ranks.rows(k)
            k, own = everyone.gather(k, q.dtype), everyone.own
        images = torch.arange(k.shape[0], device=k.device)
        keys = [ColumnSet(k, ids=images, unit=normalize), *older]
        x, mixing = operand(q, normalize, backend=backend), None
        if q_mix is not None and perm is not None and theta is not None:
            weight = theta.detach().to(dtype) if isinstance(theta, Tensor) else torch.full_like(x[:, 0].detach(), theta)
            mixing = Mixing(perm, perm + own.start if own.start else perm, weight.expand(q.shape[0]))
            x = torch.cat([x, operand(q_mix, normalize, backend=backend)])
        if queue is not None:
            x = numerics.spoil(x, keys[-1].keys)
        road = _dense if call.is_dense else _streamed
        terms, stats = road(x, keys, own, mixing, scale, label_scale, mu, q.dtype, return_stats, backend)
        losses = terms[0] if mixing is None else torch.lerp(terms[0], terms[1], lam)
        loss = call.reduce(losses, ranks)
    return loss if stats is None else (loss, stats)


def _streamed(x, keys, own, mixing, scale, label_scale, mu, operand_dtype, return_stats, backend):
    """CE(q, e) [s] and, with mixing, CE(q_mix, y') [s]; x holds the rows of q and then those of q_mix.

    own  the rows of keys[0] that are the positives of q
    """
    k, images = keys[0].keys, keys[0].ids[own]
    positive, labels, pull = images, None, None
    if mixing is not None:
        heavier, lighter = _by_weight(mixing, images)
        with torch.no_grad():
            labels, shift = _labels(k[own], images, keys, label_scale, mu, operand_dtype, backend)
            # the mean key under y', seen from the heavier image's: differences only, so that a sharp label keeps digits
            minor = torch.minimum(mixing.theta, 1 - mixing.theta)[:, None]
            pull = minor * (k[lighter] - k[heavier]) + torch.lerp(shift[mixing.perm], shift, mixing.theta[:, None])
        positive = torch.cat([images, heavier])
    swept = sweep_keys(x, keys, scale, operand_dtype, backend, leave_out=positive, maximum=return_stats)
    pos = scale * (x * k[positive]).sum(1)
    losses, s = softplus(swept.lse - pos), images.shape[0]
    terms = [losses[:s]]
    if pull is not None:
        terms.append(losses[s:] - scale * (x[s:] * pull).sum(1))
    if not return_stats:
        return terms, None
    with torch.no_grad():
        rounding = numerics.rounding_of_logits(scale, x[:s], k[own])
        wins = pos[:s] > swept.largest[:s] + rounding
        return terms, _stats(terms, wins, pos[:s] / scale, labels, swept.number[0] + 1)


def _by_weight(mixing: Mixing, images: Tensor) -> tuple[Tensor, Tensor]:
    """[s] the key of the image that weighs more in each mixed pair, and the other's."""
    second = mixing.theta < 0.5
    return torch.where(second, mixing.partner, images), torch.where(second, images, mixing.partner)


def _labels(k, images, keys, label_scale, mu, operand_dtype, backend) -> tuple[Labels, Tensor]:
    """The labels of the images whose keys are k [s, D], and the mean key under each seen from its own key [s, D]."""
    swept = sweep_keys(k, keys, label_scale, operand_dtype, backend, leave_out=images, means=True, maximum=True)
    own = label_scale * (k * k).sum(1)
    p_own, p_others = torch.sigmoid(own - swept.lse), torch.sigmoid(swept.lse - own)
    max_q = swept.largest_weight()
    max_p = torch.maximum(p_own, p_others * max_q)
    alpha, beta = _weights(max_p, max_q, mu)
    spread = alpha * p_others + beta
    two_parts = torch.special.entr(spread) + torch.special.entr((1 - spread).clamp(min=0.0))
    labels = Labels(spread, alpha, beta, two_parts + spread * swept.entropy(k, label_scale))
    return labels, spread[:, None] * (swept.mean - k)


def _weights(max_p: Tensor, max_q: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """alpha and beta: the more certain p and q are, the more they count."""
    z = 1 + mu * max_p + mu * max_q
    return mu * max_p / z, mu * max_q / z


def _dense(x, keys, own_rows, mixing, scale, label_scale, mu, operand_dtype, return_stats, backend):
    """The paper's formulas on whole matrices; twice differentiable."""
    k, everything = keys[0].keys[own_rows], dense_keys(keys)
    s, num_keys = k.shape[0], everything.shape[0]
    own = torch.arange(num_keys, device=k.device) == keys[0].ids[own_rows, None]
    logits = scale * numerics.product(x, everything.T)
    own_logit = logits[:s].diagonal(own_rows.start)
    terms, labels = [_instance_loss(logits[:s], own_logit, own)], None
    if mixing is not None:
        similarities = label_scale * (k @ everything.T)
        p = similarities.softmax(1)
        q = similarities.masked_fill(own, -torch.inf).softmax(1) if num_keys > 1 else torch.zeros_like(p)
        alpha, beta = _weights(p.amax(1), q.amax(1), mu)
        y = (1 - alpha - beta)[:, None] * own + alpha[:, None] * p + beta[:, None] * q
        theta = mixing.theta[:, None]
        terms.append(cross_entropy(logits[s:], theta * y + (1 - theta) * y[mixing.perm]))
        labels = Labels(1 - y.diagonal(own_rows.start), alpha, beta, entropy(y))
    if not return_stats:
        return terms, None
    with torch.no_grad():
        rounding = numerics.rounding_of_logits(scale, x[:s], k)
        wins = own_logit > logits[:s].masked_fill(own, -torch.inf).amax(1) + rounding
        return terms, _stats(terms, wins, own_logit / scale, labels, k.new_full((), float(num_keys)))


def _instance_loss(logits: Tensor, own_logit: Tensor, own: Tensor) -> Tensor:
    """CE(q, e) [s] as log(1 + others/own): a converged row keeps its gradient."""
    if logits.shape[1] == 1:
        return 0.0 * own_logit
    return softplus(logits.masked_fill(own, -torch.inf).logsumexp(1) - own_logit)


def _stats(terms, wins, similarity, labels: Labels | None, num_keys) -> SelfLabelingStats:
    nothing = torch.zeros_like(similarity)
    alpha, beta, spread, label_entropy = (
        (nothing,) * 4 if labels is None else (labels.alpha, labels.beta, labels.spread, labels.entropy)
    )
    return SelfLabelingStats(
        instance_loss=terms[0].mean().detach(),
        mixed_loss=(terms[1] if len(terms) > 1 else nothing).mean().detach(),
        accuracy=wins.to(similarity.dtype).mean(),
        positive_similarity=similarity.mean(),
        alpha=alpha.mean(),
        beta=beta.mean(),
        own_weight=1 - spread.mean(),
        label_entropy=label_entropy.mean(),
        keys=num_keys,
    )


def check_values(label_temperature: float, mu: float, lam: float) -> None:
    """TypeError or ValueError for what no batch could make right."""
    check_positive("label_temperature", label_temperature, torch.float64)  # and, with a batch, in its dtype
    check_number("mu", mu)
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu must be >= 0 and finite; got {mu}.")
    check_number("lam", lam)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam, the share of the mixed term, must be in [0, 1]; got {lam}.")


def _check(q, k, queue, q_mix, perm, theta, label_temperature, mu, ranks) -> None:
    check_vectors({"q": q, "k": k} | ({} if q_mix is None else {"q_mix": q_mix}))
    for name, z in (("k", k), ("q_mix", q_mix)):
        if z is not None and z.shape != q.shape:
            raise ValueError(f"{name} must be [s, D] like q; got {list(z.shape)} and {list(q.shape)}.")
    if q.shape[0] * ranks == 1 and _is_empty(queue):
        raise ValueError("one image and no filled queue leave no key to compare with; enqueue keys or use s >= 2.")
    dtype = numerics.stats_dtype(q.dtype)
    check_positive("label_temperature", label_temperature, dtype)
    if 4 * mu > torch.finfo(dtype).max:
        raise ValueError(f"mu must be >= 0, and four times mu finite in {dtype}; got {mu}.")
    given = [x is not None for x in (q_mix, perm, theta)]
    if any(given) and not all(given):
        raise ValueError("q_mix, perm and theta belong together (momentum_mixup makes them); give all or none.")
    if q_mix is not None:
        _check_mixing(q.shape[0], q.device, perm, theta)


def _check_mixing(size: int, device: torch.device, perm, theta) -> None:
    if not isinstance(perm, Tensor) or perm.dtype != torch.int64 or perm.shape != (size,) or perm.device != device:
        raise ValueError(f"perm must be int64 [{size}] on {device}; got {describe(perm)}.")
    if isinstance(theta, Tensor):
        if not theta.is_floating_point() or theta.shape not in ((size,), ()) or theta.device != device:
            raise ValueError(f"theta must be floating-point [{size}] on {device}; got {describe(theta)}.")
    elif not 0 <= theta <= 1:
        raise ValueError(f"theta must be in [0, 1]; got {theta}.")
    if not can_read(perm):
        return
    if not ((perm >= 0) & (perm < size)).all():
        raise ValueError(f"perm must hold indices below {size}; got {perm.min().item()} to {perm.max().item()}.")
    if isinstance(theta, Tensor) and not ((theta >= 0) & (theta <= 1)).all():
        raise ValueError(f"theta must be in [0, 1]; got {theta.min().item()} to {theta.max().item()}.")


def _is_empty(queue) -> bool:
    held = queue.features if isinstance(queue, Columns) else queue
    if isinstance(held, NegativeQueue) and can_read(held.count):
        return int(held.count) == 0
    return held is None or (isinstance(held, Tensor) and held.numel() == 0)
