"""How large a batch of sentence pairs fits: peak memory of a training step with and without a gradient cache.

    python -m examples.large_batch              from the top folder: some minutes on two cores
    python -m examples.large_batch --batches 64 --chunk 16

A pair is a docstring and the code below it, mined from Python's standard library; the encoder is a transformer of
MiniLM's shape (6 layers, 384 wide), with random weights: memory and time do not ask what was learned. Each step, loss
and backward, runs in a process of its own. Value and norm of the gradient are printed: the cache does not change them.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import contrastive_ext as ce
from examples.docstrings import BUCKETS, mine

LAYERS, WIDTH, HEADS, TOKENS = 6, 384, 12, 32
SCALE = 20.0  # 1/temperature
METHODS = ("plain", "cached")


class Step(NamedTuple):
    """What a step cost, and what it computed."""

    mib: float  # growth of the peak, gradients included
    seconds: float
    value: float
    gradient: float  # norm


class Encoder(nn.Module):
    """Mean of a transformer's outputs over the words; padding is bucket BUCKETS."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS + 1, WIDTH, padding_idx=BUCKETS)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == BUCKETS
        hidden = self.layers(self.words(words), src_key_padding_mask=padding)
        return hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


def loss_of(method: str, encoder: nn.Module, docstrings: Tensor, codes: Tensor, chunk: int) -> Tensor:
    """The line that differs."""
    if method == "plain":
        return ce.fused_infonce_loss(encoder(docstrings), encoder(codes), logit_scale=SCALE, layout="one_way")
    cache = ce.GradientCache(ce.fused_infonce_loss, chunk)
    return cache(encoder, docstrings, codes, logit_scale=SCALE, layout="one_way")


def padded(texts: Sequence[Tensor]) -> Tensor:
    """[len(texts), TOKENS] the first words of each."""
    words = torch.full((len(texts), TOKENS), BUCKETS)
    for row, text in zip(words, texts, strict=True):
        row[: len(text)] = text[:TOKENS]
    return words


def measured(method: str, docstrings: Tensor, codes: Tensor, chunk: int, threads: int) -> Step:
    """One step of this process; a small one before it, so that libraries are loaded."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder = Encoder().eval()  # without dropout, so that both methods compute the same
    loss_of(method, encoder, docstrings[:2], codes[:2], chunk).backward()
    encoder.zero_grad()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _resident_mib("VmRSS"), time.perf_counter()
    value = loss_of(method, encoder, docstrings, codes, chunk)
    value.backward()
    seconds = time.perf_counter() - start
    gradient = torch.stack([p.grad.norm() for p in encoder.parameters() if p.grad is not None]).norm()
    return Step(_resident_mib("VmHWM") - before, seconds, value.item(), gradient.item())


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(field + r":\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[int, Step]]:
    """Measure every method at every batch; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="numbers of pairs")
    parser.add_argument("--plain-up-to", type=int, default=512, help="larger batches with the cache only")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--picture", type=Path, default=Path("large_batch.png"))
    options = parser.parse_args(arguments)
    corpus = mine(options.sources)
    if max(options.batches) > len(corpus):
        parser.error(f"{options.sources} has {len(corpus)} pairs; a batch of {max(options.batches)} needs more.")
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # freed blocks go back to the system: the peak is what was held
    steps: dict[str, dict[int, Step]] = {method: {} for method in METHODS}
    print(f"{'pairs':>6} {'':8}{'MiB':>8}{'seconds':>9}{'loss':>10}{'|gradient|':>12}")
    for batch in options.batches:
        sides = [padded([texts[i] for i in order[:batch]]) for texts in (corpus.docstrings, corpus.codes)]
        for method in METHODS:
            if method == "plain" and batch > options.plain_up_to:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                step = pool.apply(measured, (method, *sides, options.chunk, torch.get_num_threads()))
            steps[method][batch] = step
            cost = f"{step.mib:8.0f}{step.seconds:9.1f}"
            print(f"{batch:6} {method:8}{cost}{step.value:10.5f}{step.gradient:12.5f}", flush=True)
    _draw(steps, options.chunk, options.picture)
    return steps


def _draw(steps: dict[str, dict[int, Step]], chunk: int, path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no picture: matplotlib is missing (pip install "contrastive_ext[bench]")')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for method, label in zip(METHODS, ("plain", f"gradient cache, chunks of {chunk}"), strict=True):
        axes.plot(list(steps[method]), [step.mib for step in steps[method].values()], marker="o", label=label)
    axes.set(xlabel="pairs in the batch", ylabel="peak of a step, MiB", title="A transformer of MiniLM's shape")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
