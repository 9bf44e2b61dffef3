"""DistributedDataParallel with the negatives of all ranks; a minute at most on two cores.

    pip install contrastive_ext
    torchrun --nproc-per-node 2 ddp.py --check

`group=AllRanks()` gathers the other ranks' embeddings as candidates and sends their gradients back, so that what DDP
averages is the gradient of the whole batch. `--check` computes that gradient in one process, in float64, and compares.
The learned scale is a part of the wrapped model: DDP averages its gradient like any other.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported by DDP, it would keep the group, whose threads then outlive Python
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce


class Model(nn.Module):
    """Two towers over vectors and a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 64)) for _ in range(2)
        )
        self.scale = ce.LogitScale(temperature=0.1)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.towers[0](x1), self.towers[1](x2), self.scale()


def batch_of(step: int, size: int) -> tuple[Tensor, Tensor]:
    """A batch of pairs, the same on every rank: noisy copies of common vectors."""
    random = torch.Generator().manual_seed(step)
    common = torch.randn(size, 32, generator=random, dtype=torch.float64)
    first, second = (common + 0.3 * torch.randn(size, 32, generator=random, dtype=torch.float64) for _ in range(2))
    return first, second


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256, help="pairs of all ranks together")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--check", action="store_true", help="compare the gradient with that of one process")
    options = parser.parse_args(arguments)

    cuda = torch.cuda.is_available()
    # a backend for the host beside NCCL: ranks compare their calls there, without waiting for the device
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    alone = Model(options.width).double().to(device)
    model = DistributedDataParallel(alone)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss_of_all = torch.zeros(())
    for step in range(options.steps):
        whole = [x.to(device) for x in batch_of(step, options.batch)]
        z1, z2, scale = model(*(x.chunk(ranks)[rank] for x in whole))
        loss = ce.fused_infonce_loss(z1, z2, logit_scale=scale, layout="symmetric", group=ce.AllRanks())
        optimizer.zero_grad()
        loss.backward()
        if options.check and step == 0:
            z1, z2, scale = alone(*whole)
            full = ce.fused_infonce_loss(z1, z2, logit_scale=scale, layout="symmetric")
            expected = torch.autograd.grad(full, list(alone.parameters()))
            pairs = zip(alone.parameters(), expected, strict=True)
            difference = max(float((p.grad - g).abs().max() / g.abs().max()) for p, g in pairs if p.grad is not None)
            print(f"rank {rank}: largest relative difference to the gradient of one process {difference:.1e}")
            assert difference < 1e-11
        optimizer.step()
        loss_of_all = loss.detach().clone()
        dist.all_reduce(loss_of_all)  # a rank's loss is the mean over its own pairs
    if rank == 0:
        print(f"{ranks} ranks, loss of the last step {loss_of_all.item() / ranks:.4f}")
    dist.destroy_process_group()
    return float(loss_of_all / ranks)


if __name__ == "__main__":
    main()
