"""Every fault of the table is noticed by what it says; `make ptx ARGS=--all` asks all schedules."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ptx import checks
from ptx.mutations import MUTATIONS
from ptx.schedules import schedules


@pytest.mark.parametrize(
    "turn, mutation", list(enumerate(MUTATIONS)), ids=[f"{m.program}: {m.fault}" for m in MUTATIONS]
)
def test_a_fault_is_noticed(turn, mutation):
    """One schedule each, in turn."""
    if reason := checks.why_not(mutation.program):
        pytest.skip(reason)
    schedule = schedules(1)[turn % 3]
    kind, words = checks.outcome(mutation, schedule)
    assert kind in mutation.expected(schedule.name).split("|"), f"{schedule}: {kind} {words}"


def test_the_table_holds_every_kind_of_fault():
    kinds = {kind for m in MUTATIONS for s in ("earliest", "latest", "random") for kind in m.expected(s).split("|")}
    assert kinds >= {
        "race",
        "proxy",
        "in flight",
        "uninitialised",
        "bounds",
        "alignment",
        "barrier",
        "deadlock",
        "result",
    }
