"""The Hopper kernels compile for sm_90a to what was meant; needs nvcc and cuobjdump, no GPU."""

from __future__ import annotations

import pytest

from repository import load_tool

cuda_gate = load_tool("cuda_gate")

NVCC, CUOBJDUMP = cuda_gate.find_nvcc(), cuda_gate.find_cuobjdump()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found (CUDA_HOME, PATH).")


@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found (PATH, Triton's wheel).")
def test_kernels_use_wgmma_and_tma_and_spill_nothing():
    kernels, faults = cuda_gate.examine(NVCC, CUOBJDUMP)
    assert faults == []
    swept = {k.name for k in kernels if k.has_tiles}
    assert swept == {f"{name} {operand}" for name in cuda_gate.LOOPS for operand in ("fp16", "bf16")}


@needs_nvcc
def test_the_ladder_for_the_first_run_on_hardware_compiles(tmp_path):
    """tests/csrc/cuda/ladder.cu is run by `make gpu`; here only the compiler sees it."""
    cuda_gate.compile_ladder(NVCC, "-c", "-o", str(tmp_path / "ladder.o"))


@pytest.mark.parametrize(
    "flaw, says",
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 4}, "4 of spills"),
        ({"registers": 241}, "241 registers > 240"),
        ({"producer": 25}, "25 > 24 of a producer"),
        ({"counts": {"HGMMA": 0, "UTMALDG": 4, "UBLKCP": 1, "STL": 0, "LDL": 0}}, "0 HGMMA, meant are 48"),
        ({"loops": [600, 431]}, "431] instructions"),
        ({"loops": [600]}, "loops of [600]"),
    ],
)
def test_gate_sees_what_must_not_pass(flaw, says):
    counts = {"HGMMA": 48, "UTMALDG": 4, "UBLKCP": 1, "STL": 0, "LDL": 0}
    good = cuda_gate.Kernel("row_stats_backward 128 both fp16", 240, 0, 0, counts, [645, 430], 24)
    assert good.faults() == []
    assert any(says in fault for fault in good._replace(**flaw).faults())
