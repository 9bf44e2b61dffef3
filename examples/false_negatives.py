"""False negatives on digits: nothing done, cancelled by ids or by a guide, detected and eliminated or attracted.

    pip install contrastive_ext scikit-learn
    python false_negatives.py --seeds 3             two minutes on two cores

Every tenth negative of a digit shows the same digit. `ids` is what is known: here, with `--known .2`, the classes of a
fifth of the images. The guide is a model of its own, here the raw pixels. `fnc` finds false negatives among the
embeddings themselves. Encoders learn 1,297 images without the other labels; one-shot accuracy is on the other 500.
"""

import argparse
import math
import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_ext as ce

METHODS = ("nothing", "ids", "guide", "fnc eliminate", "fnc attract")
TEMPERATURE = 0.3


def loss_of(method: str, z1: Tensor, z2: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The line that differs."""
    if method == "ids":
        return ce.fused_infonce_loss(z1, z2, TEMPERATURE, ids=ids)
    if method == "guide":  # who is more similar to the anchor than its positive, less a margin, is no negative
        return ce.fused_infonce_loss(z1, z2, TEMPERATURE, guide=ce.Guide(x.flatten(1), x.flatten(1), margin=0.1))
    if method == "fnc eliminate":
        return ce.fused_false_negative_loss(torch.stack([z1, z2]), TEMPERATURE, mode="eliminate", top_k=8)
    if method == "fnc attract":
        return ce.fused_false_negative_loss(torch.stack([z1, z2]), TEMPERATURE, mode="attract", top_k=4, threshold=0.9)
    return ce.fused_infonce_loss(z1, z2, TEMPERATURE)


def augment(x: Tensor) -> Tensor:
    """One random view of images [n, 1, 8, 8]: rotated by up to 15 degrees, shifted by up to a pixel, with noise."""
    angle = (2 * torch.rand(len(x)) - 1) * math.radians(15)
    shift = (2 * torch.rand(2, len(x)) - 1) / 4
    rows = torch.stack([angle.cos(), -angle.sin(), shift[0]], 1), torch.stack([angle.sin(), angle.cos(), shift[1]], 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False) + 0.1 * torch.randn_like(x)


@torch.no_grad()
def one_shot_accuracy(z: Tensor, labels: Tensor, draws: int = 100) -> float:
    """Classification by the most similar of ten labelled images, one of each class; the mean over random tens."""
    z, random, right = F.normalize(z, dim=1), torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=random)
        ten = torch.stack([order[labels[order] == c][0] for c in range(10)])
        right += int(((z @ z[ten].T).argmax(1) == labels).sum()) - 10  # the ten themselves are no test
    return right / draws / (len(labels) - 10)


def train(method: str, seed: int, steps: int, known: float) -> float:
    torch.manual_seed(seed)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(classes)[order]
    own = torch.arange(10, 10 + len(labels))  # an id of its own for each image whose class is not known
    ids = torch.where(torch.rand(len(labels)) < known, labels, own)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    encoder.append(nn.Linear(256, 64))
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    for _ in range(steps):
        batch = torch.randperm(len(labels) - 500)[:256]
        x = images[batch]
        loss = loss_of(method, encoder(augment(x)), encoder(augment(x)), x, ids[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return one_shot_accuracy(encoder(images[-500:]), labels[-500:])


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--known", type=float, default=0.2, help="share of the images whose class is known")
    options = parser.parse_args(arguments)
    accuracies = {}
    for method in METHODS:
        accuracies[method] = [train(method, seed, options.steps, options.known) for seed in range(options.seeds)]
        spread = f" +- {statistics.stdev(accuracies[method]):.1%}" if options.seeds > 1 else ""
        print(f"{method:14} one-shot accuracy {statistics.mean(accuracies[method]):.1%}{spread}", flush=True)
    return accuracies


if __name__ == "__main__":
    main()
