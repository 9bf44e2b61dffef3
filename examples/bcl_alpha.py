"""The Bayesian loss with alpha measured while it trains; a minute on two cores.

    pip install contrastive_ext scikit-learn
    python bcl_alpha.py --epochs 40

BCL weighs every negative by its rank, and alpha says how far ranks can be trusted: the probability that the encoder
ranks an image of the anchor's class above one of another (its macro-AUC), .5 for a guess. Three ways to have it: a
constant, the released schedule (`linear_alpha`), or measured every epoch on 200 labelled images (`estimate_alpha`).
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_ext as ce

WAYS = ("constant", "schedule", "measured")


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


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--labelled", type=int, default=200, help="images that measure alpha; they are not trained on")
    options = parser.parse_args(arguments)

    pixels, classes = load_digits(return_X_y=True)
    accuracies = {}
    for way in WAYS:
        torch.manual_seed(0)
        order = torch.randperm(len(classes))
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
        labels = torch.tensor(classes)[order]
        unseen, measure, train = torch.arange(len(labels)).split(
            [500, options.labelled, len(labels) - 500 - options.labelled]
        )
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        criterion = ce.BayesianLoss(temperature=0.5, tau_plus=0.1, beta=0.9)
        optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
        for epoch in range(options.epochs):
            if way == "constant":
                alpha = 0.9
            elif way == "schedule":
                alpha = ce.linear_alpha(epoch, alpha=0.9, steps=options.epochs // 2 or 1)
            else:  # waits for the device: once an epoch, not once a step
                alpha = ce.estimate_alpha(encoder(images[measure]), labels[measure])
            for batch in train[torch.randperm(len(train))].split(options.batch):
                x = images[batch]
                loss, stats = criterion(encoder(augment(x)), encoder(augment(x)), alpha=alpha, return_stats=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if epoch % 10 == 0:
                weights = stats.to_dict()
                print(f"{way:9} epoch {epoch:3}  loss {loss.item():.3f}  alpha {alpha:.3f}  "
                      f"largest weight {weights['max_weight']:.2f}", flush=True)  # fmt: skip
        accuracies[way] = one_shot_accuracy(encoder(images[unseen]), labels[unseen])
        print(f"{way:9} alpha {alpha:.3f} at the end, one-shot accuracy {accuracies[way]:.1%}", flush=True)
    return accuracies


if __name__ == "__main__":
    main()
