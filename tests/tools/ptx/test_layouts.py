"""Where operands of WGMMA and boxes of TMA lie, against formulas written down again; what a report counts."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.bulk import TensorMap
from ptx.errors import PtxError
from ptx.parser import parse
from ptx.products import operand_places
from ptx.report import class_of, wavefronts

SWIZZLE_128, STRIDE_1024 = 1 << 62, 64 << 32
START = 4096


def swizzled(rows: int, row: int, feature: int) -> int:
    """csrc/cuda/shared_layout.h: 16-bit tiles in boxes of 64 features, chunk c of row r at c ^ r % 8."""
    box, byte = feature // 64, feature % 64 * 2
    return box * rows * 128 + row * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16


@pytest.mark.parametrize("step", range(8))
def test_features_first_with_the_swizzle_of_128_bytes(step):
    """The descriptor of csrc/cuda: +2 for every 16 features, +rows * 8 for every box."""
    rows = 128
    start = START // 16 + step % 4 * 2 + step // 4 * rows * 8
    places = operand_places(SWIZZLE_128 | STRIDE_1024 | 1 << 16 | start, rows, True).reshape(rows, 16, 2)
    for row in (0, 1, 7, 8, 63, 127):
        for k in range(16):
            assert places[row, k, 0] == START + swizzled(rows, row, 16 * step + k)


@pytest.mark.parametrize("step", range(4))
def test_rows_first_with_the_swizzle_of_128_bytes(step):
    """The same tile [64 rows, 128 features] read the other way: leading offset 8,192 bytes, +128 for every 16 rows."""
    rows, features = 64, 128
    descriptor = SWIZZLE_128 | STRIDE_1024 | rows * 128 // 16 << 16 | START // 16 + step * 128
    places = operand_places(descriptor, features, False).reshape(features, 16, 2)
    for feature in (0, 1, 63, 64, 127):
        for k in range(16):
            assert places[feature, k, 0] == START + swizzled(rows, 16 * step + k, feature)


@pytest.mark.parametrize("kind, span, bits", [(3, 32, 1), (2, 64, 3), (1, 128, 7)])
def test_narrower_swizzles(kind, span, bits):
    """Atoms of eight rows of `span` bytes; address bits 7 and up move the 16-byte chunk."""
    stride = 8 * span
    places = operand_places(kind << 62 | stride // 16 << 32 | START // 16, 16, True)
    for row in range(16):
        for byte in range(32):
            at = START + row // 8 * stride + row % 8 * span + byte
            assert places[row, byte] == at ^ ((at >> 7 & bits) << 4)


def test_no_swizzle():
    """Core matrices of 8 x 16 bytes: the stride offset leads to the next rows, the leading one to the next chunk."""
    places = operand_places(512 // 16 << 32 | 128 // 16 << 16 | START // 16, 16, True)
    assert places[9, 17] == START + 512 + 16 + 128 + 1
    places = operand_places(512 // 16 << 32 | 128 // 16 << 16 | START // 16, 16, False).reshape(16, 16, 2)
    assert places[9, 11, 1] == START + 512 + 3 * 16 + 128 + 2 + 1


@pytest.mark.parametrize("bits", [1 << 49, 1 << 14, 1 << 30, 1 << 52])
def test_descriptors_that_mean_something_else_are_refused(bits):
    with pytest.raises(PtxError, match="descriptor"):
        operand_places(SWIZZLE_128 | STRIDE_1024 | bits, 64, True)


def test_boxes_lie_as_operands_are_read():
    box = TensorMap(0, 2, (128, 300), (256,), (64, 128), 128)
    places = box.shared_places(1024)
    for row in (0, 5, 127):
        for feature in (0, 9, 63):
            assert places[row, 2 * feature] == 1024 + swizzled(128, row, feature)
    addresses, inside = box.global_addresses((64, 256))
    assert addresses[3, 5] == (256 + 3) * 256 + (64 + 5) * 2
    assert inside[:44].all() and not inside[44:].any()


@pytest.mark.parametrize(
    "addresses, size, passes, ideal",
    [
        (4 * np.arange(32), 4, 1, 1),
        (0 * np.arange(32), 4, 1, 1),  # one word for all
        (128 * np.arange(32), 4, 32, 1),
        (8 * np.arange(32), 4, 2, 1),
        (16 * np.arange(32), 16, 4, 4),
        (128 * np.arange(8), 16, 8, 1),  # rows of a matrix without swizzle
        (128 * np.arange(8) ^ 16 * np.arange(8), 16, 1, 1),  # and with it
        (np.arange(32), 1, 1, 1),
    ],
)
def test_bank_conflicts(addresses, size, passes, ideal):
    assert wavefronts(addresses, size) == (passes, ideal)


def test_instructions_have_classes():
    text = """.entry e() { .reg .f32 f; .reg .b32 r; .reg .pred p;
        ex2.approx.f32 f, f; add.f32 f, f, f; add.s32 r, r, r; mov.u32 r, %tid.x; bar.sync 0; @p bra L; L: ret; }"""
    assert [class_of(i) for i in parse(text).entry().code] == [
        "exponentials", "floats", "integers and predicates", "moves", "synchronisation", "branches", "branches",
    ]  # fmt: skip
