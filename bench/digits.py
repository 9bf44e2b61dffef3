"""The main job on real input: a small encoder learns scikit-learn's handwritten digits with each loss.

At every step the fused loss and the gradient of the parameters are held against the dense reference on the same
parameters. One trajectory: the fused gradient drives the optimiser, the reference is evaluated beside it in float32 and
in float64. The tolerance is derived: 2 x the error of the float32 reference against float64, plus a few ulps. 1797
images of 8 x 8, ten balanced classes, so that tau_plus = .1 is the true rate of false negatives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext

from .device import Device
from .losses import LOSSES

BATCH = 256  # images, N = 512 anchors
FEATURES = 64
TEMPERATURE = 0.5
LEARNING_RATE = 3e-3
ULPS = 8
PROBE_DRAWS = 50


@dataclass
class Agreement:
    """Largest differences over a run, of loss and gradient, and the largest share of the tolerance they used."""

    loss: float = 0.0
    gradient: float = 0.0
    of_tolerance: float = 0.0

    def add(self, kind: str, got: Tensor, reference: Tensor, truth: Tensor, magnitude: float) -> None:
        """Compare float32 `got` with the float32 reference, both against float64."""
        error, dense = (float((x.double() - truth).abs().max()) for x in (got, reference))
        tolerance = 2 * dense + ULPS * torch.finfo(torch.float32).eps * magnitude
        difference = float((got - reference).abs().max()) / float(truth.abs().max())
        setattr(self, kind, max(getattr(self, kind), difference))
        used = error / tolerance
        self.of_tolerance = max(self.of_tolerance, used if math.isfinite(used) else math.inf)


def train(loss_name: str, steps: int, device: Device, step_done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train with one loss and every backend beside it; a JSON-ready record whose `agrees` is the verdict."""
    images, labels = load(device)
    torch.manual_seed(0)
    encoder = new_encoder().to(device.torch)
    before = probe(encoder, images, labels)
    optimizer = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
    function = LOSSES[loss_name].function
    reasons = contrastive_ext.explain(torch.empty(1, FEATURES, device=device.torch)).reasons
    names = [name for name in contrastive_ext.available_backends() if name != "reference" and reasons[name] is None]
    agreement = {name: Agreement() for name in names}
    history, stats = [], {}
    for _ in range(steps):
        chosen = images[torch.randperm(len(images), device=device.torch)[:BATCH]]
        views = augment(chosen), augment(chosen)
        reference, reference_gradient = _loss_and_gradient(encoder, views, function, backend="reference")
        exact, exact_gradient = _loss_and_gradient(
            copy.deepcopy(encoder).double(), [v.double() for v in views], function, backend="reference"
        )
        for name in reversed(names):  # the first of the list, which "auto" prefers, comes last and drives the optimiser
            loss, gradient = _loss_and_gradient(encoder, views, function, backend=name)
            magnitude = max(float(exact.abs()), 1 / TEMPERATURE)
            agreement[name].add("loss", loss, reference, exact, magnitude)
            agreement[name].add(
                "gradient", gradient, reference_gradient, exact_gradient, float(exact_gradient.abs().max())
            )
        _set_gradient(encoder, gradient)
        optimizer.step()
        history.append(float(loss))
        step_done()
    with torch.no_grad():
        z1, z2 = (encoder(v) for v in views)
        stats = function(z1, z2, TEMPERATURE, return_stats=True)[1].to_dict()
    return {
        "loss": loss_name,
        "steps": steps,
        "batch": BATCH,
        "driven_by": names[0],
        "first_loss": history[0],
        "last_loss": history[-1],
        "max_loss_difference": {name: a.loss for name, a in agreement.items()},
        "max_gradient_difference": {name: a.gradient for name, a in agreement.items()},
        "of_tolerance": {name: a.of_tolerance for name, a in agreement.items()},
        "agrees": all(a.of_tolerance <= 1 for a in agreement.values()),
        "probe_before": before,
        "probe_after": probe(encoder, images, labels),
        "stats": stats,
    }


def augment(images: Tensor) -> Tensor:
    """One random view of [n, 1, 8, 8] images: rotation to 15 degrees, shift to one pixel, scale to 10 %, noise."""
    n, device = len(images), images.device
    angle = (2 * torch.rand(n, device=device) - 1) * math.radians(15)
    scale = 1 + 0.1 * (2 * torch.rand(n, device=device) - 1)
    shift = (2 * torch.rand(2, n, device=device) - 1) / 4  # the grid spans 2 for 8 pixels
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.1 * torch.randn_like(images)


@torch.no_grad()
def probe(encoder: nn.Module, images: Tensor, labels: Tensor, shots: int = 1) -> list[float]:
    """[mean, standard deviation] over random draws of the accuracy of few-shot nearest-centroid classification."""
    features = F.normalize(encoder(images), dim=1)
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for _ in range(PROBE_DRAWS):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        examples = torch.stack([order[labels[order] == c][:shots] for c in range(10)])  # [10, shots]
        wrong_to_count = torch.ones_like(labels, dtype=torch.bool)
        wrong_to_count[examples.flatten()] = False  # the examples themselves are no test
        centroids = F.normalize(features[examples].mean(1), dim=1)
        guess = (features @ centroids.T).argmax(1)
        accuracies.append((guess == labels)[wrong_to_count].double().mean())
    values = torch.stack(accuracies)
    return [float(values.mean()), float(values.std())]


def new_encoder() -> nn.Module:
    """A fresh encoder of [n, 1, 8, 8] images to [n, FEATURES]."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, FEATURES)
    )


def load(device: Device) -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device.torch)[:, None] / 16
    return images, torch.tensor(digits.target, device=device.torch)


def _loss_and_gradient(encoder: nn.Module, views, function, backend: str) -> tuple[Tensor, Tensor]:
    loss = function(encoder(views[0]), encoder(views[1]), TEMPERATURE, backend=backend)
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def _set_gradient(encoder: nn.Module, gradient: Tensor) -> None:
    sizes = [p.numel() for p in encoder.parameters()]
    for parameter, part in zip(encoder.parameters(), gradient.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
