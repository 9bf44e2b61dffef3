"""Ids and labels: any integer a caller may use is an ordinary one, the three that mean padding are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import contrastive_ext as ce
from contrastive_ext.problem.pairs import LARGEST_RESERVED_ID, NO_COLUMN_ID, NO_ROW_ID, UNFILLED

B, D = 6, 4
LOWEST, HIGHEST = LARGEST_RESERVED_ID + 1, torch.iinfo(torch.int64).max
ORDINARY = torch.tensor([0, 1, 2, 1, 3, 0])
EXTREME = torch.tensor([LOWEST, HIGHEST, HIGHEST - 1, HIGHEST, LOWEST + 1, LOWEST])  # the same classes


def _calls(device) -> dict[str, Callable]:
    """Name -> f(integers [B], **options), everything that takes integers."""
    generator = torch.Generator().manual_seed(5)
    z1, z2 = torch.randn(2, B, D, generator=generator, dtype=torch.float64).to(device)
    keys, views = z1.flip(0), torch.stack([z1, z2])

    def queue(ids: Tensor) -> ce.NegativeQueue:
        queue = ce.NegativeQueue(B + 3, D, dtype=torch.float64, device=device)
        queue.enqueue(keys, ids)
        return queue

    return {
        "ids": lambda x, **o: ce.fused_infonce_loss(z1, z2, 0.3, ids=x, **o),
        "labels": lambda x, **o: ce.fused_debiased_loss(z1, z2, 0.3, labels=x, layout="symmetric", **o),
        "one_way": lambda x, **o: ce.fused_hard_negative_loss(z1[:4], z2, 0.3, ids=x, layout="one_way", **o),
        "ranked": lambda x, **o: ce.fused_bayesian_loss(z1, z2, 0.3, ids=x, queue=keys, **o),  # a side without ids
        "columns": lambda x, **o: ce.fused_infonce_loss(z1, z2, 0.3, ids=x.flip(0), queue=ce.Columns(keys, ids=x), **o),
        "queue": lambda x, **o: ce.fused_infonce_loss(z1, z2, 0.3, ids=x.flip(0), queue=queue(x), **o),
        "supcon out": lambda x, **o: ce.fused_supcon_loss(views, x, 0.3, "out", **o),
        "supcon in": lambda x, **o: ce.fused_supcon_loss(views, x, 0.3, "in", **o),
        "fnc": lambda x, **o: ce.fused_false_negative_loss(views, 0.3, labels=x, queue=queue(x), top_k=3, **o),
        "fnc, threshold": lambda x, **o: ce.fused_false_negative_loss(
            views, 0.3, labels=x, queue=queue(x), top_k=None, threshold=0.1, **o
        ),
    }


CALLS = list(_calls("cpu"))


@pytest.mark.parametrize("name", CALLS)
def test_the_ends_of_int64_are_ordinary(run, name):
    """Loss, and statistics: those of FNC once asked for labels + 1."""
    backend, device = run
    call = _calls(device)[name]
    for chosen in (backend, "reference"):
        loss, stats = call(EXTREME.to(device), return_stats=True, backend=chosen)
        expected, expected_stats = call(ORDINARY.to(device), return_stats=True, backend=chosen)
        assert torch.equal(loss, expected)
        assert stats.to_dict() == expected_stats.to_dict(), chosen


@pytest.mark.parametrize("name", CALLS)
def test_a_column_of_integers_of_any_type_is_a_vector(run, name):
    backend, device = run
    call = _calls(device)[name]
    expected = call(ORDINARY.to(device), backend=backend)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(call(ORDINARY.to(device, dtype)[:, None], backend=backend), expected)
    with pytest.raises(ValueError, match=r"must be integers \[6\] on .*\[1, 6\]"):
        call(ORDINARY.to(device)[None], backend=backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("reserved", [UNFILLED, NO_ROW_ID, NO_COLUMN_ID])
def test_what_means_padding_is_refused(name, reserved):
    """An image with the smallest int64 as its id was nobody's negative."""
    bad = ORDINARY.clone()
    bad[2] = reserved
    with pytest.raises(ValueError, match=rf"(ids|labels)( of queue)? must be above -2\^63 \+ 2.*got {reserved}"):
        _calls("cpu")[name](bad)


def test_labels_for_alpha_are_a_vector():
    z, labels = torch.randn(12, 3), torch.arange(12) % 3
    assert ce.estimate_alpha(z, labels[:, None]) == ce.estimate_alpha(z, labels)


@pytest.mark.parametrize("given, says", [("ids", "ids must"), ("labels", "labels must")])
def test_errors_speak_of_the_keyword_that_was_given(given, says):
    z = torch.randn(3, 2)
    for bad in (torch.zeros(4, dtype=torch.int64), torch.zeros(3), torch.full((3,), UNFILLED)):
        with pytest.raises(ValueError, match=f"^{says}"):
            ce.fused_infonce_loss(z, z, **{given: bad})
    with pytest.raises(TypeError, match=f"^{says} be a tensor; got list"):
        ce.InfoNCELoss()(z, z, **{given: [0, 1, 2]})
