"""CLIP: two encoders, one learned temperature, both directions; seconds on two cores.

    pip install contrastive_ext scikit-learn
    python clip_two_towers.py --epochs 40

The two modalities are the upper and the lower half of scikit-learn's digits. Of 500 unseen images, each upper half
looks for its own lower half among all 500 (recall at 1 and at 5); many halves of a class look alike, so that no model
finds them all. Lower halves that occur twice, as captions do, have equal `ids` and are no negatives of one another.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_ext as ce


class TwoTowers(nn.Module):
    """An encoder for each modality and the learned 1/temperature, one module: it moves and is saved as one."""

    def __init__(self) -> None:
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
            for _ in range(2)
        )
        self.scale = ce.LogitScale(temperature=0.07, max_scale=100)

    def forward(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.upper(upper), self.lower(lower), self.scale()


@torch.no_grad()
def recall(model: TwoTowers, upper: Tensor, lower: Tensor, at: int) -> float:
    """Share of upper halves whose own lower half is among the `at` most similar ones."""
    image, text, _ = model(upper, lower)
    nearest = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).topk(at, dim=1).indices
    return float((nearest == torch.arange(len(upper))[:, None]).any(1).double().mean())


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    pixels, _ = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32)[torch.randperm(len(pixels))] / 16
    halves = images[:, :32], images[:, 32:]
    _, captions = torch.unique(halves[1], dim=0, return_inverse=True)  # equal lower halves have equal ids
    (upper, unseen_upper), (lower, unseen_lower) = ((half[:-500], half[-500:]) for half in halves)

    model = TwoTowers()
    weights = [p for name, p in model.named_parameters() if not name.startswith("scale")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": model.scale.parameters(), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(upper)).split(options.batch):
            noise = (0.05 * torch.randn(len(batch), 32) for _ in range(2))
            image, text, scale = model(*(half[batch] + n for half, n in zip((upper, lower), noise, strict=True)))
            loss = ce.fused_infonce_loss(image, text, logit_scale=scale, layout="symmetric", ids=captions[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 10 == 0 or epoch == options.epochs - 1:
            found = [recall(model, unseen_upper, unseen_lower, at) for at in (1, 5)]
            print(
                f"epoch {epoch:3}  loss {loss.item():.3f}  temperature {1 / scale.item():.3f}  "
                f"recall@1 {found[0]:.1%}  recall@5 {found[1]:.1%}"
            )
    return found[1]


if __name__ == "__main__":
    main()
