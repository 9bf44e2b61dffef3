"""Draws the pictures of the loss pages and of the guides into docs/pictures, from the library itself.

    python tools/pictures.py            all of them, a minute; --out FOLDER elsewhere

What a picture shows is computed: the gradient that a negative of a given cosine gets is autograd's, the floor of the
debiased losses is `clamped_fraction`. Pictures of the study are drawn by `python -m study show --site docs`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import contrastive_ext as ce

COLORS = ("#0b6fb8", "#d1495b", "#2a9d6f", "#e09f3e", "#6a4c93")
POSITIVE, NEGATIVES = 0.7, 200  # cosine of the positive; negatives of the row
T = 0.2


def on_the_circle(cosines: Tensor) -> Tensor:
    """Unit vectors whose first coordinate is the given cosine: their dot products with (1, 0)."""
    return torch.stack([cosines, (1 - cosines**2).sqrt()], 1)


def cosines_of_negatives() -> Tensor:
    """Of one row, as a trained encoder has them: most near 0, few near the positive."""
    return (torch.linspace(-2.5, 2.5, NEGATIVES, dtype=torch.float64) * 0.28 + 0.05).clamp(-0.95, 0.95)


def pull(function: Callable[..., Tensor], positive_cosine: float = POSITIVE, t: float = T, **keywords: Any) -> Tensor:
    """[NEGATIVES] dL/dcosine of every negative of one anchor."""
    anchor = on_the_circle(torch.ones(1, dtype=torch.float64))
    positive = on_the_circle(torch.tensor([positive_cosine], dtype=torch.float64))
    negatives = on_the_circle(cosines_of_negatives()).requires_grad_()
    loss = function(anchor, positive, t, layout="one_way", negatives=negatives, in_batch_negatives=False,
                    normalize=False, backend="reference", **keywords)  # fmt: skip
    return torch.autograd.grad(loss, negatives)[0][:, 0]


def pull_of_sigmoid(bias: float) -> Tensor:
    """[NEGATIVES] dL/dcosine of every negative of one anchor in the sigmoid loss."""
    anchor = on_the_circle(torch.ones(1, dtype=torch.float64))
    cosines = torch.cat([torch.tensor([POSITIVE], dtype=torch.float64), cosines_of_negatives()])
    columns = on_the_circle(cosines).requires_grad_()
    loss = ce.fused_sigmoid_loss(anchor, columns, 1 / T, bias, normalize=False, backend="reference")
    return torch.autograd.grad(loss, columns)[0][1:, 0]


def by_positive(path: Path, title: str, t: float, named: Sequence[tuple[str, Callable[..., Tensor], dict]]) -> None:
    """The sum of what all negatives of one anchor get, by the cosine of its positive."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    positives = torch.linspace(-0.2, 0.99, 60, dtype=torch.float64)
    for (label, function, keywords), color in zip(named, COLORS, strict=False):
        sums = [float(pull(function, float(p), t, **keywords).sum()) for p in positives]
        axes.plot(positives, sums, color=color, label=label, lw=1.6)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="cosine of the positive", ylabel="sum of the negatives' gradients")
    save(figure, axes, path, title)


def curves(path: Path, title: str, named: Sequence[tuple[str, Tensor]], ylabel: str = "gradient of its cosine") -> None:
    """What a negative gets, by its cosine."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for (label, values), color in zip(named, COLORS, strict=False):
        axes.plot(cosines_of_negatives(), values, color=color, label=label, lw=1.6)
    axes.axvline(POSITIVE, color="#999", lw=0.8, ls=":")
    axes.annotate(
        "positive", (POSITIVE, axes.get_ylim()[1]), fontsize=7, color="#777", ha="right", va="top", rotation=90
    )
    axes.set(xlabel="cosine of a negative with the anchor", ylabel=ylabel)
    save(figure, axes, path, title)


def save(figure: Any, axes: Any, path: Path, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def losses(out: Path) -> None:
    """A picture of every loss over pairs: InfoNCE, and what it changes."""
    infonce = ("InfoNCE", pull(ce.fused_infonce_loss))
    curves(out / "infonce.png", "InfoNCE: a negative is pushed by its softmax weight", [
        infonce, ("hardness 2", pull(ce.fused_infonce_loss, hardness=2.0)),
    ])  # fmt: skip
    by_positive(out / "decoupled.png", "Decoupled: a converged anchor goes on pushing", T, [
        ("InfoNCE", ce.fused_infonce_loss, {}), ("decoupled", ce.fused_decoupled_loss, {}),
    ])  # fmt: skip
    by_positive(out / "debiased.png", "Debiased, t 0.5: more push near a good positive, none on the floor", 0.5, [
        ("InfoNCE", ce.fused_infonce_loss, {}),
        *((f"tau_plus {tau}", ce.fused_debiased_loss, {"tau_plus": tau}) for tau in (0.05, 0.1, 0.2)),
    ])  # fmt: skip
    curves(out / "hard_negative.png", "Hard negatives, tau_plus 0: the closest ones count more", [
        infonce, *((f"beta {b}", pull(ce.fused_hard_negative_loss, tau_plus=0.0, beta=b)) for b in (0.5, 1.0, 2.0)),
    ])  # fmt: skip
    sigmoid = [pull_of_sigmoid(bias) for bias in (-3.0, -2.0, -1.0)]
    curves(out / "sigmoid.png", "Sigmoid: each negative by itself, the bias says from where on", [
        infonce, *zip((f"sigmoid, bias {b:g}" for b in (-3, -2, -1)), sigmoid, strict=True),
    ])  # fmt: skip
    curves(out / "bayesian.png", "Bayesian, tau_plus 0.1: weights by rank", [
        infonce, *((f"alpha {a}, beta {b}", pull(ce.fused_bayesian_loss, alpha=a, beta=b))
                   for a, b in ((0.6, 0.9), (0.9, 0.9), (0.9, 0.5))),
    ])  # fmt: skip


def views(out: Path) -> None:
    """FNC and SupCon, whose columns are the other images' views."""
    cosines = torch.cat([torch.tensor([1.0], dtype=torch.float64), cosines_of_negatives()])
    first, second = on_the_circle(cosines), on_the_circle(cosines)
    second[0] = on_the_circle(torch.tensor([POSITIVE], dtype=torch.float64))[0]

    def of_first(function: Callable[[Tensor], Tensor]) -> Tensor:
        """dL/dcosine of the second views of other images, for the first anchor alone."""
        z = torch.stack([first, second]).requires_grad_()
        return torch.autograd.grad(function(z).flatten()[0], z)[0][1, 1:, 0]

    def fnc(mode: str) -> Callable[[Tensor], Tensor]:
        return lambda z: ce.fused_false_negative_loss(z, T, mode=mode, top_k=40, threshold=0.45, normalize=False,
                                                      reduction="none", backend="reference")  # fmt: skip

    labels = torch.arange(1 + NEGATIVES)
    labels[150:156] = 0  # six columns of the anchor's class
    curves(out / "false_negative.png", "FNC, threshold 0.45: found columns are left out, or attracted", [
        ("InfoNCE", of_first(lambda z: ce.fused_infonce_loss(z[0], z[1], T, normalize=False, reduction="none",
                                                             backend="reference"))),
        ("eliminated", of_first(fnc("eliminate"))), ("attracted", of_first(fnc("attract"))),
    ])  # fmt: skip
    near = torch.arange(1 + NEGATIVES)
    near[176:186] = 0  # ten columns of the class that are close already
    curves(out / "labelled_infonce.png", "Ten close columns of the class: in SupCon each also pushes the others", [
        ("SupCon, out", of_first(lambda z: ce.fused_supcon_loss(z, near, T, normalize=False, reduction="none",
                                                                backend="reference"))),
        ("labelled InfoNCE, per positive", of_first(lambda z: ce.fused_labelled_infonce_loss(
            z, near, T, normalize=False, reduction="none", backend="reference") / 21)),
    ])  # fmt: skip
    curves(out / "supcon.png", "SupCon: six columns of the anchor's class are attracted", [
        ("out", of_first(lambda z: ce.fused_supcon_loss(z, labels, T, normalize=False, reduction="none",
                                                        backend="reference"))),
        ("in", of_first(lambda z: ce.fused_supcon_loss(z, labels, T, "in", normalize=False, reduction="none",
                                                       backend="reference"))),
    ])  # fmt: skip


def targets(out: Path) -> None:
    """Soft targets and SANE's labels over the keys, by the key's cosine."""
    cosines = cosines_of_negatives()
    student = torch.softmax(cosines / 0.2, 0)
    teacher = torch.softmax(-(cosines - 0.35).abs() / 0.05, 0)  # finds others similar than the student does
    curves(out / "soft_target.png", "Soft targets: attracted where the teacher says more than the student", [
        ("student, t 0.2", student), ("teacher, t 0.05", teacher), ("gradient: student - teacher", student - teacher),
    ], "share of a key")  # fmt: skip
    keys = torch.cat([torch.ones(1, dtype=torch.float64), cosines])  # its own key comes first
    p = torch.softmax(keys / (0.2 * 0.8), 0)
    q = torch.softmax(cosines / (0.2 * 0.8), 0)
    named = []
    for mu in (0.0, 0.5, 1.0):
        z = 1 + mu * p.max() + mu * q.max()
        named.append((f"mu {mu}", mu * p.max() / z * p[1:] + mu * q.max() / z * q))
    curves(out / "self_labeling.png", "SANE: what a label gives to other images' keys", named, "share of a key")


def floor(out: Path) -> None:
    """Share of anchors on the debiasing floor against temperature and tau_plus, on clustered embeddings."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(10, 64, dtype=torch.float64), dim=1)
    base = centres[torch.arange(256) % 10] + 0.12 * torch.randn(256, 64, dtype=torch.float64)
    z1, z2 = (base + 0.03 * torch.randn(256, 64, dtype=torch.float64) for _ in range(2))
    temperatures = [0.05 * 2 ** (i / 4) for i in range(17)]
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for tau, color in zip((0.001, 0.01, 0.05, 0.1), COLORS, strict=False):
        shares = [
            100 * ce.fused_debiased_loss(z1, z2, t, tau, return_stats=True)[1].to_dict()["clamped_fraction"]
            for t in temperatures
        ]
        axes.plot(temperatures, shares, "o-", color=color, ms=3, label=f"tau_plus {tau}")
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()
    axes.set(xlabel="temperature", ylabel="anchors on the floor, %")
    save(figure, axes, out / "floor.png", "256 pairs of ten classes: whose negatives get no gradient")


def temperatures(out: Path) -> None:
    """How many negatives an anchor learns from, by temperature."""
    cosines, named = cosines_of_negatives(), []
    for t in (0.05, 0.1, 0.2, 0.5):
        weight = torch.softmax(cosines / t, 0)
        named.append((f"t {t}: {1 / float((weight**2).sum()):.0f} of {NEGATIVES} negatives", weight))
    curves(out / "temperature.png", "Softmax weights of one row, and how many negatives count", named, "weight")


def coverage(out: Path) -> None:
    """Probability that a batch holds every class."""
    from contrastive_ext.theory import coverage_probability

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sizes = [2 ** (i / 2) for i in range(4, 33)]
    for classes, color in zip((10, 100, 1000), COLORS, strict=False):
        known = [100 * float(coverage_probability(math.ceil(n), num_classes=classes)) for n in sizes]
        axes.plot(sizes, known, color=color, label=f"{classes} classes")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="images in a batch", ylabel="batches with all classes, %")
    save(figure, axes, out / "coverage.png", "How many negatives until every class is there")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for draw in (losses, views, targets, floor, temperatures, coverage):
        draw(out)


if __name__ == "__main__":
    main()
