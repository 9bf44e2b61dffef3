"""How many negatives are enough, measured: losses, bounds and accuracy against the batch size.

    python -m bench negatives                       encoders trained on scikit-learn's digits with every loss of pairs
    python -m bench negatives --features FILE.npz   features of your own: `views` [V, n, D], V >= 2 augmentations of the
                                                    same n images, and integer `labels` [n]

For every batch size B the classes of an anchor and its K = B - 1 negatives are drawn independently, as in the theory
(contrastive_ext/theory), and `SupervisedBound` averages over batches. On digits an encoder is trained anew for every
batch size, loss and seed; a file is measured as it is. The picture is that of Nozawa & Sato, arXiv:2102.06866, fig. 1:
the supervised loss of the mean classifier beside its upper bounds, and what the bounds are made of. Digits are measured
on the images they were trained on: the encoder saw no label, the class means did. The number of steps is fixed, so that
a larger batch also sees more images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_ext.theory import SupervisedBound, collision_probability, coverage_probability, expected_log_collisions

from . import digits, report
from .cases import LOSSES, PAIR_LOSSES, short_name
from .device import Device
from .plots import BASELINES, OURS, STYLE

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)
LARGEST_BATCH = 4096  # of a features file
SEEDS = (0, 1, 2)
STEPS = 300
AUGMENTATIONS = 16  # of every image, for the means and to draw views from
ANCHORS = 8192  # measured at least, at every batch size
BOUNDED_LOSS = "fused_infonce_loss"  # the loss the bounds are about


@dataclass(frozen=True)
class Features:
    """Unit vectors `views` [V, n, D] of V augmentations of n images, and their `labels` [n]; every class has images."""

    views: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """C, the largest label and one."""
        return int(self.labels.max()) + 1

    @property
    def augmentation_means(self) -> Tensor:
        """[n, D] mean over the augmentations of every image."""
        return self.views.mean(0)

    @property
    def class_means(self) -> Tensor:
        """[C, D] mean over the images of every class."""
        member = F.one_hot(self.labels, self.num_classes).to(self.views.dtype)
        return member.T @ self.augmentation_means / member.sum(0)[:, None]


def load_features(path: Path, device: Device) -> Features:
    """Features of an .npz file; ValueError that names what is missing or wrong."""
    import numpy as np

    with np.load(path) as file:
        if missing := {"views", "labels"} - set(file.files):
            raise ValueError(f"{path} must hold views [V, n, D] and labels [n]; missing: {', '.join(sorted(missing))}.")
        views, labels = torch.from_numpy(file["views"]), torch.from_numpy(file["labels"])
    if views.dim() != 3 or len(views) < 2 or not views.is_floating_point():
        raise ValueError(f"views must be floating-point [V, n, D] with V >= 2; got {views.dtype} {list(views.shape)}.")
    if labels.shape != views.shape[1:2] or labels.is_floating_point() or len(labels) < 4:
        raise ValueError(
            f"labels must be integers [n = {views.shape[1]}], n >= 4; got {labels.dtype} {list(labels.shape)}."
        )
    labels = labels.unique(return_inverse=True)[1]  # classes without images are none
    return Features(F.normalize(views.to(device.torch, torch.float64), dim=2), labels.to(device.torch))


def sweep_features(features: Features, temperature: float, name: str = "features") -> dict[str, Any]:
    """Measure one set of features at batch sizes of powers of two; JSON-ready."""
    sizes = [2**k for k in range(2, int(math.log2(min(LARGEST_BATCH, features.views.shape[1]))) + 1)]
    rows = []
    with report.Progress(len(sizes)) as progress:
        for batch in sizes:
            rows.append(measure(features, batch, temperature) | {"loss": BOUNDED_LOSS, "seed": 0})
            progress.finish(_line(rows[-1]))
    return {"data": name, "temperature": temperature, "num_classes": features.num_classes, "rows": rows}


def sweep_digits(device: Device, quick: bool) -> dict[str, Any]:
    """Train and measure on digits for every batch size, loss and seed; JSON-ready."""
    images, labels = digits.load(device)
    sizes, seeds, steps = (BATCH_SIZES[1::2], SEEDS[:1], 20) if quick else (BATCH_SIZES, SEEDS, STEPS)
    jobs = [(loss, batch, seed) for batch in sizes for loss in PAIR_LOSSES for seed in seeds]
    rows = []
    with report.Progress(len(jobs)) as progress:
        for loss, batch, seed in jobs:
            progress.say(f"{short_name(loss)}, B = {batch}")
            features = _train(images, labels, LOSSES[loss].function, batch, steps, seed)
            rows.append(measure(features, batch, digits.TEMPERATURE) | {"loss": loss, "seed": seed})
            progress.finish(_line(rows[-1]))
    return {"data": "digits", "temperature": digits.TEMPERATURE, "num_classes": 10, "steps": steps, "rows": rows}


@torch.no_grad()
def measure(features: Features, batch: int, temperature: float) -> dict[str, Any]:
    """Terms, bounds, and what the coupon collector expects of them, from batches drawn with replacement."""
    bound = SupervisedBound(features.num_classes, temperature)
    class_means, means = features.class_means, features.augmentation_means
    num_views, num_images = features.views.shape[:2]
    generator = torch.Generator().manual_seed(0)
    for _ in range(math.ceil(ANCHORS / batch)):
        chosen = torch.randint(num_images, (batch,), generator=generator).to(means.device)
        first = torch.randint(num_views, (batch,), generator=generator).to(means.device)
        other = torch.randint(1, num_views, (batch,), generator=generator).to(means.device)
        z1, z2 = features.views[first, chosen], features.views[(first + other) % num_views, chosen]
        bound.update(z1, z2, features.labels[chosen], class_means=class_means, augmentation_means=means[chosen])
    terms = bound.compute()
    prior = features.labels.bincount(minlength=features.num_classes)
    return {
        "batch": batch,
        **asdict(terms),
        "lower_bound": terms.lower_bound,
        "arora_lower_bound": terms.arora_lower_bound,
        "upper_bound": _finite(terms.upper_bound),
        "arora_upper_bound": _finite(terms.arora_upper_bound),
        "expected_coverage": float(coverage_probability(batch, prior=prior)),
        "expected_collision": float(collision_probability(batch - 1, prior)),
        "expected_log_collisions": float(expected_log_collisions(batch - 1, prior)),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    rows = [row for row in results["rows"] if row["loss"] == BOUNDED_LOSS]
    sizes = sorted({row["batch"] for row in rows})
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="batch size B = negatives K + 1")
        axis.set_xticks(sizes, [f"{b:,}" for b in sizes])
        axis.minorticks_off()
        axis.grid(axis="y", lw=0.4, alpha=0.5)

    upper, lower, accuracy, draws = axes.flat
    _curve(upper, rows, "upper_bound", OURS[0], "upper bound, coverage (Nozawa & Sato)")
    _curve(upper, rows, "arora_upper_bound", BASELINES[1], "upper bound, collisions (Arora et al.)")
    _curve(upper, rows, "supervised_loss", OURS[1], "measured: mean classifier")
    upper.set(yscale="log", title="supervised loss and its upper bounds, nats")
    _curve(lower, rows, "lower_bound", OURS[0], "lower bound, coverage (Nozawa & Sato)")
    _curve(lower, rows, "arora_lower_bound", BASELINES[1], "lower bound, collisions (Arora et al.)")
    _curve(lower, rows, "contrastive_loss", OURS[1], "measured: InfoNCE")
    lower.set(title="contrastive loss and its lower bounds, nats")
    for loss, color in zip(dict.fromkeys(row["loss"] for row in results["rows"]), OURS + BASELINES, strict=False):
        of_loss = [row for row in results["rows"] if row["loss"] == loss]
        _curve(accuracy, of_loss, "accuracy", color, short_name(loss))
    accuracy.set(title="accuracy of the mean classifier")
    for measured, expected, color, label in (
        ("coverage", "expected_coverage", OURS[0], "coverage"),
        ("collision", "expected_collision", BASELINES[1], "collision probability"),
        ("collision_term", "expected_log_collisions", OURS[2], "E ln(Col + 1), nats"),
    ):
        draws.plot(sizes, [_mean(rows, b, expected) for b in sizes], color=color, lw=1.3, label=f"{label}, theory")
        draws.plot(sizes, [_mean(rows, b, measured) for b in sizes], "o", color=color, ms=4)
    draws.set(title="what a batch contains (dots: measured)")
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize="small")
    figure.suptitle(
        f"{results['data']}: {results['num_classes']} classes, t = {results['temperature']}", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _train(
    images: Tensor, labels: Tensor, function: Callable[..., Tensor], batch: int, steps: int, seed: int
) -> Features:
    torch.manual_seed(seed)
    encoder = digits.new_encoder().to(images.device)
    optimizer = torch.optim.Adam(encoder.parameters(), digits.LEARNING_RATE)
    for _ in range(steps):
        chosen = images[torch.randint(len(images), (batch,), device=images.device)]
        loss = function(encoder(digits.augment(chosen)), encoder(digits.augment(chosen)), digits.TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _encode(encoder, images, labels)


@torch.no_grad()
def _encode(encoder: nn.Module, images: Tensor, labels: Tensor) -> Features:
    views = [encoder(digits.augment(images)).double() for _ in range(AUGMENTATIONS)]
    return Features(F.normalize(torch.stack(views), dim=2), labels)


def _curve(axis, rows: Sequence[dict[str, Any]], key: str, color: str, label: str) -> None:
    """Mean over seeds, band from the smallest to the largest; batch sizes where a bound says nothing are left out."""
    known = [row for row in rows if row[key] is not None]
    sizes = sorted({row["batch"] for row in known})
    values = [[row[key] for row in known if row["batch"] == b] for b in sizes]
    axis.plot(sizes, [sum(v) / len(v) for v in values], "o-", color=color, ms=4, lw=1.6, label=label)
    axis.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)


def _mean(rows: Sequence[dict[str, Any]], batch: int, key: str) -> float:
    values = [row[key] for row in rows if row["batch"] == batch]
    return sum(values) / len(values)


def _line(row: dict[str, Any]) -> str:
    bounds = [row["upper_bound"], row["arora_upper_bound"]]
    shown = ", ".join("none" if bound is None else f"{bound:.3g}" for bound in bounds)
    return (
        f"{short_name(row['loss'])}, B = {row['batch']}: supervised loss {row['supervised_loss']:.3f} "
        f"(bounds {shown}), contrastive loss {row['contrastive_loss']:.3f}, accuracy {row['accuracy']:.1%}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
