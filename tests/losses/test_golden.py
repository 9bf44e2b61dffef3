"""The authors' released code, run in float64: losses and gradients match to 1e-10 of the largest value."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
import golden_files

FUNCTIONS = {
    "infonce": ce.fused_infonce_loss,
    "dcl": ce.fused_debiased_loss,
    "hcl": ce.fused_hard_negative_loss,
    "bcl": ce.fused_bayesian_loss,
}
CASES = [(family, case) for family in FUNCTIONS for case in golden_files.cases(family)]


@pytest.mark.parametrize("family, case", CASES, ids=[f"{f}-{c['case']}" for f, c in CASES])
def test_matches_released_code(run, family, case):
    backend, device = run
    _check(family, case, backend, device)


@pytest.mark.parametrize("family, case", CASES, ids=[f"{f}-{c['case']}" for f, c in CASES])
def test_reference_matches_released_code(family, case):
    _check(family, case, "reference", torch.device("cpu"))


def _check(family, case, backend, device):
    golden = golden_files.load(family, case)
    z1, z2 = (golden[k].to(device).requires_grad_() for k in ("z1", "z2"))
    loss = FUNCTIONS[family](z1, z2, case["t"], normalize=False, backend=backend, **golden_files.parameters(case))
    loss.backward()
    _assert_matches(loss, golden["loss"], case)
    _assert_matches(z1.grad, golden["grad_z1"], case)
    _assert_matches(z2.grad, golden["grad_z2"], case)


def _assert_matches(ours: torch.Tensor, expected: torch.Tensor, case: dict) -> None:
    # the released formula -log(p / (p + Ng)) of a converged row is itself good to an ulp of its logits only
    own_error = 4 * torch.finfo(torch.float64).eps / min(1.0, case["t"])
    difference = (ours.detach().cpu() - expected).abs().max().item()
    assert difference <= 1e-10 * expected.abs().max().item() + own_error


@pytest.mark.parametrize("family, case", CASES, ids=[f"{f}-{c['case']}" for f, c in CASES])
def test_row_losses_match_the_recorded_reference(run, family, case):
    backend, device = run
    golden = golden_files.load(family, case)
    z1, z2 = golden["z1"].to(device), golden["z2"].to(device)
    rows = FUNCTIONS[family](
        z1, z2, case["t"], normalize=False, reduction="none", backend=backend, **golden_files.parameters(case)
    )
    _assert_matches(rows, golden["ref_row_loss"], case)
