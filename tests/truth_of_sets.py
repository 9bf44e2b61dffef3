"""The truth of the losses that take no pairs (z1, z2): views (FNC), labels (SupCon), keys (SANE, soft targets)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truth import Arithmetic, Outcome, log1p_exp, log_sum


def false_negative(
    how: Arithmetic, views: Tensor, scale: Tensor, *, support: Tensor | None = None, mode: str = "attract",
    top_k: int | None = 10, threshold: float | None = 0.7, aggregate: str = "max", keys: Tensor | None = None,
    queue: Tensor | None = None, queue_filled: Tensor | None = None, queue_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """FNC: F are the columns of other images among the top k scores and above the threshold, shared by an image."""
    how.scale = scale.item()
    number_of_views, images, _ = views.shape
    anchors = how.rows("views", views)
    shown = anchors if keys is None else how.constant(keys, how.normalize)
    scorers = shown.detach() if support is None else how.constant(support, how.normalize)
    columns, image_of = shown.flatten(0, 1), torch.arange(images).repeat(number_of_views)
    label_of = None if labels is None else labels.repeat(number_of_views)
    known = torch.ones(len(columns), dtype=torch.bool)
    if queue is not None:
        exists = torch.ones(len(queue), dtype=torch.bool) if queue_filled is None else queue_filled
        held = how.constant(queue)[exists]
        columns, image_of = torch.cat([columns, held]), torch.cat([image_of, torch.full((len(held),), -1)])
        if label_of is not None:
            has = queue_labels is not None
            label_of = torch.cat([label_of, queue_labels[exists] if has else torch.zeros(len(held), dtype=torch.int64)])
            known = torch.cat([known, torch.full((len(held),), has)])

    # who is detected, [images, columns]
    other = image_of != torch.arange(images)[:, None]
    scored = torch.einsum("sbd,md->sbm", scorers.double(), columns.detach().double())
    score = scored.mean(0) if aggregate == "mean" else scored.amax(0)
    size = 1.0 + score.abs().max().item()
    found = other
    if top_k is not None:
        order = score.masked_fill(~other, -torch.inf).sort(dim=1, descending=True, stable=True)
        found = found & (order.indices.argsort(1) < top_k)
        if top_k < score.shape[1]:
            last, next_one = order.values[:, top_k - 1], order.values[:, top_k]
            # zeros of rows of zeros are equal in any arithmetic, those of terms that cancel are not
            terms = torch.einsum("sbd,md->sbm", scorers.double().abs(), columns.detach().double().abs()).amax(0)
            of_zeros = terms.gather(1, order.indices) == 0
            asked = next_one.isfinite() & ~(of_zeros[:, top_k - 1] & of_zeros[:, top_k])
            if threshold is not None:
                asked = asked & (last > threshold - 1e-3)
            how.decided((last - next_one).masked_fill(~asked, 1.0), asked, size, allowance=8)
    if threshold is not None:
        found = found & (score > threshold)
        how.decided(score - threshold, other, size, allowance=8)

    logits = scale * (anchors.flatten(0, 1) @ columns.T)
    how.saw(logits)
    image = torch.arange(images).repeat(number_of_views)
    own = torch.arange(len(columns)) == torch.arange(len(image))[:, None]
    positive = (image[:, None] == image_of) & ~own
    detected = found[image]
    kept = ~own & ~(detected if mode == "eliminate" else torch.zeros_like(detected))
    pulled = positive | detected if mode == "attract" else positive
    pull = logits.where(pulled, torch.zeros_like(logits)).sum(1) / pulled.sum(1)
    log_positives = log_sum(logits, positive)
    negatives = kept & ~positive
    # log of both sums, minus the pull, as a small term and a difference of positives
    small = torch.where(negatives.any(1), log1p_exp(log_sum(logits, negatives) - log_positives), 0.0 * pull)
    losses = small + (log_positives - pull)
    stats = {
        "cancelled_fraction": _ratio(found.sum(), other.sum()),
        "detected": found.sum(1).double().mean().item(),
        "empty_rows": float((~negatives.any(1)).sum()),
        "positive_similarity": (logits.detach()[positive].mean() / scale.detach()).item(),
    }
    if labels is not None:
        right = (labels[:, None] == label_of) & known
        stats["precision"] = _ratio((found & right).sum(), (found & known).sum())
        stats["recall"] = _ratio((found & right).sum(), (other & right).sum())
    differences = number_of_views > 2 or (mode == "attract" and bool(found.any()))
    return Outcome(losses.unflatten(0, (number_of_views, images)), stats, differences=differences)


def _ratio(a: Tensor, b: Tensor) -> float:
    return a.item() / b.item() if b.item() else math.nan


def supcon(
    how: Arithmetic, features: Tensor, scale: Tensor, labels: Tensor, positives: str = "out",
    queue: Tensor | None = None, queue_labels: Tensor | None = None, queue_filled: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """P_i: the other rows of the label of i, of the batch and of the queue."""
    how.scale = scale.item()
    z = how.rows("features", features).flatten(0, -2)
    labels = labels.repeat(len(z) // len(labels))
    columns, label_of = z, labels
    if queue is not None:
        exists = torch.ones(len(queue), dtype=torch.bool) if queue_filled is None else queue_filled
        columns = torch.cat([z, how.constant(queue)[exists]])
        label_of = torch.cat([labels, queue_labels[exists]])
    own = torch.eye(len(z), len(columns), dtype=torch.bool)
    same = (labels[:, None] == label_of) & ~own
    different = labels[:, None] != label_of
    logits = scale * (z @ columns.T)
    how.saw(logits)
    some, number = same.any(1), same.sum(1)
    log_positives = log_sum(logits, same)
    small = torch.where(different.any(1), log1p_exp(log_sum(logits, different) - log_positives), 0.0 * log_positives)
    mean = logits.where(same, torch.zeros_like(logits)).sum(1) / number.clamp(min=1)
    if positives == "out":
        losses = small + (log_positives - mean)
    else:
        losses = small + number.clamp(min=1).to(z.dtype).log()
    losses = torch.where(some, losses, 0.0 * z.sum(1))
    stats = {
        "positives": number.double().mean().item(),
        "skipped_rows": float((~some).sum()),
        "positive_similarity": (mean.detach().where(some, 0 * mean).sum() / max(1, some.sum()) / scale.detach()).item(),
    }
    return Outcome(losses.unflatten(0, features.shape[:-1]), stats, in_mean=some, differences=positives == "out")


def labelled_infonce(
    how: Arithmetic, features: Tensor, scale: Tensor, labels: Tensor, queue: Tensor | None = None,
    queue_labels: Tensor | None = None, queue_filled: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """-log of every positive alone among itself and the negatives; a mean over pairs."""
    how.scale = scale.item()
    z = how.rows("features", features).flatten(0, -2)
    labels = labels.repeat(len(z) // len(labels))
    columns, label_of = z, labels
    if queue is not None:
        exists = torch.ones(len(queue), dtype=torch.bool) if queue_filled is None else queue_filled
        columns = torch.cat([z, how.constant(queue)[exists]])
        label_of = torch.cat([labels, queue_labels[exists]])
    same = (labels[:, None] == label_of) & ~torch.eye(len(z), len(columns), dtype=torch.bool)
    different = labels[:, None] != label_of
    logits = scale * (z @ columns.T)
    how.saw(logits)
    losses = []
    for i in range(len(z)):
        positives, negatives = logits[i, same[i]], logits[i, different[i]]
        if len(positives) and len(negatives):
            losses.append(log1p_exp(negatives.logsumexp(0) - positives).sum())
        else:
            losses.append(0.0 * z[i].sum())
    stats = {"positives": same.sum(1).double().mean().item(), "skipped_rows": float((~same.any(1)).sum())}
    losses = torch.stack(losses).unflatten(0, features.shape[:-1])
    return Outcome(losses, stats, in_mean=same.sum(1))


def sigmoid(how: Arithmetic, z1: Tensor, z2: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None = None) -> Outcome:
    """-log sigmoid(y (s + b)) of all pairs, y = 1 of positives and -1 of others."""
    how.scale = scale.item()
    u1, u2 = how.rows("z1", z1), how.rows("z2", z2)
    positive = torch.eye(len(u1), len(u2), dtype=torch.bool)
    if ids is not None:
        positive = positive | (ids[: len(u1), None] == ids)
    similarity = u1 @ u2.T
    logits = scale * similarity + bias
    how.saw(logits)
    losses = log1p_exp(torch.where(positive, -logits, logits)).sum(1)
    pair, negative = torch.eye(len(u1), len(u2), dtype=torch.bool), ~positive
    share = logits.detach().double().sigmoid()
    stats = {
        "positive_similarity": similarity[pair].mean().item(), "positive_probability": share[pair].mean().item(),
        "negative_probability": (share[negative].sum() / max(1, negative.sum())).item(),
        "positives": positive.sum(1).double().mean().item(),
    }  # fmt: skip
    return Outcome(losses, stats)


def _entropy(y: Tensor) -> Tensor:
    return -torch.special.xlogy(y, y).sum(1)


def self_labeling(
    how: Arithmetic, q: Tensor, scale: Tensor, k: Tensor, queue: Tensor | None, queue_filled: Tensor | None = None, *,
    q_mix: Tensor | None = None, perm: Tensor | None = None, theta: Tensor | float | None = None,
    label_temperature: float = 0.8, mu: float = 1.0, lam: float = 0.5,
) -> Outcome:  # fmt: skip
    """SANE: p_i and q_i over all keys and over all but i; labels, keys and queue are constants."""
    how.scale = scale.item()
    x, own_keys = how.rows("q", q), how.constant(k, how.normalize)
    keys = own_keys
    if queue is not None:
        keys = torch.cat([keys, how.constant(queue)[slice(None) if queue_filled is None else queue_filled]])
    own = torch.eye(len(k), len(keys), dtype=torch.bool)
    logits = scale * (x @ keys.T)
    pos = scale * (x * own_keys).sum(1)
    how.saw(logits)
    how.saw(pos)
    instance = log1p_exp(log_sum(logits, ~own) - pos)
    hardest = logits.detach().masked_fill(own, -torch.inf).amax(1)
    ahead, allowed = pos.detach() - hardest, 4 * q.shape[1] ** 0.5 * torch.finfo(how.decides).eps * scale.detach()
    if not how.normalize:
        allowed = allowed * x.detach().norm(dim=1) * own_keys.norm(dim=1)
    stats = {
        "instance_loss": instance.mean().item(), "mixed_loss": 0.0, "alpha": 0.0, "beta": 0.0, "own_weight": 1.0,
        "accuracy": tuple((ahead > a).double().mean().item() for a in (4 * allowed, allowed / 4)),
        "positive_similarity": (pos.detach() / scale.detach()).mean().item(), "label_entropy": 0.0,
        "keys": float(len(keys)),
    }  # fmt: skip
    if q_mix is None:
        return Outcome(instance, stats)
    how.means = True
    with torch.no_grad():
        similarity = (scale / label_temperature) * (own_keys @ keys.T)
        how.saw(similarity)
        p = similarity.softmax(1)
        without = similarity.masked_fill(own, -torch.inf).softmax(1)
        largest_p, largest_q = p.amax(1), without.amax(1)
        z = 1 + mu * largest_p + mu * largest_q
        alpha, beta = mu * largest_p / z, mu * largest_q / z
        y = (1 - alpha - beta)[:, None] * own + alpha[:, None] * p + beta[:, None] * without
        weight = torch.as_tensor(theta).to(y.dtype).expand(len(q))[:, None]
        target = weight * y + (1 - weight) * y[perm]
    mixed_logits = scale * (how.rows("q_mix", q_mix) @ keys.T)
    how.saw(mixed_logits)
    mixed = -(target * mixed_logits.log_softmax(1)).sum(1)
    stats |= {
        "mixed_loss": mixed.mean().item(), "alpha": alpha.mean().item(), "beta": beta.mean().item(),
        "own_weight": y[own].mean().item(), "label_entropy": _entropy(y).mean().item(),
    }  # fmt: skip
    return Outcome((1 - lam) * instance + lam * mixed, stats, differences=True)


def soft_target(
    how: Arithmetic, queries: Tensor, scale: Tensor, keys: Tensor, keys_filled: Tensor | None, teacher: Tensor, *,
    teacher_temperature: float, keys_given: bool, queue: Tensor | None = None, queue_filled: Tensor | None = None,
) -> Outcome:  # fmt: skip
    """Cross-entropy of the student's distribution over the keys against the teacher's, which is constant."""
    how.scale, how.means = scale.item(), True
    x, t = how.rows("queries", queries), how.constant(teacher, how.normalize)
    sets = [how.constant(keys, how.normalize and not keys_given)[slice(None) if keys_filled is None else keys_filled]]
    if queue is not None:
        sets.append(how.constant(queue)[slice(None) if queue_filled is None else queue_filled])
    everything = torch.cat(sets)
    similarity, logits = t @ everything.T / teacher_temperature, scale * (x @ everything.T)
    how.saw(similarity), how.saw(logits)
    y = similarity.softmax(1)
    losses = -(y * logits.log_softmax(1)).sum(1)
    student = logits.detach().softmax(1)
    stats = {
        "divergence": (losses.detach() - _entropy(y)).mean().item(),
        "teacher_entropy": _entropy(y).mean().item(),
        "student_entropy": _entropy(student).mean().item(),
        "teacher_confidence": y.amax(1).mean().item(),
    }
    return Outcome(losses, stats, differences=True)
