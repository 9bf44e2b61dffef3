"""An encoder that makes all vectors equal: no positive is above a negative, however the products round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import contrastive_ext as ce
from contrastive_ext import numerics
from rows import LOSSES, RANKED

B = 24
LAYOUTS = {
    "two_view": lambda key: {},
    "one_way": lambda key: {"layout": "one_way"},
    "symmetric": lambda key: {"layout": "symmetric"},
    "queue": lambda key: {"queue": key.expand(30, -1)},
    "own negatives": lambda key: {"layout": "one_way", "negatives": key.expand(B, 3, -1)},
}


def _same(dim: int, dtype: torch.dtype, device) -> Tensor:
    return (3 * torch.randn(dim, dtype=torch.float64)).to(device, dtype).expand(B, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_accuracy_is_0(run, dtype, layout):
    """Once 0, .75, .875 or 1 with the number of features, the dtype and the backend."""
    name, device = run
    for dim in (1, 2, 5, 16, 33, 128, 300):
        for normalize in (True, False):
            z = _same(dim, dtype, device)
            key = z[:1].to(numerics.stats_dtype(dtype))
            key = (numerics.normalize(key) if normalize else key).to(dtype)  # what a row is rounded to
            options = {"normalize": normalize, "return_stats": True} | LAYOUTS[layout](key)
            for backend in (name, "reference"):
                _, stats = ce.fused_infonce_loss(z, 1 * z, 0.2, backend=backend, **options)
                assert stats.accuracy == 0.0, (dim, normalize, backend)


@pytest.mark.parametrize("loss", LOSSES + RANKED, ids=lambda x: x.name)
def test_accuracy_of_every_loss_is_0(run, loss):
    name, device = run
    z = _same(45, torch.float32, device)
    for backend in (name, "reference"):
        _, stats = loss.function(z, 1 * z, return_stats=True, backend=backend, **loss.parameters, **loss.vectors(z))
        assert stats.accuracy == 0.0, backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_among_keys_is_0(run, dtype):
    name, device = run
    for dim in (2, 16, 33, 128):
        z = _same(dim, dtype, device)
        queue = numerics.normalize(z[:7])
        for backend in (name, "reference"):
            _, stats = ce.fused_self_labeling_loss(z, 1 * z, queue, return_stats=True, backend=backend)
            assert stats.accuracy == 0.0, (dim, backend)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_a_positive_that_is_closer_by_little_counts(run, length):
    """What is above rounding is above, for vectors of any length: one part in 10,000 in float32."""
    name, device = run
    z1 = torch.eye(B, device=device) * length
    z2 = (torch.ones(B, B, device=device) + 1e-4 * torch.eye(B, device=device)) * length
    for backend in (name, "reference"):
        for normalize in (True, False):
            options = {"layout": "one_way", "normalize": normalize, "return_stats": True}
            _, stats = ce.fused_infonce_loss(z1, z2, 0.2, backend=backend, **options)
            assert stats.accuracy == 1.0, (backend, normalize)
