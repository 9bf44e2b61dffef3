"""Small encoders on scikit-learn's digits: 1,797 images of ten balanced classes, so that one negative in ten is false.

1,097 images are learned without labels (SupCon and `ids` aside), 200 choose among temperatures and measure alpha, 500
judge: classification by the nearest of ten class means, each of one or five labelled images, the mean over 100 draws.
"""

from __future__ import annotations

import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext as ce

from .questions import Run

FEATURES, JUDGE, CHOOSE, DRAWS = 64, 500, 200, 100
LEARNING_RATE, MOMENTUM, QUEUE = 3e-3, 0.98, 257


def train(run: Run) -> dict[str, float]:
    """Accuracies in percent: `score` and `five_shot` on the judging images, `choice` on the choosing ones."""
    torch.manual_seed(run.seed)
    images, labels = (x[torch.randperm(1797, generator=torch.Generator().manual_seed(run.seed))] for x in data())
    seen = torch.arange(JUDGE + CHOOSE, len(images))
    choose = torch.arange(JUDGE, JUDGE + CHOOSE)
    known = torch.where(torch.rand(len(labels)) < run.keywords.get("known", 0), labels, 10 + torch.arange(len(labels)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    encoder.append(nn.Linear(256, FEATURES))
    average = copy.deepcopy(encoder).requires_grad_(False)
    queue, alpha = ce.NegativeQueue(QUEUE, FEATURES), 0.9
    optimizer = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
    for step in range(run.steps):
        which = seen[torch.randperm(len(seen))[: run.batch]]
        x = images[which]
        if run.loss == "bayesian":
            alpha = _alpha(run, step, alpha, encoder, images[choose], labels[choose])
        if run.loss == "moco":
            loss = _moco(run, step, encoder, average, queue, x)
        else:
            ids = labels[which] if run.loss == "supcon" else known[which]
            loss = _loss(run, encoder(augment(x)), encoder(augment(x)), x, ids, alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.loss == "moco":
            ce.momentum_update(encoder, average, MOMENTUM)
    with torch.no_grad():
        z = F.normalize(encoder(images), dim=1)
    return {
        "score": few_shot(z[:JUDGE], labels[:JUDGE], 1),
        "five_shot": few_shot(z[:JUDGE], labels[:JUDGE], 5),
        "choice": few_shot(z[choose], labels[choose], 1),
    }


def _loss(run: Run, z1: Tensor, z2: Tensor, x: Tensor, ids: Tensor, alpha: float) -> Tensor:
    t, keywords = run.temperature, run.keywords
    if run.loss == "infonce":
        return ce.fused_infonce_loss(z1, z2, t)
    if run.loss == "decoupled":
        return ce.fused_decoupled_loss(z1, z2, t)
    if run.loss == "debiased":
        return ce.fused_debiased_loss(z1, z2, t, **keywords)
    if run.loss == "hard_negative":
        return ce.fused_hard_negative_loss(z1, z2, t, **keywords)
    if run.loss == "bayesian":
        return ce.fused_bayesian_loss(z1, z2, t, keywords["tau_plus"], alpha=alpha)
    if run.loss == "fnc":
        return ce.fused_false_negative_loss(torch.stack([z1, z2]), t, **keywords)
    if run.loss == "supcon":
        return ce.fused_supcon_loss(torch.stack([z1, z2]), ids, t)
    if run.loss == "ids":
        return ce.fused_infonce_loss(z1, z2, t, ids=ids)
    if run.loss == "guide":
        flat = x.flatten(1)
        return ce.fused_infonce_loss(z1, z2, t, guide=ce.Guide(flat, flat, **keywords))
    raise ValueError(f"no loss of digits: {run.loss}")


def _alpha(run: Run, step: int, last: float, encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    alpha = run.keywords.get("alpha", 0.9)
    if alpha == "schedule":
        return ce.linear_alpha(step, 0.9, steps=max(1, run.steps // 2))
    if alpha == "estimated":
        with torch.no_grad():
            return last if step % 10 else ce.estimate_alpha(encoder(images), labels)
    return alpha


def _moco(run: Run, step: int, encoder: nn.Module, average: nn.Module, queue: ce.NegativeQueue, x: Tensor) -> Tensor:
    view, other, mu = augment(x), augment(x), run.keywords["mu"]
    with torch.no_grad():
        k = F.normalize(average(other), dim=1)
    if mu is None:
        loss = ce.fused_self_labeling_loss(encoder(view), k, queue, temperature=run.temperature)
    else:
        mixed, perm, theta = ce.momentum_mixup(view, other)
        weight = ce.mu_schedule(step, run.steps) if mu == "schedule" else mu
        q, q_mix = encoder(view), encoder(mixed)
        loss = ce.fused_self_labeling_loss(q, k, queue, q_mix, perm, theta, run.temperature, mu=weight)
    queue.enqueue(k)
    return loss


def augment(x: Tensor) -> Tensor:
    """One random view of images [n, 1, 8, 8]: rotated by up to 15 degrees, shifted by up to a pixel, with noise."""
    angle = (2 * torch.rand(len(x)) - 1) * math.radians(15)
    shift = (2 * torch.rand(2, len(x)) - 1) / 4
    rows = torch.stack([angle.cos(), -angle.sin(), shift[0]], 1), torch.stack([angle.sin(), angle.cos(), shift[1]], 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) + 0.1 * torch.randn_like(x)


def few_shot(z: Tensor, labels: Tensor, shots: int) -> float:
    """Percent right by the most similar mean of `shots` unit rows of each class, which are no test themselves."""
    random, rights = torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=random)
        few = torch.stack([order[labels[order] == c][:shots] for c in range(10)])
        right = (z @ F.normalize(z[few].mean(1), dim=1).T).argmax(1) == labels
        right[few.flatten()] = False
        rights.append(right.sum().item() / (len(labels) - few.numel()))
    return 100 * sum(rights) / DRAWS


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(classes)
