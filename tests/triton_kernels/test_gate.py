"""The static gate on a few kernels; `make gate` compiles all of them. Needs Triton and Linux, no GPU."""

from __future__ import annotations

import pytest

from repository import load_tool

triton = pytest.importorskip("triton", reason="Triton is not installed.")

gate = load_tool("gate")

INTERPRETED = not isinstance(gate.kernel_of(gate.Case("forward", "plain", "16-bit", 128, 80))[0], triton.JITFunction)
FEW = [
    gate.Case("forward", "plain", "16-bit", 128, 80),
    gate.Case("forward", "clip", "16-bit", 128, 90),
    gate.Case("forward", "plain", "16-bit", 1024, 100),
    gate.Case("backward", "plain", "16-bit", 128, 90),
    gate.Case("backward", "plain", "tf32", 128, 100),
    gate.Case("backward", "hard", "16-bit", 1024, 90),
    gate.Case("backward", "plain", "fp64", 64, 86),
    gate.Case("prologue", "plain", "ieee", 128, 90),
    gate.Case("prologue", "hard", "bf16", 128, 90),
    gate.Case("row_losses", "small", "16-bit", 128, 90),
    gate.Case("backward", "lists", "16-bit", 128, 90),
    gate.Case("backward", "ranked", "16-bit", 128, 90),
    gate.Case("forward", "stats", "16-bit", 128, 90),
    gate.Case("histogram", "sums+images", "16-bit", 128, 90),
    gate.Case("top_columns", "plain", "tf32", 128, 80),
    gate.Case("forward", "softplus", "16-bit", 128, 80),
    gate.Case("backward", "softplus+ids", "16-bit", 128, 90),
]


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler.")
@pytest.mark.parametrize("case", FEW, ids=str)
def test_kernel_compiles_without_spills_to_tensor_core_code(case):
    assert gate.examine(case).faults == []


def test_gate_covers_every_line_of_the_table():
    """Entries of sm_86 for TF32 differ from sm_80 in size only."""
    compiled = {(c.direction, c.products, c.features, c.architecture) for c in gate.cases()}
    for direction in gate.configs.DIRECTIONS:
        for features in gate.configs.FEATURES:
            assert {(direction, "16-bit", features, a) for a in gate.configs.ARCHITECTURES} <= compiled
            assert {(direction, "tf32", features, a) for a in gate.configs.ARCHITECTURES if a != 86} <= compiled
            assert {(direction, products, features, 86) for products in ("ieee", "fp64")} <= compiled


def test_every_architecture_has_a_tile():
    for architecture in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        assert gate.configs.nearest(architecture) in gate.configs.ARCHITECTURES


def test_a_few_lines_are_written_into_the_table_not_in_place_of_it():
    names = [gate.name_in_table(case) for case in gate.cases()]
    assert len(set(names)) == len(names)
    kept = gate.table({name: f"{name} old |" for name in names[:5]})
    written = gate.table({names[2]: f"{names[2]} new |", names[6]: f"{names[6]} new |"}, kept).splitlines()
    expected = [f"{names[i]} {'new' if i in (2, 6) else 'old'} |" for i in (0, 1, 2, 3, 4, 6)]
    assert written[2:] == expected
    for path in gate.COMPILED.iterdir():  # the tables that are kept are made of such lines, of cases there are
        assert {gate.name_of_line(line) for line in path.read_text().splitlines()[2:]} <= set(names)
