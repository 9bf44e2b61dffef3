"""Losses whose arguments are not a pair (z1, z2): how to make their inputs, call them and compute them densely.

Both compare n rows with constant keys. Their dense form is written once, for a block of rows: `eager` takes all rows at
once, `chunked` block by block with checkpoints, and in float64 that is the truth of the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Case, Inputs

LABEL_TEMPERATURE, MU, LAM = 0.8, 1.0, 0.5  # defaults of the public function, which the timed calls leave untouched
TEACHER_TEMPERATURE = 0.05


@dataclass(frozen=True)
class OwnLoss:
    """A loss with a signature of its own, in the one layout that has its name.

    exponents   one entry per matrix of exponentials, as in baselines.DenseLoss
    draw        (case, draw) -> (z1, z2 or None, queue or None, constants) of cases.Inputs; draw(rows) is random
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
