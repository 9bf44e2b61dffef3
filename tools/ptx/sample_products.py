"""Two products in Triton, (U V^T) V with whole numbers, whose exact result is known whatever the order of sums.

On sm_80 cp.async, ldmatrix (transposed too) and mma.sync; on sm_90 wgmma with operands K- and MN-major in shared
memory and in registers, by cp.async and proxy fences or by TMA, and stmatrix.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .report import Report
from .schedules import Schedule
from .triton_kernels import run_compiled

ROWS, COLUMNS, FEATURES = 64, 64, 128
BLOCKS, TILES = 2, 3  # three tiles fill the first of two stages again
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@triton.jit
def products_kernel(
    p_u, p_v, d_u, d_v, p_out, d_out, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    i0 = tl.program_id(0) * ROWS
    o_d = tl.arange(0, D)
    if d_u is None:
        b_u = tl.load(p_u + (i0 + tl.arange(0, ROWS))[:, None] * D + o_d[None, :])
    else:
        b_u = d_u.load([i0, 0])
    b_out = tl.zeros((ROWS, D), tl.float32)
    for j0 in range(0, columns, COLUMNS):
        if d_v is None:
            b_v = tl.load(p_v + (j0 + tl.arange(0, COLUMNS))[:, None] * D + o_d[None, :])
        else:
            b_v = d_v.load([j0, 0])
        b_s = tl.dot(b_u, tl.trans(b_v))
        b_out = tl.dot(b_s.to(b_v.dtype), b_v, b_out)
    if d_out is None:
        tl.store(p_out + (i0 + tl.arange(0, ROWS))[:, None] * D + o_d[None, :], b_out.to(p_out.dtype.element_ty))
    else:
        d_out.store([i0, 0], b_out.to(p_out.dtype.element_ty))


def compiled(architecture: int, descriptors: bool, kind: str = "fp16"):
    """The kernel for an architecture; loads by descriptors or by pointers."""
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "D": FEATURES}
    signature = dict.fromkeys(("p_u", "p_v", "p_out"), f"*{kind}") | {"columns": "i32"}
    names = ("d_u", "d_v", "d_out")
    signature |= dict.fromkeys(names, f"tensordesc<{kind}[{ROWS}, {FEATURES}]>" if descriptors else "constexpr")
    signature |= dict.fromkeys(constants, "constexpr")
    if not descriptors:
        constants |= dict.fromkeys(names)
    ordered = {name: signature[name] for name in products_kernel.arg_names}
    places = {name: (k,) for k, name in enumerate(products_kernel.arg_names)}
    attrs = {places[name]: [["tt.divisibility", 16]] for name in ("p_u", "p_v", "p_out")}
    source = ASTSource(products_kernel, ordered, constexprs={places[k]: v for k, v in constants.items()}, attrs=attrs)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def run(kernel, ptx: str, kind: str, schedule: Schedule, **options) -> tuple[bool, Report]:
    """(whether every bit is right, what was counted) of the kernel with that text."""
    dice = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randint(-1, 2, (rows, FEATURES), generator=dice).to(DTYPES[kind])  # noqa: E731
    u, v = draw(BLOCKS * ROWS), draw(TILES * COLUMNS)
    out = torch.full((BLOCKS * ROWS, FEATURES), float("nan")).to(DTYPES[kind])
    described = "tensordesc" in str(kernel.src.signature["d_u"])
    descriptors = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [ROWS, FEATURES]) if described else None
        for x in (u, v, out)
    ]
    edited = SimpleNamespace(asm={"ptx": ptx}, metadata=kernel.metadata, src=kernel.src)
    values = [u, v, *descriptors[:2], out, descriptors[2], len(v), ROWS, COLUMNS, FEATURES]
    report = run_compiled(edited, (BLOCKS, 1, 1), values, schedule, **options)
    exact = (u.double() @ v.double().T) @ v.double()  # whole numbers below 2^24
    return bool((out == exact.to(out.dtype)).all()), report
