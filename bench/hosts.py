"""Losses of other libraries beside the adapters that take their place, at the sizes of the libraries' own examples and
at a large batch: `python -m bench hosts`. A library that is not installed is left out."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn

from . import timing
from .case import Inputs
from .device import Device

LARGE = 2048
TOLERANCE = 1e-4  # of float32 losses: sums in another order
_ADAPTERS = "contrastive_ext.adapters"


@dataclass(frozen=True)
class Host:
    """A loss of a library and ours of the same name.

    package  what has to be importable, and its distribution on PyPI
    make     the loss from a module, the library's or the adapter's, as a function of z1, z2 [B, dim]
    batch    of the library's own example or trainer
    largest  batch of which its own loss fits into some GB
    """

    loss: str
    package: tuple[str, str]
    module: str
    adapter: str
    make: Callable[[object], Callable[[Tensor, Tensor], Tensor]]
    batch: int
    dim: int
    largest: int = LARGE

    @property
    def is_there(self) -> bool:
        """Whether the library is installed."""
        return importlib.util.find_spec(self.package[0]) is not None

    def losses(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The library's and ours."""
        names = {"host": self.module, "adapter": f"{_ADAPTERS}.{self.adapter}"}
        return {who: self.make(importlib.import_module(name)) for who, name in names.items()}


def _supervised(module) -> Callable[[Tensor, Tensor], Tensor]:
    loss = module.SupConLoss()

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        z, labels = torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device) % 10
        return loss(z, labels.repeat(2))

    return call


def _self_supervised(module) -> Callable[[Tensor, Tensor], Tensor]:
    wrapper = importlib.import_module("pytorch_metric_learning.losses").SelfSupervisedLoss
    return wrapper(module.NTXentLoss())


class _NoModel(nn.Module):
    """What the losses of sentence-transformers ask of a model before they embed."""

    def __getitem__(self, index):
        return self

    def __iter__(self):
        return iter([self])


def _ranking(module) -> Callable[[Tensor, Tensor], Tensor]:
    loss = module.MultipleNegativesRankingLoss(_NoModel())
    return lambda z1, z2: loss.compute_loss_from_embeddings([z1, z2], None)


def _clip(module) -> Callable[[Tensor, Tensor], Tensor]:
    loss, unit = module.ClipLoss(), nn.functional.normalize
    return lambda z1, z2: loss(unit(z1, dim=1), unit(z2, dim=1), 14.285714)


HOSTS = (
    Host("InfoNCE", ("info_nce", "info-nce-pytorch"), "info_nce", "info_nce", lambda m: m.InfoNCE(), 32, 128),
    Host(
        "SupConLoss", ("pytorch_metric_learning", "pytorch-metric-learning"), "pytorch_metric_learning.losses",
        "pytorch_metric_learning", _supervised, 32, 128,
    ),
    Host(
        "NTXentLoss", ("pytorch_metric_learning", "pytorch-metric-learning"), "pytorch_metric_learning.losses",
        "pytorch_metric_learning", _self_supervised, 32, 128, largest=256,  # a triple of indices for every negative
    ),
    Host(
        "MultipleNegativesRankingLoss", ("sentence_transformers", "sentence-transformers"),
        "sentence_transformers.sentence_transformer.losses", "sentence_transformers", _ranking, 64, 384,
    ),
    Host("ClipLoss", ("open_clip", "open_clip_torch"), "open_clip.loss", "open_clip", _clip, 64, 512),
    Host("NTXentLoss", ("lightly", "lightly"), "lightly.loss", "lightly", lambda m: m.NTXentLoss(), 256, 128),
    Host("DCLLoss", ("lightly", "lightly"), "lightly.loss", "lightly", lambda m: m.DCLLoss(), 256, 128),
)  # fmt: skip


def inputs_of(host: Host, batch: int, device: torch.device, seed: int = 0) -> Inputs:
    """A batch of pairs that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, host.dim, generator=generator)
    z1, z2 = (image + 0.5 * torch.randn(batch, host.dim, generator=generator) for _ in range(2))
    return Inputs(z1.to(device).requires_grad_(), z2.to(device).requires_grad_())


def call_of(index: int, who: str) -> Callable[[Inputs], Tensor]:
    """0-d loss of a batch, by the host or the adapter of HOSTS[index]."""
    loss = HOSTS[index].losses()[who]
    return lambda inputs: loss(inputs.z1, inputs.z2)


def hosts(device: Device, peak_mib: Callable[[int, str, int], float | None], seconds: float, quick: bool) -> int:
    """Print a line for every library and size; 1 if two losses differ, 2 if no library is there.

    peak_mib  of HOSTS[index], "host" or "adapter", at a batch
    """
    found = [(index, host) for index, host in enumerate(HOSTS) if host.is_there]
    if not found:
        print("No library whose losses have an adapter is installed.")
        return 2
    print(f"{'library':<30} {'loss':<29} {'B x D':>11}   {'its own':>19}   {'adapter':>19}   faster")
    wrong = 0
    for index, host in found:
        name = f"{host.package[1]} {version(host.package[1])}"
        for batch in _batches(host, quick):
            lines, ok = _row(device, index, host, batch, peak_mib, seconds)
            wrong += not ok
            print(f"{name:<30} {host.loss:<29} {f'{batch:,} x {host.dim}':>11}   {lines}", flush=True)
    return int(wrong > 0)


def _batches(host: Host, quick: bool) -> Iterator[int]:
    yield host.batch
    if not quick and min(host.largest, LARGE) > host.batch:
        yield min(host.largest, LARGE)


def _row(device: Device, index: int, host: Host, batch: int, peak_mib, seconds: float) -> tuple[str, bool]:
    calls = {who: call_of(index, who) for who in ("host", "adapter")}
    inputs = timing.rotation(device, lambda seed: inputs_of(host, batch, device.torch, seed))
    values = {who: call(inputs[0]).item() for who, call in calls.items()}
    if abs(values["host"] - values["adapter"]) > TOLERANCE * max(1.0, abs(values["host"])):
        return f"WRONG: {values['host']:.7g} there, {values['adapter']:.7g} here", False
    timings = timing.interleave(device, calls, inputs, seconds, timing.LEAST_ROUNDS[device.kind])
    cells = []
    for who in ("host", "adapter"):
        peak = peak_mib(index, who, batch)
        mib = "" if peak is None else f"{peak:,.1f} MiB"
        cells.append(f"{timing.quartiles(timings[who].total)[1]:6.2f} ms {mib:>10}")
    faster = timing.ratio(timings["host"], timings["adapter"])[1]
    return f"{cells[0]:>20}  {cells[1]:>20}  {faster:5.1f}x", True
