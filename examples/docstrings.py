"""False negatives in real text: docstrings and code of Python's standard library, with and without cancellation.

    python -m examples.docstrings               from the top folder: two minutes on two cores
    python -m examples.docstrings --seeds 1 --steps 60

A pair is the first paragraph of a function's docstring and the function's code, read from the installed standard
library with `ast`. Functions whose paragraphs are equal word for word are false negatives of each other, and known:
their ids are equal. Two bags of words are trained against each other four ways: InfoNCE as it is, with the known ones
cancelled by `ids`, and with detected ones eliminated or attracted (FNC). Then, on functions unseen in training:

    loss        InfoNCE, equal docstrings cancelled
    retrieval   mean reciprocal rank of a function's code for its docstring; equal docstrings count as one
    few-shot    which of the ten largest modules a function is from, by the nearest mean of 5 functions of each

and, on the training set, how many of the known false negatives detection finds. The picture shows both.
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext as ce
from bench.report import Progress

BUCKETS, FEATURES = 2**14, 128  # of the hashed vocabulary, of the embedding
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
KEPT_WORDS = 0.7  # a view drops the others at random
MODULES, SHOTS, DRAWS = 10, 5, 50
TOP_K, THRESHOLD = 4, 0.8
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
METHODS = ("InfoNCE", "known cancelled", "FNC eliminate", "FNC attract")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\s\w]")
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip"}


@dataclass(frozen=True)
class Corpus:
    """Words of every docstring and of every code as bucket numbers, the id of its docstring, its module."""

    docstrings: list[Tensor]
    codes: list[Tensor]
    ids: Tensor
    modules: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rarity(self) -> Tensor:
        """[BUCKETS] log of the inverse share of texts with the word."""
        texts = [text.unique() for text in (*self.docstrings, *self.codes)]
        return torch.log(len(texts) / torch.bincount(torch.cat(texts), minlength=BUCKETS).clamp(min=1))


@dataclass(frozen=True)
class Outcome:
    """One trained pair of encoders: loss, retrieval, few-shot accuracy, what the loss's statistics say of detection."""

    loss: float
    retrieval: float
    few_shot: float
    curve: dict[float, tuple[float, float]]  # threshold -> precision, recall on the training set


def texts(folder: Path) -> list[tuple[str, str, str]]:
    """Docstring, code and module of every function with all three in the Python files below `folder`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        if _SKIPPED.isdisjoint(inside):
            found += [(docstring, code, inside[0].removesuffix(".py")) for docstring, code in _pairs(path)]
    return found


def mine(folder: Path) -> Corpus:
    """Pairs of docstring and code in the Python files below `folder`."""
    docstrings, codes, modules = zip(*texts(folder), strict=True)
    numbers = {text: i for i, text in enumerate(dict.fromkeys(docstrings))}
    module_numbers = {name: i for i, (name, _) in enumerate(Counter(modules).most_common())}
    return Corpus(
        [words_of(text) for text in docstrings],
        [words_of(text) for text in codes],
        torch.tensor([numbers[text] for text in docstrings]),
        torch.tensor([module_numbers[name] for name in modules]),
    )


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        code = "\n".join(ast.unparse(statement) for statement in node.body[1:])
        if len(docstring.split()) >= 3 and len(code) >= 40:
            pairs.append((docstring, code))
    return pairs


def words_of(text: str) -> Tensor:
    """Its words as bucket numbers."""
    return torch.tensor([zlib.crc32(word.lower().encode()) % BUCKETS for word in _WORD.findall(text)] or [0])


class TwoTowers(nn.Module):
    """Docstrings and codes as sums of the same word vectors, rare words weighing more, and a layer for each."""

    rarity: Tensor

    def __init__(self, rarity: Tensor):
        super().__init__()
        self.register_buffer("rarity", rarity)
        self.words = nn.EmbeddingBag(BUCKETS, FEATURES, mode="sum")
        layers = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(2)]
        for layer in layers:  # at first both towers agree on texts that share words
            nn.init.eye_(layer.weight)
        self.layers = nn.ModuleList(layers)

    def forward(self, side: int, texts: list[Tensor], kept: float = 1.0) -> Tensor:
        """[len(texts), FEATURES]; side 0 for docstrings, 1 for codes; a share `kept` of the words counts."""
        words, lengths = torch.cat(texts), torch.tensor([0] + [len(text) for text in texts[:-1]])
        weights = self.rarity[words] * (torch.rand(len(words)) < kept)
        return self.layers[side](self.words(words, lengths.cumsum(0), per_sample_weights=weights))


def loss_of(method: str, docstrings: Tensor, codes: Tensor, ids: Tensor) -> Tensor:
    """The one line that differs."""
    if method == "InfoNCE":
        return ce.fused_infonce_loss(docstrings, codes, TEMPERATURE)
    if method == "known cancelled":
        return ce.fused_infonce_loss(docstrings, codes, TEMPERATURE, ids=ids)
    mode: Literal["eliminate", "attract"] = "eliminate" if method == "FNC eliminate" else "attract"
    views = torch.stack([docstrings, codes])
    return ce.fused_false_negative_loss(views, TEMPERATURE, mode=mode, top_k=TOP_K, threshold=THRESHOLD)


def train(method: str, corpus: Corpus, seed: int, steps: int, batch: int) -> Outcome:
    """Train one pair of encoders on four fifths of the docstrings, judge it on the others."""
    torch.manual_seed(seed)
    held_out = torch.randperm(int(corpus.ids.max()) + 1)[corpus.ids] % 5 == 0  # equal docstrings stay together
    seen, unseen = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    encoder = TwoTowers(corpus.rarity())
    optimizer = torch.optim.Adam(encoder.parameters(), LEARNING_RATE)

    def encode(which: Tensor, kept: float = 1.0) -> tuple[Tensor, Tensor]:
        docstrings, codes = ([texts[i] for i in which.tolist()] for texts in (corpus.docstrings, corpus.codes))
        return encoder(0, docstrings, kept), encoder(1, codes, kept)

    for _ in range(steps):
        which = seen[torch.randperm(len(seen))[:batch]]
        loss = loss_of(method, *encode(which, KEPT_WORDS), corpus.ids[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return Outcome(
            float(ce.fused_infonce_loss(*encode(unseen), TEMPERATURE, ids=corpus.ids[unseen])),
            _retrieval(*encode(unseen), corpus.ids[unseen]),
            _few_shot(torch.cat([F.normalize(z, dim=1) for z in encode(unseen)], 1), corpus.modules[unseen]),
            _detection(torch.stack(encode(seen, KEPT_WORDS)), corpus.ids[seen]),
        )


def _retrieval(docstrings: Tensor, codes: Tensor, ids: Tensor) -> float:
    similarity = F.normalize(docstrings, dim=1) @ F.normalize(codes, dim=1).T
    right = ids[:, None] == ids
    best_right = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    rank = 1 + (similarity.masked_fill(right, -torch.inf) > best_right).sum(1)
    return float((1 / rank).mean())


def _few_shot(features: Tensor, modules: Tensor) -> float:
    sizes = torch.bincount(modules)
    large = sizes.argsort(descending=True)[:MODULES]
    large = large[sizes[large] > SHOTS]
    modules = (modules[:, None] == large).long() @ torch.arange(1, len(large) + 1) - 1  # -1: of a small module
    features, modules = features[modules >= 0], modules[modules >= 0]
    generator = torch.Generator().manual_seed(0)
    accuracies = []
    for _ in range(DRAWS):
        order = torch.randperm(len(modules), generator=generator)
        examples = torch.stack([order[modules[order] == m][:SHOTS] for m in range(len(large))])
        test = torch.ones_like(modules, dtype=torch.bool)
        test[examples.flatten()] = False
        guess = (features @ F.normalize(features[examples].mean(1), dim=1).T).argmax(1)
        accuracies.append((guess == modules)[test].double().mean())
    return float(torch.stack(accuracies).mean())


def _detection(views: Tensor, ids: Tensor) -> dict[float, tuple[float, float]]:
    curve = {}
    for threshold in THRESHOLDS:
        _, stats = ce.fused_false_negative_loss(
            views, TEMPERATURE, top_k=TOP_K, threshold=threshold, labels=ids, return_stats=True
        )
        shares = stats.to_dict()
        curve[threshold] = (shares["precision"], shares["recall"])
    return curve


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Outcome]]:
    """Train every method with every seed; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each method")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--picture", type=Path, default=Path("docstrings.png"))
    options = parser.parse_args(arguments)
    corpus = mine(options.sources)
    copies = torch.bincount(corpus.ids)[corpus.ids]
    print(f"{len(corpus)} functions; {int((copies > 1).sum())} share their docstring with another one")
    outcomes: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    with Progress(options.seeds * len(METHODS)) as progress:
        for seed in range(options.seeds):
            for method in METHODS:
                progress.say(f"{method}, seed {seed}")
                outcomes[method].append(train(method, corpus, seed, options.steps, options.batch))
                last = outcomes[method][-1]
                progress.finish(f"{method}, seed {seed}: retrieval {last.retrieval:.3f}, few-shot {last.few_shot:.3f}")
    _show(outcomes, options.seeds)
    _draw(outcomes, options.picture)
    return outcomes


def _show(outcomes: dict[str, list[Outcome]], seeds: int) -> None:
    print(f"\nunseen functions, mean +- standard deviation over {seeds} seeds; detection at {THRESHOLD} on the others")
    print(f"{'':18}{'loss':>18}{'retrieval MRR':>18}{f'{SHOTS}-shot module':>18}{'precision':>12}{'recall':>10}")
    for method, runs in outcomes.items():
        precision, recall = torch.tensor([run.curve[THRESHOLD] for run in runs]).mean(0).tolist()
        cells = [_spread([getattr(run, name) for run in runs]) for name in ("loss", "retrieval", "few_shot")]
        print(f"{method:18}{cells[0]:>18}{cells[1]:>18}{cells[2]:>18}{precision:12.2f}{recall:10.2f}")


def _spread(values: list[float]) -> str:
    x = torch.tensor(values)
    return f"{x.mean():.3f} +- {x.std():.3f}" if len(x) > 1 else f"{x.mean():.3f}"


def _draw(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print('no picture: matplotlib is missing (pip install "contrastive_ext[bench]")')
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, runs in outcomes.items():
        curve = torch.tensor([[run.curve[t] for t in THRESHOLDS] for run in runs]).mean(0)
        left.plot(curve[:, 1], curve[:, 0], marker="o", markersize=3, label=method)
    left.set(xlabel="recall of equal docstrings", ylabel="precision", title=f"Detection, top {TOP_K}, by threshold")
    left.legend(frameon=False)
    values = torch.tensor([[run.retrieval for run in runs] for runs in outcomes.values()])
    spread = values.std(1) if values.shape[1] > 1 else torch.zeros(len(values))
    right.barh(METHODS, values.mean(1), xerr=spread, color="#0b6fb8")
    right.invert_yaxis()
    right.set(xlabel="mean reciprocal rank", title="Retrieval of unseen code by its docstring")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
