"""lightly and open_clip want torchvision: values and gradients that their own classes gave, with the versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contrastive_ext.adapters import lightly, open_clip

RECORDED = Path(__file__).parent / "recorded"
HOSTS = {"lightly": lightly, "open_clip": open_clip}
FILES = {name: json.loads((RECORDED / f"{name}.json").read_text()) for name in HOSTS}
CASES = [
    pytest.param(host, case, id=f"{found['package']} {found['version']} {case['loss']} {case['options']}")
    for host, found in FILES.items()
    for case in found["cases"]
]


def _assert_same(module, step: dict, rtol: float) -> None:
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in step["inputs"]]
    loss = module(*leaves)
    torch.testing.assert_close(loss, torch.tensor(step["value"], dtype=torch.float64), rtol=rtol, atol=rtol)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), step["gradients"], strict=True):
        expected: Tensor = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("host, case", CASES)
def test_values_and_gradients_are_the_hosts(host, case):
    module = getattr(HOSTS[host], case["loss"])(**case["options"])
    if "bank" not in case:
        return _assert_same(module, case, 1e-11)
    module.memory_bank.data.copy_(torch.tensor(case["bank"]))
    for step in case["steps"]:  # the second meets the keys of the first
        _assert_same(
            module, step, 8 * torch.finfo(torch.float32).eps / case["options"]["temperature"]
        )  # a float32 bank
