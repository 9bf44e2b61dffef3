"""One instruction at a time: operands in, what the PTX ISA says out."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx.errors import PtxError
from ptx.machine import program
from ptx.memory import GlobalMemory
from ptx.parser import WIDTH
from ptx.schedules import Schedule

LANES = list(range(32))
INF, NAN = float("inf"), float("nan")
STORED = {"pred": "u32", "bf16": "b16", "f16": "b16", "f16x2": "b32", "bf16x2": "b32", "tf32": "b32"}
DTYPE = {"u16": "<u2", "s16": "<i2", "u32": "<u4", "s32": "<i4", "u64": "<u8", "s64": "<i8", "f32": "<f4", "f64": "<f8"}


def bits(value: float) -> int:
    """Of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def half(value: float) -> int:
    return int(np.float16(value).view(np.uint16))


def execute(instruction: str, result: str, *operands: tuple[str, object]) -> np.ndarray:
    """What one warp has in d after `instruction`, whose sources are a, b, c; an operand is one number or 32."""
    memory, lines, arguments, parameters = GlobalMemory(), [], [], []
    for name, (kind, values) in zip("abc", operands, strict=False):
        wide = np.broadcast_to(np.array(values), 32).astype(DTYPE.get(kind, "<u4" if WIDTH[kind] != 16 else "<u2"))
        arguments.append(memory.place(wide, name))
        parameters.append(f".param .u64 p_{name}")
        stored = STORED.get(kind, kind)
        size = WIDTH[stored] // 8
        lines += [f".reg .{'pred' if kind == 'pred' else stored} {name};"]
        lines += [f"ld.param.u64 at, [p_{name}]; mad.lo.u64 at, lane, {size}, at;"]
        if kind == "pred":
            lines += ["ld.global.u32 number, [at]; setp.ne.u32 a, number, 0;".replace(" a,", f" {name},")]
        else:
            lines += [f"ld.global.b{8 * size} {name}, [at];"]
    kind = STORED.get(result, result)
    size = WIDTH[kind] // 8
    arguments.append(memory.place(np.full(32 * size, 0xAB, np.uint8), "d"))
    parameters.append(".param .u64 p_d")
    lines += [f".reg .{'pred' if result == 'pred' else kind} d;", instruction]
    lines += ["selp.u32 number, 1, 0, d;"] if result == "pred" else []
    lines += [f"ld.param.u64 at, [p_d]; mad.lo.u64 at, lane, {size}, at;"]
    lines += [f"st.global.b{8 * size} [at], {'number' if result == 'pred' else 'd'};"]
    body = "\n".join(lines)
    text = f"""
        .version 9.0
        .target sm_90a
        .entry test({", ".join(parameters)}) {{
        .reg .b64 at, lane; .reg .b32 number, t; .reg .pred p, q;
        mov.u32 t, %tid.x; cvt.u64.u32 lane, t;
        {body}
        ret; }}"""
    program(text).launch((1,), 32, arguments, memory, shared=1024)
    dtype = DTYPE.get(kind, {16: "<u2", 32: "<u4", 64: "<u8"}[WIDTH[kind]])
    return memory.array("d").view(dtype)


ONE = [  # instruction, type of the result, operands, result
    ("add.s32 d, a, b;", "s32", [("s32", 2147483647), ("s32", 1)], -2147483648),
    ("add.sat.s32 d, a, b;", "s32", [("s32", 2147483647), ("s32", 1)], 2147483647),
    ("add.s64 d, a, b;", "s64", [("s64", -5), ("s64", 7)], 2),
    ("add.s16 d, a, -1;", "s16", [("s16", 0)], -1),
    ("sub.s32 d, a, b;", "s32", [("s32", 3), ("s32", 5)], -2),
    ("sub.f32 d, a, b;", "f32", [("f32", 1.5), ("f32", INF)], -INF),
    ("mul.lo.s32 d, a, b;", "s32", [("s32", 65536), ("s32", 65537)], 65536),
    ("mul.hi.u32 d, a, b;", "u32", [("u32", 0x80000000), ("u32", 6)], 3),
    ("mul.hi.s32 d, a, b;", "s32", [("s32", -1), ("s32", 5)], -1),
    ("mul.hi.u64 d, a, b;", "u64", [("u64", 1 << 63), ("u64", 6)], 3),
    ("mul.wide.s32 d, a, b;", "s64", [("s32", -3), ("s32", 2000000000)], -6000000000),
    ("mul.wide.u32 d, a, b;", "u64", [("u32", 0xFFFFFFFF), ("u32", 2)], 0x1FFFFFFFE),
    ("mul.wide.u16 d, a, 3;", "u32", [("u16", 0xFFFF)], 196605),
    ("mul.lo.s64 d, a, b;", "s64", [("s64", -3), ("s64", 7)], -21),
    ("mad.lo.s32 d, a, b, c;", "s32", [("s32", 3), ("s32", 4), ("s32", -5)], 7),
    ("mad.wide.s32 d, a, b, c;", "s64", [("s32", -3), ("s32", 4), ("s64", 1)], -11),
    ("mad.lo.s64 d, a, b, c;", "s64", [("s64", 3), ("s64", 4), ("s64", 5)], 17),
    ("div.s32 d, a, b;", "s32", [("s32", -7), ("s32", 2)], -3),
    ("div.s64 d, a, b;", "s64", [("s64", 7), ("s64", -2)], -3),
    ("div.u32 d, a, b;", "u32", [("u32", 0xFFFFFFFF), ("u32", 16)], 0x0FFFFFFF),
    ("rem.s32 d, a, b;", "s32", [("s32", -7), ("s32", 2)], -1),
    ("rem.s64 d, a, b;", "s64", [("s64", 7), ("s64", -2)], 1),
    ("rem.u32 d, a, b;", "u32", [("u32", 17), ("u32", 5)], 2),
    ("min.s32 d, a, b;", "s32", [("s32", -7), ("s32", 2)], -7),
    ("max.s64 d, a, b;", "s64", [("s64", -7), ("s64", 2)], 2),
    ("max.u32 d, a, b;", "u32", [("u32", 0xFFFFFFFF), ("u32", 2)], 0xFFFFFFFF),
    ("abs.s32 d, a;", "s32", [("s32", -7)], 7),
    ("neg.s64 d, a;", "s64", [("s64", -7)], 7),
    ("not.b32 d, a;", "u32", [("u32", 0x0F)], 0xFFFFFFF0),
    ("and.b32 d, a, b;", "u32", [("u32", 0xFF), ("u32", 0x3C)], 0x3C),
    ("or.b64 d, a, 4611686293305294848;", "u64", [("u64", 3)], 0x4000004000000003),
    ("xor.b32 d, a, b;", "u32", [("u32", 0xFF), ("u32", 0x3C)], 0xC3),
    ("and.b16 d, a, 1;", "u16", [("u16", 3)], 1),
    ("and.pred d, a, b;", "pred", [("pred", 1), ("pred", 0)], 0),
    ("or.pred d, a, b;", "pred", [("pred", 1), ("pred", 0)], 1),
    ("xor.pred d, a, b;", "pred", [("pred", 1), ("pred", 1)], 0),
    ("not.pred d, a;", "pred", [("pred", 0)], 1),
    ("shl.b32 d, a, b;", "u32", [("u32", 3), ("u32", 31)], 0x80000000),
    ("shl.b32 d, a, b;", "u32", [("u32", 3), ("u32", 32)], 0),
    ("shl.b64 d, a, 40;", "u64", [("u64", 3)], 3 << 40),
    ("shr.s32 d, a, b;", "s32", [("s32", -8), ("u32", 40)], -1),
    ("shr.u32 d, a, b;", "u32", [("u32", 0x80000000), ("u32", 31)], 1),
    ("shr.u64 d, a, 63;", "u64", [("u64", 1 << 63)], 1),
    ("shf.l.wrap.b32 d, a, b, c;", "u32", [("u32", 0x80000000), ("u32", 1), ("u32", 33)], 3),
    ("shf.r.clamp.b32 d, a, b, c;", "u32", [("u32", 5), ("u32", 7), ("u32", 32)], 7),
    ("bfe.u32 d, a, 4, 15;", "u32", [("u32", 0x12345678)], 0x4567),
    ("bfe.s32 d, a, 2, 3;", "s32", [("s32", 0b11100)], -1),
    ("bfe.s32 d, a, 30, 8;", "s32", [("s32", -2147483648)], -2),
    ("bfe.u32 d, a, 4, 0;", "u32", [("u32", 0xFFFF)], 0),
    ("bfi.b32 d, a, b, 8, 4;", "u32", [("u32", 0xF), ("u32", 0)], 0xF00),
    ("popc.b32 d, a;", "u32", [("u32", 0xF00F)], 8),
    ("clz.b32 d, a;", "u32", [("u32", 0x00010000)], 15),
    ("brev.b32 d, a;", "u32", [("u32", 1)], 0x80000000),
    ("prmt.b32 d, a, b, 0x5410;", "u32", [("u32", 0x22221111), ("u32", 0x44443333)], 0x33331111),
    ("prmt.b32 d, a, b, 0x7632U;", "u32", [("u32", 0x22221111), ("u32", 0x44443333)], 0x44442222),
    ("prmt.b32 d, a, b, 0x888f;", "u32", [("u32", 0x80), ("u32", 0)], 0xFFFFFF00),
    ("lop3.b32 d, a, b, c, 0xCA;", "u32", [("u32", 0b10), ("u32", 0b11), ("u32", 0b01)], 0b11),
    ("selp.b32 d, -1, 5, a;", "s32", [("pred", 1)], -1),
    ("selp.f32 d, a, b, c;", "f32", [("f32", 1), ("f32", 2), ("pred", 0)], 2),
    ("mov.b32 d, 0f3F800000;", "f32", [], 1.0),
    ("mov.b64 d, {a, b};", "u64", [("u32", 1), ("u32", 2)], (2 << 32) | 1),
    ("{ .reg .b32 x; mov.b64 {x, d}, a; }", "u32", [("u64", (2 << 32) | 1)], 2),
    ("mov.b32 d, {a, b};", "u32", [("u16", 1), ("u16", 2)], (2 << 16) | 1),
    ("mov.u32 d, %ntid.x;", "u32", [], 32),
    # floats: a rounding mode, a NaN, a subnormal
    ("add.f32 d, a, b;", "f32", [("f32", 16777216), ("f32", 1)], 16777216),
    ("add.rp.f32 d, a, b;", "f32", [("f32", 16777216), ("f32", 1)], 16777218),
    ("add.ftz.f32 d, a, b;", "f32", [("f32", 1e-40), ("f32", 0)], 0),
    ("mul.f32 d, a, b;", "f32", [("f32", 1e-20), ("f32", 1e-20)], np.float32(1e-20) * np.float32(1e-20)),
    ("mul.rn.f32 d, a, b;", "f32", [("f32", 3), ("f32", -2)], -6),
    # 1 + 2^-12 squared is 1 + 2^-11 + 2^-24: a product rounded first would lose the last bit
    ("fma.rn.f32 d, a, b, c;", "f32", [("f32", 1 + 2**-12), ("f32", 1 + 2**-12), ("f32", -1 - 2**-11)], 2**-24),
    ("fma.rm.f32 d, a, b, c;", "f32", [("f32", 1), ("f32", 0.75), ("f32", 12582913)], 12582913),
    ("fma.rn.ftz.f32 d, a, b, c;", "f32", [("f32", 1e-30), ("f32", 1e-30), ("f32", 0)], 0),
    ("fma.rn.f64 d, a, b, c;", "f64", [("f64", 1 + 2**-30), ("f64", 1 + 2**-30), ("f64", -1 - 2**-29)], 2**-60),
    ("min.f32 d, a, b;", "f32", [("f32", NAN), ("f32", 2)], 2),
    ("max.f32 d, a, b;", "f32", [("f32", 1), ("f32", NAN)], 1),
    ("max.NaN.f32 d, a, b;", "f32", [("f32", 1), ("f32", NAN)], NAN),
    ("abs.f32 d, a;", "f32", [("f32", -INF)], INF),
    ("neg.f32 d, a;", "f32", [("f32", 2)], -2),
    ("copysign.f32 d, a, b;", "f32", [("f32", -1), ("f32", 3)], -3),
    ("div.rn.f32 d, a, b;", "f32", [("f32", 1), ("f32", 3)], np.float32(1) / np.float32(3)),
    ("div.full.f32 d, a, b;", "f32", [("f32", 6), ("f32", 3)], 2),
    ("rcp.approx.ftz.f32 d, a;", "f32", [("f32", 4)], 0.25),
    ("sqrt.rn.f32 d, a;", "f32", [("f32", 2)], np.sqrt(np.float32(2))),
    ("rsqrt.approx.f32 d, a;", "f32", [("f32", 4)], 0.5),
    ("ex2.approx.ftz.f32 d, a;", "f32", [("f32", -3)], 0.125),
    ("ex2.approx.ftz.f32 d, a;", "f32", [("f32", -127)], 0),
    ("ex2.approx.f32 d, a;", "f32", [("f32", -127)], 2.0**-127),
    ("ex2.approx.ftz.f32 d, a;", "f32", [("f32", -INF)], 0),
    ("lg2.approx.f32 d, a;", "f32", [("f32", 8)], 3),
    # the one NaN of the hardware, whichever came in
    ("add.f32 d, a, b;", "u32", [("u32", 0xFFC12345), ("u32", bits(1))], 0x7FFFFFFF),
    ("fma.rn.f32 d, a, b, a;", "u32", [("u32", 0x7F800000), ("u32", 0)], 0x7FFFFFFF),
    # conversions
    ("cvt.rn.f32.s32 d, a;", "f32", [("s32", 16777217)], 16777216),
    ("cvt.rn.f32.u32 d, a;", "f32", [("u32", 0xFFFFFFFF)], 4294967296),
    ("cvt.rn.f32.s64 d, a;", "f32", [("s64", -3)], -3),
    ("cvt.s64.s32 d, a;", "s64", [("s32", -3)], -3),
    ("cvt.u64.u32 d, a;", "u64", [("u32", 0xFFFFFFFF)], 0xFFFFFFFF),
    ("cvt.u32.u64 d, a;", "u32", [("u64", (1 << 32) + 7)], 7),
    ("cvt.u16.u32 d, a;", "u16", [("u32", 0x12345)], 0x2345),
    ("cvt.s32.s8 d, a;", "s32", [("u16", 0xFF)], -1),
    ("cvt.u32.u8 d, a;", "u32", [("u16", 0x1FF)], 0xFF),
    ("cvt.sat.f32.f32 d, a;", "f32", [("f32", 1.5)], 1),
    ("cvt.sat.f32.f32 d, a;", "f32", [("f32", NAN)], 0),
    ("cvt.rpi.ftz.f32.f32 d, a;", "f32", [("f32", 1.25)], 2),
    ("cvt.rni.f32.f32 d, a;", "f32", [("f32", 2.5)], 2),
    ("cvt.rzi.s32.f32 d, a;", "s32", [("f32", -2.75)], -2),
    ("cvt.rni.s32.f32 d, a;", "s32", [("f32", 3e9)], 2147483647),
    ("cvt.rzi.s32.f32 d, a;", "s32", [("f32", NAN)], 0),
    ("cvt.rn.f16.f32 d, a;", "f16", [("f32", 2049)], half(2048)),
    ("cvt.f32.f16 d, a;", "f32", [("f16", half(-1.5))], -1.5),
    ("cvt.rn.bf16.f32 d, a;", "bf16", [("f32", 1 + 3 * 2**-8)], bits(1 + 2**-6) >> 16),
    ("cvt.f32.bf16 d, a;", "f32", [("bf16", bits(-1.5) >> 16)], -1.5),
    ("cvt.rn.f16x2.f32 d, a, b;", "f16x2", [("f32", 1), ("f32", 2)], half(1) << 16 | half(2)),
    ("cvt.rn.bf16x2.f32 d, a, b;", "bf16x2", [("f32", 1), ("f32", 2)], bits(1) & 0xFFFF0000 | bits(2) >> 16),
    ("cvt.rna.tf32.f32 d, a;", "f32", [("f32", 1 + 2**-11)], 1 + 2**-10),
    ("add.f16x2 d, a, b;", "f16x2", [("f16x2", half(1) << 16 | half(2)), ("f16x2", half(3) << 16 | half(4))],
     half(4) << 16 | half(6)),
    ("fma.rn.bf16 d, a, b, c;", "bf16", [("bf16", bits(2) >> 16), ("bf16", bits(3) >> 16), ("bf16", bits(1) >> 16)],
     bits(7) >> 16),
    # comparisons
    ("setp.lt.s32 d, a, b;", "pred", [("s32", -1), ("s32", 1)], 1),
    ("setp.lt.u32 d, a, b;", "pred", [("u32", 0xFFFFFFFF), ("u32", 1)], 0),
    ("setp.ge.s64 d, a, b;", "pred", [("s64", -1), ("s64", -1)], 1),
    ("setp.gt.s16 d, a, b;", "pred", [("s16", 1), ("s16", 2)], 0),
    ("setp.eq.f32 d, a, b;", "pred", [("f32", NAN), ("f32", NAN)], 0),
    ("setp.ne.f32 d, a, b;", "pred", [("f32", NAN), ("f32", 1)], 0),
    ("setp.neu.f32 d, a, b;", "pred", [("f32", NAN), ("f32", 1)], 1),
    ("setp.geu.f32 d, a, b;", "pred", [("f32", NAN), ("f32", 1)], 1),
    ("setp.leu.f32 d, a, b;", "pred", [("f32", 1), ("f32", 2)], 1),
    ("setp.gtu.f32 d, a, b;", "pred", [("f32", 1), ("f32", 2)], 0),
    ("setp.nan.f32 d, a, b;", "pred", [("f32", NAN), ("f32", 1)], 1),
    ("setp.num.f32 d, a, b;", "pred", [("f32", 2), ("f32", 1)], 1),
    ("setp.lt.and.s32 d, a, b, !c;", "pred", [("s32", 0), ("s32", 1), ("pred", 1)], 0),
    ("setp.lt.or.s32 q|d, a, b, c;", "pred", [("s32", 0), ("s32", 1), ("pred", 0)], 0),
    # guards
    ("mov.u32 d, 1; setp.lt.u32 p, t, 4; @p mov.u32 d, 2;", "u32", [], [2] * 4 + [1] * 28),
    ("mov.u32 d, 1; setp.lt.u32 p, t, 4; @!p mov.u32 d, 2;", "u32", [], [1] * 4 + [2] * 28),
    # lanes
    ("shfl.sync.bfly.b32 d, a, 1, 31, -1;", "u32", [("u32", LANES)], [i ^ 1 for i in LANES]),
    ("shfl.sync.up.b32 d, a, 3, 0, -1;", "u32", [("u32", LANES)], [i - 3 if i >= 3 else i for i in LANES]),
    ("shfl.sync.down.b32 d, a, 3, 31, -1;", "u32", [("u32", LANES)], [i + 3 if i < 29 else i for i in LANES]),
    ("shfl.sync.idx.b32 d, a, 5, 31, -1;", "u32", [("u32", LANES)], 5),
    ("shfl.sync.idx.b32 d, a, 1, 0x181f, -1;", "u32", [("u32", LANES)], [i // 8 * 8 + 1 for i in LANES]),
    ("shfl.sync.up.b32 number|d, a, 1, 0, -1;", "pred", [("u32", LANES)], [0] + [1] * 31),
    ("elect.sync number|d, -1;", "pred", [], [1] + [0] * 31),
    ("redux.sync.max.s32 d, a, -1;", "s32", [("s32", [i - 40 for i in LANES])], -9),
    ("redux.sync.add.u32 d, a, -1;", "u32", [("u32", LANES)], 496),
    ("vote.sync.ballot.b32 d, a, -1;", "u32", [("pred", [i % 2 for i in LANES])], 0xAAAAAAAA),
    ("vote.sync.any.pred d, a, -1;", "pred", [("pred", [0] * 31 + [1])], 1),
    ("vote.sync.all.pred d, a, -1;", "pred", [("pred", [0] * 31 + [1])], 0),
    ("setp.lt.u32 p, t, 4; mov.u32 d, 0; @p activemask.b32 d;", "u32", [], [15] * 4 + [0] * 28),
]  # fmt: skip


@pytest.mark.parametrize(
    "instruction, result, operands, expected", ONE, ids=[f"{i} {row[0]}" for i, row in enumerate(ONE)]
)
def test_instruction(instruction, result, operands, expected):
    got = execute(instruction, result, *operands)
    np.testing.assert_array_equal(got, np.broadcast_to(np.array(expected), 32).astype(got.dtype))


def test_every_width_of_loads_and_stores_keeps_its_bytes():
    """Vectors of bytes, halves, words; signs extended, the rest of a register zero."""
    body = """
        .reg .b32 t, x, y, at; .reg .b16 h, k; .reg .b64 g;
        mov.u32 t, %tid.x; shl.b32 at, t, 4; mov.u32 x, data; add.u32 at, at, x;
        mul.lo.u32 x, t, 0x01010101; or.b32 x, x, 0x80;
        st.shared.v4.b32 [at], {x, x, t, t};
        ld.shared.s8 y, [at]; ld.shared.v2.b8 {h, k}, [at+8]; ld.shared.u16 x, [at+12];
        cvt.u32.u16 at, h; add.u32 at, at, x;
        ld.param.u64 g, [out]; .reg .b64 lane; cvt.u64.u32 lane, t; mad.lo.u64 g, lane, 8, g;
        st.global.v2.b32 [g], {y, at}; ret;"""
    memory = GlobalMemory()
    out = memory.place(np.zeros((32, 2), np.int32), "out")
    text = f".extern .shared .align 16 .b8 data[];\n.entry test(.param .u64 out) {{ {body} }}"
    program(text).launch((1,), 32, [out], memory, shared=512)
    lane = np.arange(32)
    np.testing.assert_array_equal(
        memory.array("out"), np.stack([(lane | 0x80).astype(np.uint8).view(np.int8), 2 * lane], 1)
    )


def _matrix_program(instruction: str) -> str:
    """A warp with 4 registers of out of / into 512 bytes of shared memory that hold their own numbers."""
    return f"""
        .extern .shared .align 16 .b8 data[];
        .entry test(.param .u64 out) {{
        .reg .b32 t, at, row, x0, x1, x2, x3; .reg .b64 g, lane;
        mov.u32 t, %tid.x; cvt.u64.u32 lane, t; mov.u32 row, data;
        shl.b32 at, t, 4; add.u32 row, row, at;  // lane l addresses row l
        mad.lo.u32 x0, t, 0x00080008, 0x00010000; add.u32 x1, x0, 0x00020002;
        add.u32 x2, x1, 0x00020002; add.u32 x3, x2, 0x00020002;
        {instruction}
        ld.param.u64 g, [out]; mad.lo.u64 g, lane, 16, g; st.global.v4.b32 [g], {{x0, x1, x2, x3}}; ret; }}"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_in_shared_memory_lie_as_the_isa_says(transposed):
    """ldmatrix: lane l gets numbers 2 (l % 4) and the next of row l / 4; stmatrix puts them back."""
    trans = ".trans" if transposed else ""
    load = "st.shared.v4.b32 [row], {x0, x1, x2, x3}; bar.warp.sync -1;"
    load += f" ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{x0, x1, x2, x3}}, [row];"
    numbers = np.arange(256).reshape(4, 8, 8)  # of 4 matrices, row by row
    memory = GlobalMemory()
    out = memory.place(np.zeros((32, 4), np.uint32), "out")
    program(_matrix_program(load)).launch((1,), 32, [out], memory, shared=512)
    got = memory.array("out").view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for k in range(4):
            for e in range(2):
                row, column = lane // 4, 2 * (lane % 4) + e
                assert got[lane, k, e] == (numbers[k, column, row] if transposed else numbers[k, row, column])
    again = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [row], {{x0, x1, x2, x3}}; bar.warp.sync -1;"
    back = load + "bar.warp.sync -1;" + again + "ld.shared.v4.b32 {x0, x1, x2, x3}, [row];"
    memory = GlobalMemory()
    out = memory.place(np.zeros((32, 4), np.uint32), "out")
    program(_matrix_program(back)).launch((1,), 32, [out], memory, shared=512)
    np.testing.assert_array_equal(memory.array("out").view(np.uint16).ravel(), np.arange(256))


@pytest.mark.parametrize("kind, shape, per", [("f16", "m16n8k16", 2), ("bf16", "m16n8k16", 2), ("tf32", "m16n8k8", 1)])
def test_products_of_fragments(kind, shape, per):
    """mma.sync against the fragment tables of the PTX ISA, written down again here."""
    dice = np.random.default_rng(0)
    k = 8 * per
    a, b, c = dice.integers(-3, 4, (16, k)), dice.integers(-3, 4, (k, 8)), dice.integers(-3, 4, (16, 8))
    encode = {"f16": half, "bf16": lambda x: bits(float(x)) >> 16, "tf32": lambda x: bits(float(x))}[kind]
    registers = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r in range(4):
            row, column = g + 8 * (r % 2), per * t + 4 * per * (r // 2)
            registers[lane, r] = sum(encode(a[row, column + e]) << 16 * e for e in range(per))
        for r in range(2):
            registers[lane, 4 + r] = sum(encode(b[per * t + 4 * per * r + e, g]) << 16 * e for e in range(per))
        for r in range(4):
            registers[lane, 6 + r] = bits(float(c[g + 8 * (r // 2), 2 * t + r % 2]))
    names = [f"{x}{i}" for x, count in (("a", 4), ("b", 2), ("c", 4)) for i in range(count)]
    loads = " ".join(f"ld.global.b32 {r}, [g+{4 * i}];" for i, r in enumerate(names))
    text = f"""
        .entry test(.param .u64 in, .param .u64 out) {{
        .reg .b32 t, a<4>, b<2>, c<4>; .reg .b64 g, h, lane;
        mov.u32 t, %tid.x; cvt.u64.u32 lane, t; ld.param.u64 g, [in]; mad.lo.u64 g, lane, 40, g;
        {loads}
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
            {{c0,c1,c2,c3}}, {{a0,a1,a2,a3}}, {{b0,b1}}, {{c0,c1,c2,c3}};
        ld.param.u64 h, [out]; mad.lo.u64 h, lane, 16, h; st.global.v4.b32 [h], {{c0, c1, c2, c3}}; ret; }}"""
    memory = GlobalMemory()
    arguments = [memory.place(registers, "in"), memory.place(np.zeros((32, 4), np.float32), "out")]
    program(text).launch((1,), 32, arguments, memory)
    got = memory.array("out")
    for lane in range(32):
        for r in range(4):
            assert got[lane, r] == (a @ b + c)[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2]


def test_an_instruction_without_meaning_is_named():
    with pytest.raises(PtxError, match=r"tanh\.approx\.bf17.*|has no meaning") as error:
        program(".entry test() { .reg .b32 x;\n frobnicate.b32 x, x; ret; }")
    assert "line 2: frobnicate.b32 x, x" in str(error.value)


def test_a_schedule_has_a_known_name():
    with pytest.raises(ValueError, match="earliest, latest or random"):
        Schedule("soon")
