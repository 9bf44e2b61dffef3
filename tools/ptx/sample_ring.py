"""A product in Gluon: one warp fills a ring of tiles by TMA, four multiply them by WGMMA and store the result by TMA.

Compiled by a compiler that is run on H100s every day, it holds what the hand-written kernels need: a ring of mbarriers,
warp specialisation, swizzled tiles, stmatrix and a proxy fence.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait as wait_for_products
from triton.tools.tensor_descriptor import TensorDescriptor

from .report import Report
from .schedules import Schedule
from .triton_kernels import run_compiled

ROWS, COLUMNS, CHUNK, STAGES = 64, 64, 64, 2


@gluon.jit
def produce(d_a, d_b, a, b, full, empty, chunks, STAGES: gl.constexpr):
    for i in range(chunks):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), d_a.block_type.nbytes + d_b.block_type.nbytes)
        tma.async_load(d_a, [0, i * d_a.block_type.shape[1]], full.index(stage), a.index(stage))
        tma.async_load(d_b, [0, i * d_b.block_type.shape[1]], full.index(stage), b.index(stage))


@gluon.jit
def consume(d_out, a, b, out, full, empty, chunks, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    products = gl.zeros([a.shape[1], b.shape[1]], gl.float32, layout)
    for i in range(chunks):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        products = warpgroup_mma(a.index(stage), b.index(stage).permute((1, 0)), products, is_async=True)
        products = wait_for_products(0, deps=(products,))
        mbarrier.arrive(empty.index(stage), count=1)
    out.store(products.to(gl.float16))
    fence_async_shared()
    tma.async_store(d_out, [0, 0], out)
    tma.store_wait(0)


@gluon.jit
def product_kernel(d_a, d_b, d_out, chunks, STAGES: gl.constexpr):
    a = gl.allocate_shared_memory(gl.float16, [STAGES, d_a.block_type.shape[0], d_a.block_type.shape[1]], d_a.layout)
    b = gl.allocate_shared_memory(gl.float16, [STAGES, d_b.block_type.shape[0], d_b.block_type.shape[1]], d_b.layout)
    out = gl.allocate_shared_memory(gl.float16, d_out.block_type.shape, d_out.layout)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (d_out, a, b, out, full, empty, chunks, STAGES)),
            (produce, (d_a, d_b, a, b, full, empty, chunks, STAGES)),
        ],
        [1],
        [24],
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))


def compiled():
    """The kernel for sm_90."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tile = {"d_a": (ROWS, CHUNK), "d_b": (COLUMNS, CHUNK), "d_out": (ROWS, COLUMNS)}
    signature = {name: f"tensordesc<fp16{list(shape)},{layout!r}>" for name, shape in tile.items()}
    signature |= {"chunks": "i32", "STAGES": "constexpr"}
    source = GluonASTSource(product_kernel, signature, constexprs={"STAGES": STAGES})
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": True})


def run(kernel, ptx: str, schedule: Schedule) -> tuple[bool, Report]:
    """(whether every bit is right, what was counted) with that text; the last columns are outside of b."""
    chunks, dice = 5, torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randint(-2, 3, (rows, chunks * CHUNK), generator=dice).half()  # noqa: E731
    a, b = draw(ROWS), draw(COLUMNS - 4)
    out = torch.full((ROWS, COLUMNS), float("nan")).half()
    edited = SimpleNamespace(asm={"ptx": ptx}, metadata=kernel.metadata, src=kernel.src)
    tiles = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), box)
        for x, box in ((a, [ROWS, CHUNK]), (b, [COLUMNS, CHUNK]), (out, [ROWS, COLUMNS]))
    ]
    report = run_compiled(edited, (1, 1, 1), [*tiles, chunks, STAGES], schedule)
    exact = torch.nn.functional.pad(a.double() @ b.double().T, (0, 4))  # whole numbers below 2^11
    return bool((out.double() == exact).all()), report
