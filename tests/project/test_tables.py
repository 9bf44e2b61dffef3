"""A loss that lacks its test row or its bench row fails here; so does a user's own row loss that lacks a backend."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch

import contrastive_ext as ce
from bench.losses import LOSSES as BENCH_LOSSES
from repository import ROOT
from rows import LOSSES, RANKED, random_pairs

PUBLIC = {name for name in ce.__all__ if name.startswith("fused_") and name != "fused_row_loss"}
# losses over pairs share the tests of rows.py; a loss with another signature has a test file of its own
OVER_PAIRS = {name for name in PUBLIC if "layout" in inspect.signature(getattr(ce, name)).parameters}


def test_every_loss_over_pairs_has_a_test_row():
    assert {loss.function.__name__ for loss in LOSSES + RANKED} == OVER_PAIRS


def test_every_other_loss_has_a_test_file():
    for name in PUBLIC - OVER_PAIRS:
        short = name.removeprefix("fused_").removesuffix("_loss")
        tests = ROOT / "tests" / "losses" / f"test_{short}.py"
        assert tests.is_file() and name in tests.read_text()


def test_every_public_loss_has_a_bench_row():
    assert set(BENCH_LOSSES) == PUBLIC


def test_every_public_loss_has_a_module():
    modules = {name.lower() for name in ce.__all__ if name.endswith("Loss")}
    for name in PUBLIC:
        assert name.removeprefix("fused_").replace("_", "") in modules
        shown = inspect.signature(getattr(ce, name)).parameters
        assert {"temperature", "logit_scale"} & set(shown)
        assert {"normalize", "reduction", "return_stats", "backend"} <= set(shown)


def test_every_loss_over_pairs_shows_every_option():
    for loss in LOSSES + RANKED:
        assert issubclass(loss.module, ce.RowLossModule)
        shown = inspect.signature(loss.function).parameters
        assert {"z1", "z2", "temperature", "logit_scale", "layout", "queue", "negatives", "in_batch_negatives"} <= set(
            shown
        )
        assert {"normalize", "reduction", "return_stats", "backend"} <= set(shown)
        assert "options" not in shown


def test_every_public_name_is_documented():
    for name in ce.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(ce, name)), name


@dataclass(frozen=True)
class Hinge(ce.RowLoss):
    """A made-up loss: how far the soft maximum of the negatives is above the positive minus a margin."""

    margin: float = 0.2

    def from_stats(self, stats):
        (lse,) = stats.lse
        return torch.relu(lse - stats.count.log() - stats.pos + self.margin * stats.scale)


def test_a_users_row_loss_runs_on_every_backend(run):
    backend, device = run
    results = []
    for name in (backend, "reference"):
        z1, z2 = (z.requires_grad_() for z in random_pairs(11, 6, torch.float64, device))
        torch.manual_seed(1)
        z1, z2 = (torch.randn(11, 6, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
        loss = ce.fused_row_loss(Hinge(0.5), z1, z2, 0.3, backend=name)
        results.append([loss.detach(), *torch.autograd.grad(loss, (z1, z2))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert ce.RowLossModule(Hinge(0.5), 0.3)(z1, z2).item() > 0


def _documented(function) -> dict[str, str]:
    """What a docstring says of each argument, and of what is returned, raised and needed."""
    said, name = {}, None
    for line in inspect.getdoc(function).splitlines():
        entry = re.match(r"(\w[\w, ]*?)  +(\S.*)", line)
        name = entry[1] if entry else name if line.startswith("  ") else None
        if name is not None:
            said[name] = f"{said[name]} {line.strip()}" if name in said else entry[2]
    return said


def test_docstrings_say_the_same_of_the_same():
    """Each loss is read by itself, in an editor too: what several take is written out in each, in the same words."""
    over_pairs = [_documented(loss.function) for loss in {loss.function: loss for loss in LOSSES + RANKED}.values()]
    assert all(
        words >= {"z1, z2", "temperature", "Returns", "Raises", "Memory", "Paper"} for words in map(set, over_pairs)
    )
    for name in ("z1, z2", "temperature", "tau_plus", "positives", "options", "Returns", "Raises"):
        first_clauses = {re.split(r"[;.] ", said[name])[0] for said in over_pairs if name in said}
        assert len(first_clauses) == 1, (name, first_clauses)
