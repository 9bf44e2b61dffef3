"""Losses whose arguments are not a pair (z1, z2): how to make their inputs, call them and compute them densely.

The dense form of each is written once, for a block of rows: `eager` takes all rows at
once, `chunked` block by block with checkpoints, and in float64 that is the truth of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, Inputs

LABEL_TEMPERATURE, MU, LAM = 0.8, 1.0, 0.5  # defaults of the public function, which the timed calls leave untouched
TEACHER_TEMPERATURE = 0.05
TOP_K, THRESHOLD = 10, 0.7
SIGMOID_BIAS = -10.0


@dataclass(frozen=True)
class OwnLoss:
    """A loss with a signature of its own, in the one layout that has its name.

    exponents   one entry per matrix of exponentials, as in formulas.DenseLoss
    draw        (case, draw) -> (z1, z2 or None, queue or None, constants) of case.Inputs; draw(rows) is random
    call        (function, case, inputs, options) -> the public function's result
    prepare     (case, inputs of unit vectors) -> tensors every block needs
    rows        (case, tensors, rows) -> dense losses of these rows
    batch_keys  whether the n rows' own keys come before the m keys of the queue
    """

    layout: str
    exponents: tuple[float, ...]
    draw: Callable[[Case, Callable[[int], Tensor]], tuple]
    call: Callable[[Callable, Case, Inputs, dict], Tensor]
    prepare: Callable[[Case, Inputs], dict[str, Tensor]]
    rows: Callable[[Case, dict[str, Tensor], slice], Tensor]
    batch_keys: bool = False


def _draw_self_labeling(case, draw):
    q = draw(case.n)
    k = q + 0.5 * draw(case.n)
    perm = torch.arange(case.n, device=q.device).roll(1)
    theta = torch.sigmoid(draw(case.n)[:, 0])
    queue = F.normalize(draw(case.m), dim=1)
    return q, torch.lerp(q[perm], q, theta[:, None]), queue, {"k": k, "perm": perm, "theta": theta}


def _call_self_labeling(function, case, inputs, options):
    more = inputs.constants
    return function(
        inputs.z1, more["k"], inputs.queue, inputs.z2, more["perm"], more["theta"], case.temperature, **options
    )


def _prepare_self_labeling(case, units):
    keys = torch.cat([units.constants["k"], units.queue])
    return {"q": units.z1, "q_mix": units.z2, "keys": keys, **units.constants}


def _self_labeling_rows(case, x, rows):
    images = torch.arange(case.n, device=x["k"].device)
    theta, other = x["theta"][rows, None].to(x["k"].dtype), x["perm"][rows]
    with torch.no_grad():
        target = theta * _labels(case, x, images[rows]) + (1 - theta) * _labels(case, x, other)
    instance = F.cross_entropy(x["q"][rows] @ x["keys"].T / case.temperature, images[rows], reduction="none")
    mixed = F.cross_entropy(x["q_mix"][rows] @ x["keys"].T / case.temperature, target, reduction="none")
    return (1 - LAM) * instance + LAM * mixed


def _labels(case, x, images):
    similarity = x["k"][images] @ x["keys"].T / (case.temperature * LABEL_TEMPERATURE)
    p = similarity.softmax(1)
    at = torch.arange(len(images), device=images.device)
    similarity[at, images] = -torch.inf
    q = similarity.softmax(1)
    max_p, max_q = p.amax(1, keepdim=True), q.amax(1, keepdim=True)
    z = 1 + MU * max_p + MU * max_q
    labels = (MU * max_p / z) * p + (MU * max_q / z) * q
    labels[at, images] += (1 / z)[:, 0]
    return labels


def _draw_soft_target(case, draw):
    queries = draw(case.n)
    return queries, None, None, {"teacher": queries + 0.5 * draw(case.n), "keys": draw(case.m)}


def _call_soft_target(function, case, inputs, options):
    options = options | {"teacher_temperature": TEACHER_TEMPERATURE}
    constants = inputs.constants
    return function(inputs.z1, constants["keys"], constants["teacher"], case.temperature, **options)


def _prepare_soft_target(case, units):
    return {"x": units.z1, **units.constants}


def _soft_target_rows(case, x, rows):
    with torch.no_grad():
        target = (x["teacher"][rows] @ x["keys"].T / TEACHER_TEMPERATURE).softmax(1)
    return F.cross_entropy(x["x"][rows] @ x["keys"].T / case.temperature, target, reduction="none")


SELF_LABELING = OwnLoss(
    "self_labels", (1.0, 1.0, 1.0), _draw_self_labeling, _call_self_labeling, _prepare_self_labeling,
    _self_labeling_rows, batch_keys=True,
)  # fmt: skip
SOFT_TARGET = OwnLoss(
    "soft_targets", (1.0, 1.0), _draw_soft_target, _call_soft_target, _prepare_soft_target, _soft_target_rows
)


def _draw_views(case, draw):
    """Two views of images in groups of four that look alike: false negatives at a cosine of .9, the rest near 0."""
    images = case.n // 2
    groups = draw((images + 3) // 4).repeat_interleave(4, 0)[:images]
    return groups + 0.3 * draw(images), groups + 0.3 * draw(images), None, {}


def _call_false_negative(function, case, inputs, options):
    views = torch.stack([inputs.z1, inputs.z2])
    loss = function(views, case.temperature, mode="eliminate", **options)
    return loss.flatten() if options["reduction"] == "none" else loss


def _prepare_false_negative(case, units):
    return {"u": torch.cat([units.z1, units.z2])}


def _false_negative_rows(case, x, rows):
    u, images = x["u"], case.n // 2
    anchor = torch.arange(case.n, device=u.device)[rows]
    partner = (anchor + images) % case.n
    at = torch.arange(len(anchor), device=u.device)
    similarity = u[anchor] @ u.T
    with torch.no_grad():
        score = torch.maximum(similarity, u[partner] @ u.T)
        score[at, anchor] = score[at, partner] = -torch.inf
        best = score.topk(min(TOP_K, case.n), 1)
        false = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best.indices, best.values > THRESHOLD)
    logits = similarity / case.temperature
    pos = logits[at, partner]
    logits = logits.masked_fill(false, -torch.inf)
    logits[at, anchor] = -torch.inf
    return logits.logsumexp(1) - pos


def _draw_labelled(case, draw):
    features = draw(case.n)
    return features, None, None, {"labels": torch.arange(case.n, device=features.device) % (case.n // 8 + 1)}


def _call_supcon(function, case, inputs, options):
    return function(inputs.z1, inputs.constants["labels"], case.temperature, **options)


def _prepare_supcon(case, units):
    return {"u": units.z1, **units.constants}


def _supcon_rows(case, x, rows):
    u, labels = x["u"], x["labels"]
    anchor = torch.arange(case.n, device=u.device)[rows]
    own = anchor[:, None] == torch.arange(case.n, device=u.device)
    positive = (labels[anchor, None] == labels) & ~own
    logits = u[anchor] @ u.T / case.temperature
    mean = (logits * positive).sum(1) / positive.sum(1)
    return logits.masked_fill(own, -torch.inf).logsumexp(1) - mean


FALSE_NEGATIVE = OwnLoss(
    "views", (1.0,), _draw_views, _call_false_negative, _prepare_false_negative, _false_negative_rows
)
SUPCON = OwnLoss("labelled", (1.0,), _draw_labelled, _call_supcon, _prepare_supcon, _supcon_rows)


def _call_labelled_infonce(function, case, inputs, options):
    loss = function(inputs.z1, inputs.constants["labels"], case.temperature, **options)
    return loss / _positives(inputs.constants["labels"])[0] if options["reduction"] == "none" else loss


def _positives(labels: Tensor) -> Tensor:
    """[N] how many other rows have the label of each."""
    return (labels[:, None] == labels).sum(1) - 1


def _labelled_infonce_rows(case, x, rows):
    """Of every row the mean over its positives: all labels have as many rows, so that their mean is that over pairs."""
    u, labels = x["u"], x["labels"]
    anchor = torch.arange(case.n, device=u.device)[rows]
    same = labels[anchor, None] == labels
    positive = same & (anchor[:, None] != torch.arange(case.n, device=u.device))
    logits = u[anchor] @ u.T / case.temperature
    lse = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    gap = lse - logits
    return (torch.logaddexp(gap, torch.zeros_like(gap)) * positive).sum(1) / positive.sum(1)


def _draw_classes(case, draw):
    """Classes of two rows (of three where the number is odd)."""
    features = draw(case.n)
    rows = 2 if case.n % 2 == 0 else 3 if case.n % 3 == 0 else case.n
    return features, None, None, {"labels": torch.arange(case.n, device=features.device) % (case.n // rows)}


def _draw_pairs(case, draw):
    z1 = draw(case.n)
    return z1, z1 + 0.5 * draw(case.n), None, {}


def _call_sigmoid(function, case, inputs, options):
    return function(inputs.z1, inputs.z2, 1 / case.temperature, SIGMOID_BIAS, **options)


def _prepare_pairs(case, units):
    return {"u1": units.z1, "u2": units.z2}


def _sigmoid_rows(case, x, rows):
    logits = x["u1"][rows] @ x["u2"].T / case.temperature + SIGMOID_BIAS
    at = torch.arange(case.n, device=logits.device)
    return F.softplus(torch.where(at[rows, None] == at, -logits, logits), threshold=50).sum(1)


LABELLED_INFONCE = OwnLoss(
    "classes", (1.0, 1.0), _draw_classes, _call_labelled_infonce, _prepare_supcon, _labelled_infonce_rows
)
SIGMOID = OwnLoss("binary", (1.0,), _draw_pairs, _call_sigmoid, _prepare_pairs, _sigmoid_rows)
