"""SimCLR on scikit-learn's digits with any loss of two views; one minute on two cores.

    pip install contrastive_ext scikit-learn
    python simclr_digits.py --loss debiased --epochs 60

An encoder learns 1,297 of the 1,797 images of 8 x 8 without labels. The other 500 are then classified by the
most similar of ten of them, one of each class. Ten balanced classes: a negative is false with probability .1, which is
`tau_plus`.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_ext as ce

LOSSES: dict[str, ce.RowLossModule] = {
    "infonce": ce.InfoNCELoss(temperature=0.3),
    "decoupled": ce.DecoupledLoss(temperature=0.3),
    "debiased": ce.DebiasedLoss(temperature=0.5, tau_plus=0.1),
    "hard_negative": ce.HardNegativeLoss(temperature=0.5, tau_plus=0.1, beta=1.0),
    "bayesian": ce.BayesianLoss(temperature=0.5, tau_plus=0.1, alpha=0.9, beta=0.9),
}


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


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="debiased")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(classes)[order]
    seen, unseen = images[:-500], images[-500:]

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    encoder.append(nn.Linear(256, 64))
    criterion = LOSSES[options.loss]
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    for epoch in range(options.epochs):
        for x in seen[torch.randperm(len(seen))].split(options.batch):
            loss, stats = criterion(encoder(augment(x)), encoder(augment(x)), return_stats=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0 or epoch == options.epochs - 1:
            accuracy = one_shot_accuracy(encoder(unseen), labels[-500:])
            numbers = stats.to_dict()
            print(
                f"epoch {epoch:3}  loss {loss.item():.3f}  one-shot accuracy {accuracy:.1%}  "
                f"hardest negative {numbers['hardest_negative']:.2f}  on the floor {numbers['clamped_fraction']:.0%}"
            )
    return accuracy


if __name__ == "__main__":
    main()
