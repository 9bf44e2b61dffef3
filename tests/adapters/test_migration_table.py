"""Every line of the site's migration table runs as it stands, and importing contrastive_ext imports no adapter."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
TABLE = PAGE.split("| host | import | call |\n|---|---|---|\n")[1].split("\n\n")[0]
ROWS = [row.strip("| ").split(" | ") for row in TABLE.splitlines()]
# what cannot be called with tensors alone: whether the host that it needs is there
NO_TENSORS = {"sentence-transformers": "sentence_transformers", "Lightning": "pytorch_lightning"}


def _code(cell: str) -> str:
    return re.match(r"`([^`]*)`", cell)[1]


def _tensors() -> dict:
    def rows(n: int) -> torch.Tensor:
        return F.normalize(torch.randn(n, 128), dim=1).requires_grad_()

    names = ("query", "positive_key", "image_features", "text_features", "out0", "out1", "x", "embeddings", "ref_emb")
    features = F.normalize(torch.randn(8, 2, 128), dim=-1).requires_grad_()
    return {name: rows(8) for name in names} | {
        "negative_keys": rows(5), "y": rows(16), "features": features, "labels": torch.arange(8) // 2,
        "logit_scale": torch.tensor(14.3, requires_grad=True), "logit_bias": torch.tensor(-10.0, requires_grad=True),
    }  # fmt: skip


@pytest.mark.parametrize("host, imported, call", ROWS, ids=[row[0] for row in ROWS])
def test_line_runs(host, imported, call):
    if host.startswith("pytorch-metric"):
        pytest.importorskip("pytorch_metric_learning")
    if host in NO_TENSORS:
        pytest.importorskip(NO_TENSORS[host], reason=f"{host} is not installed (make test-hosts)")
    scope = _tensors()
    exec(_code(imported), scope)
    if "SelfSupervisedLoss" in call:
        exec("from pytorch_metric_learning.losses import SelfSupervisedLoss", scope)
    if host == "sentence-transformers":
        scope["model"] = nn.Linear(2, 2)
    if host == "Lightning":
        exec("from pytorch_lightning import Trainer", scope)
    result = eval(_code(call), scope)
    if host not in NO_TENSORS:
        assert result.shape == () and result.isfinite()
        result.backward()


def test_every_adapter_is_in_the_table():
    files = {path.stem for path in (ROOT / "contrastive_ext" / "adapters").glob("*.py")} - {"__init__", "hosts"}
    assert {re.search(r"adapters\.(\w+) import", imported)[1] for _, imported, _ in ROWS} == files


def test_importing_the_package_imports_no_adapter():
    code = "import sys, contrastive_ext; print([m for m in sys.modules if m.startswith('contrastive_ext.adapters')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "adapter, package",
    [("pytorch_metric_learning", "pytorch-metric-learning"), ("sentence_transformers", "sentence-transformers")],
)
def test_a_missing_host_is_one_sentence(adapter, package):
    code = f"import sys; sys.modules[{adapter!r}] = None; import contrastive_ext.adapters.{adapter}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this adapter subclasses") and f"pip install {package}" in last


@pytest.mark.parametrize("adapter", ["info_nce", "open_clip", "lightly", "supcon", "grad_cache"])
def test_adapters_without_subclasses_need_no_host(adapter):
    hosts = ["info_nce", "open_clip", "lightly", "pytorch_metric_learning", "sentence_transformers"]
    code = f"import sys; sys.modules |= dict.fromkeys({hosts}); import contrastive_ext.adapters.{adapter}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_extra_names_its_host():
    for adapter in ("pytorch_metric_learning", "sentence_transformers", "lightning"):
        assert importlib.util.find_spec(f"contrastive_ext.adapters.{adapter}") is not None
        extra = adapter.replace("_", "-")
        assert re.search(rf'^{extra} = \["{extra}>=', (ROOT / "pyproject.toml").read_text(), re.M)
