"""The CUDA backward on the machine; `make ptx ARGS=--all` runs every sweep under every schedule."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import checks, counts
from ptx.schedules import schedules

pytestmark = pytest.mark.skipif(checks.why_not("backward") is not None, reason=checks.why_not("backward") or "")
SWEEPS = checks.backwards()
OF_OTHER_SIZES = ("two views, ragged", "bf16, ids", "random, by columns")
PART = [k for k in SWEEPS if "features" not in k or k.split(", ", 1)[1] in OF_OTHER_SIZES]  # `make ptx` runs the others


@pytest.mark.parametrize("turn, name", list(enumerate(PART)), ids=PART)
def test_gradients_are_right(turn, name):
    """In every bit where rows are whole, otherwise within the error of rounded weights; the three schedules in turn."""
    checks.check_backward(SWEEPS[name], schedules(1)[turn % 3])


def test_a_second_run_has_the_same_bits():
    sweep = SWEEPS["random, two sets, both as anchors"]
    (first, _), (second, _) = (sweep.sweep(schedule) for schedule in schedules(9)[::9])
    assert first.tobytes() == second.tobytes()


def test_a_bad_coefficient_reaches_its_row_and_the_rows_it_weighs():
    """NaN of one anchor: its own gradient, and that of every row that is a negative of it."""
    sweep = SWEEPS["random, two views"]
    grad = sweep.row_grad.copy()
    grad[3] = np.nan
    got, _ = sweep._replace(row_grad=grad, col_grad=grad).sweep(schedules(0)[0])
    assert np.isnan(got[3]).all()
    positive = 3 + sweep.call.num_images
    assert np.isfinite(got[positive]).all() and np.isnan(np.delete(got, positive, 0)).all()


def test_a_tile_is_counted():
    """Products of both kinds and one exponential for two directions: 128x128 pairs of 64 features."""
    counted = counts.backward_counts(64)
    assert counted["products"] == 64 // 16 + 128 // 16 and counted["exponentials"] == 64
    assert counted["flops"] == 2 * 2 * 128 * 128 * 64 and counted["L2 bytes by TMA"] == 128 * 64 * 2 + 2 * 128 * 4
    assert counted["shared wavefronts"] == counted["shared wavefronts without conflicts"]
    assert counts.clocks(counted)["clocks of tensor cores"] == 1024
