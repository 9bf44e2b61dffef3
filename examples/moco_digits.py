"""MoCo, and MoCo with self-labelling refinery and momentum mixup (SANE), side by side on scikit-learn's digits.

    python -m examples.moco_digits              from the top folder: a few minutes on two cores
    python -m examples.moco_digits --seeds 2 --steps 100

An encoder learns 1297 of the 8 x 8 images without labels, against a queue of keys from its momentum average. The other
500 images, which it never saw, are then classified by the nearest of ten class means made from 1 or 5 of them per
class, averaged over many draws. Both methods take the same number of steps from the same initial weights; a step of
SANE costs more, because it encodes the mixed images too. The training step is `training_step`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext as ce
from bench.device import Device
from bench.digits import FEATURES, augment, load, new_encoder, probe
from bench.report import Progress

HELD_OUT = 500
QUEUE = 257  # prime: no batch divides it, the queue wraps in the middle of one
MOMENTUM = 0.98
TEMPERATURE = 0.2
LEARNING_RATE = 3e-3
KAPPA = 2.0
SHOTS = (1, 5)
METHODS = ("MoCo", "MoCo + SANE")


@dataclass(frozen=True)
class Outcome:
    """One trained encoder: accuracy by number of shots, milliseconds per step, the last statistics of the loss."""

    accuracy: dict[int, float]
    step_ms: float
    stats: dict[str, float]


def training_step(encoder: nn.Module, average: nn.Module, criterion: ce.SelfLabelingLoss, x: Tensor, mu: float | None):
    """Loss and statistics of a batch of images; mu None is MoCo: no mixed images, one-hot labels."""
    view, other = augment(x), augment(x)
    with torch.no_grad():
        k = F.normalize(average(other), dim=1)
    if mu is None:
        result = criterion(encoder(view), k, return_stats=True)
    else:
        mixed, perm, theta = ce.momentum_mixup(view, other, KAPPA)
        result = criterion(encoder(view), k, encoder(mixed), perm, theta, mu=mu, return_stats=True)
    criterion.queue.enqueue(k)  # after the loss: a key is no negative of its own image
    return result


def train(method: str, seed: int, steps: int, batch: int) -> Outcome:
    """Train one encoder and probe it on images it has not seen."""
    torch.manual_seed(seed)
    images, labels = load(Device("cpu"))
    order = torch.randperm(len(images))
    held_out, seen = order[:HELD_OUT], images[order[HELD_OUT:]]
    encoder = new_encoder()
    average = copy.deepcopy(encoder).requires_grad_(False)
    criterion = ce.SelfLabelingLoss(TEMPERATURE, queue=ce.NegativeQueue(QUEUE, FEATURES))
    optimizer = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)
    stats, began = None, time.perf_counter()
    for step in range(steps):
        mu = None if method == "MoCo" else ce.mu_schedule(step, steps)
        x = seen[torch.randperm(len(seen))[:batch]]
        loss, stats = training_step(encoder, average, criterion, x, mu)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ce.momentum_update(encoder, average, MOMENTUM)
    step_ms = 1e3 * (time.perf_counter() - began) / max(1, steps)
    return Outcome(_accuracy(encoder, images[held_out], labels[held_out]), step_ms, stats.to_dict() if stats else {})


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Outcome]]:
    """Train every method with every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each method")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # products this small lose more by waiting for a second thread than they gain
    outcomes: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    with Progress(options.seeds * len(METHODS)) as progress:
        for seed in range(options.seeds):
            for method in METHODS:
                progress.say(f"{method}, seed {seed}")
                outcomes[method].append(train(method, seed, options.steps, options.batch))
                progress.finish(f"{method}, seed {seed}: " + _percent(outcomes[method][-1].accuracy))
    _show(outcomes, [_untrained(seed) for seed in range(options.seeds)], _raw_pixels())
    return outcomes


def _accuracy(encoder: nn.Module, images: Tensor, labels: Tensor) -> dict[int, float]:
    return {shots: probe(encoder, images, labels, shots)[0] for shots in SHOTS}


def _untrained(seed: int) -> dict[int, float]:
    return train("MoCo", seed, steps=0, batch=1).accuracy


def _raw_pixels() -> dict[int, float]:
    images, labels = load(Device("cpu"))
    return _accuracy(nn.Flatten(), images, labels)


def _percent(accuracy: dict[int, float]) -> str:
    return ", ".join(f"{shots}-shot {100 * value:.1f} %" for shots, value in accuracy.items())


def _show(outcomes: dict[str, list[Outcome]], untrained: list[dict[int, float]], pixels: dict[int, float]) -> None:
    runs = len(untrained)
    print(f"\naccuracy on {HELD_OUT} unseen images, mean +- standard deviation over {runs} seeds")
    print(f"{'':18}" + "".join(f"{shots}-shot".rjust(16) for shots in SHOTS) + "ms per step".rjust(14))
    print(f"{'raw pixels':18}" + "".join(f"{100 * pixels[shots]:.1f} %".rjust(16) for shots in SHOTS))
    print(f"{'untrained':18}" + "".join(_spread([a[shots] for a in untrained]).rjust(16) for shots in SHOTS))
    for method, done in outcomes.items():
        cells = "".join(_spread([x.accuracy[shots] for x in done]).rjust(16) for shots in SHOTS)
        print(f"{method:18}{cells}{torch.tensor([x.step_ms for x in done]).median():14.1f}")
    for shots in SHOTS:
        one, other = (torch.tensor([x.accuracy[shots] for x in outcomes[m]]) for m in METHODS)
        gain = 100 * (other - one)
        error = f"{float(gain.std()) / runs**0.5:.1f}" if runs > 1 else "unknown, one seed"
        print(f"{shots}-shot, SANE minus MoCo with the same seeds: {gain.mean():+.1f} points, standard error {error}")
    last = outcomes[METHODS[1]][-1].stats
    print("SANE's last step: " + ", ".join(f"{name} {value:.3g}" for name, value in last.items()))


def _spread(values: list[float]) -> str:
    x = 100 * torch.tensor(values)
    return f"{x.mean():.1f} +- {x.std():.1f} %" if len(x) > 1 else f"{x.mean():.1f} %"


if __name__ == "__main__":
    main()
