"""MoCo with a queue, stopped and resumed bit for bit; half a minute on two cores.

    pip install contrastive_ext scikit-learn
    python moco_digits.py --steps 400
    python moco_digits.py --steps 200 --save moco.pt && python moco_digits.py --steps 400 --resume moco.pt

Both ways end with the same weights to the last bit: the queue is a part of the loss module, whose `state_dict` holds
its keys, where the next ones go and how many there are. The queue's 257 places are a prime number: no batch divides
them, and it wraps in the middle of one.
"""

import argparse
import copy
import hashlib

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_ext as ce


class MoCo(nn.Module):
    """An encoder, its moving average, and the loss with its queue: everything that a checkpoint has to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.criterion = ce.InfoNCELoss(
            temperature=0.2, layout="one_way", in_batch_negatives=False, queue=ce.NegativeQueue(257, 64)
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.encoder(augment(x))
        with torch.no_grad():
            k = self.average(augment(x))
        loss = self.criterion(q, k)
        self.criterion.queue.enqueue(k)  # after the loss: a key is no negative of its own image
        return loss


def augment(x: Tensor) -> Tensor:
    """One random view of images [n, 64]: shifted by up to a pixel each way, brighter or darker, with noise."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    moved = x.reshape(-1, 8, 8).roll((down, right), (1, 2)).flatten(1)
    return moved * (0.8 + 0.4 * torch.rand(len(x), 1)) + 0.15 * torch.randn_like(x)


@torch.no_grad()
def one_shot_accuracy(z: Tensor, labels: Tensor, draws: int = 100) -> float:
    """Classification by the most similar of ten labelled images, one of each class; the mean over random tens."""
    z, random, right = F.normalize(z, dim=1), torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=random)
        ten = torch.stack([order[labels[order] == c][0] for c in range(10)])
        right += int(((z @ z[ten].T).argmax(1) == labels).sum()) - 10  # the ten themselves are no test
    return right / draws / (len(labels) - 10)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="steps in all, those before --resume included")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--save", help="file for a checkpoint at the end")
    parser.add_argument("--resume", help="checkpoint to go on from")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    x, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    model = MoCo()
    optimizer = torch.optim.Adam(model.encoder.parameters(), 3e-3)
    first = 0
    if options.resume:
        saved = torch.load(options.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    for _ in range(first, options.steps):
        loss = model(x[torch.randperm(len(x) - 500)[: options.batch]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ce.momentum_update(model.encoder, model.average, 0.99)
    if options.save:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"random": torch.get_rng_state(), "step": options.steps}, options.save)
    accuracy = one_shot_accuracy(model.encoder(x[-500:]), labels[-500:])
    bits = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
    print(f"steps {first} to {options.steps}: one-shot accuracy {accuracy:.1%}")
    print(f"checksum of encoder, average and queue: {hashlib.sha256(bits).hexdigest()[:16]}")
    return hashlib.sha256(bits).hexdigest()


if __name__ == "__main__":
    main()
