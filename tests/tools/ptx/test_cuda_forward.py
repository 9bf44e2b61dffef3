"""The CUDA forward on the machine; `make ptx ARGS=--all` runs every call under every schedule."""

from __future__ import annotations

import re

import pytest
from ptx import checks, counts, kernels
from ptx.errors import PtxError
from ptx.mutations import MUTATIONS
from ptx.schedules import schedules

pytestmark = pytest.mark.skipif(checks.why_not("forward") is not None, reason=checks.why_not("forward") or "")
CALLS = checks.forwards()


@pytest.mark.parametrize("turn, name", list(enumerate(CALLS)), ids=list(CALLS))
def test_statistics_are_right(turn, name):
    """Values and counts, exactly where scores are whole; the three schedules in turn."""
    checks.check_forward(CALLS[name], schedules(1)[turn % 3])


@pytest.mark.parametrize("schedule", schedules(1), ids=str)
def test_a_second_run_has_the_same_bits(schedule):
    call = CALLS["running maximum and ids"]
    first, second = call.run(schedule), call.run(schedules(9)[-1])
    assert [x.tobytes() for x in first[0]] == [x.tobytes() for x in second[0]]


def test_an_error_names_instruction_thread_and_source_line():
    mutation = next(m for m in MUTATIONS if m.fault == "they arrive before their products are over")
    kind, words = checks.outcome(mutation, schedules(0)[0])
    assert kind == "race" and "cp.async.bulk.tensor.2d" in words
    assert re.search(r"from .*tma\.cuh:\d+\n  block \(0, 0, 0\), warp 8, threads 256 to 256", words), words


def test_columns_cost_28_exchanges_and_no_exponentials():
    """A tile of 128x128 pairs without a shift: rows and columns add up the same 64 exponentials of a thread."""
    rows, both = counts.forward_counts(64), counts.forward_counts(64, columns=True)
    assert rows["exponentials"] == both["exponentials"] == 64
    assert rows["shuffles"] == 0 and both["shuffles"] == 28
    assert both["shared wavefronts"] == both["shared wavefronts without conflicts"] == 8 * 4 + 4 * 8
    assert both["global bytes stored"] == 3 * 128 * 4


def test_a_second_run_of_columns_has_the_same_bits():
    call = CALLS["columns, running maximum, ids and padding"]
    first, second = (call.run(schedule)[0] for schedule in schedules(9)[::9])
    assert [x.tobytes() for x in first] == [x.tobytes() for x in second]


def test_a_call_that_the_driver_would_refuse_is_refused():
    call = checks.Forward(checks.whole_rows(16), checks.whole_rows(0))
    with pytest.raises(PtxError, match="sizes must be 1"):
        call.sweep(schedules(0)[0])


def test_one_kernel_of_a_text_is_cut_out():
    text = kernels.only_entry(kernels.forward_ptx(), kernels.entry_of(128, True))
    assert text.count(".entry") == 1 and ".bf16.bf16" in text and ".f16.f16" not in text
