"""Programs of compilers that hardware runs every day: the machine gives their exact results, bit for bit."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from ptx import sample_products, sample_ring
from ptx.checks import runner, why_not
from ptx.errors import PtxError
from ptx.schedules import Schedule, schedules

# where the rows of a product are
IN_MEMORY, IN_REGISTERS = r"wgmma.mma_async\S* \{[^{]*\}, %rd", r"wgmma.mma_async\S* \{[^{]*\}, \{"
WANTED = {  # what each of them is there for
    "sm_80": ("cp.async.cg", "ldmatrix.*x4.shared", "ldmatrix.*x4.trans", "mma.sync"),
    "sm_90": ("cp.async.cg", "fence.proxy.async", IN_MEMORY, IN_REGISTERS),
    "sm_90 TMA": ("bulk.tensor.2d.shared", "stmatrix", r"wgmma[^;]*, 1, 1, 1;", "bulk.tensor.2d.global"),
    "ring": ("barrier.sync", "setmaxnreg", "mbarrier.arrive.shared", "mbarrier.try_wait", "stmatrix", "elect.sync"),
}  # fmt: skip


@pytest.mark.parametrize("program", WANTED)
def test_every_bit_is_right_under_every_schedule(program):
    if (reason := why_not(program)) and program != "sm_90":
        pytest.skip(reason)
    text, run = runner(program)
    if reason:
        with pytest.raises(PtxError, match=r"no fence\.proxy\.async between a cp\.async"):
            run(text, Schedule())
        return
    for pattern in WANTED[program]:
        assert re.search(pattern, text), pattern
    for schedule in schedules(2):
        assert run(text, schedule), str(schedule)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture, descriptors", [(80, False), (90, True)])
def test_other_operands(architecture, descriptors, kind):
    """bf16 and TF32; what TMA, ldmatrix and WGMMA do does not depend on the numbers."""
    kernel = sample_products.compiled(architecture, descriptors, kind)
    assert re.search(r"mma\S*\.(bf16|tf32)\.", kernel.asm["ptx"])
    for schedule in schedules(0):
        assert sample_products.run(kernel, kernel.asm["ptx"], kind, schedule)[0]


@pytest.mark.skipif(why_not("ring") is not None, reason=why_not("ring") or "")
def test_a_report_counts_what_the_ring_moves():
    kernel = sample_ring.compiled()
    _, report = sample_ring.run(kernel, kernel.asm["ptx"], schedules()[0])
    chunks, tile = 5, 64 * 64 * 2
    assert report.sums["shared bytes by TMA"] == 2 * chunks * tile
    assert report.sums["L2 bytes by TMA"] == chunks * (2 * tile - 4 * 64 * 2)  # four columns lie outside of b
    assert report.sums["flops"] == 2 * 64 * 64 * 64 * chunks
