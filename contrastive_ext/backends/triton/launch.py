"""What every launch of the `triton` backend needs: kernels, tiles, operands, the shape of a grid, workspaces."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...problem.problem import Problem

WORKSPACE_BYTES = 64 << 20  # of column partials in the forward, and of weights up to 512 features
WIDE_FEATURES, WIDE_WORKSPACE_BYTES = 512, 256 << 20  # of weights beyond: fewer, larger library products
INTERPRETED_PROCESSORS = 3  # a GPU small enough that test problems are split


def operands(problem: Problem) -> tuple[Tensor, Tensor]:
    """u and v in the dtype whose values they hold."""
    if problem.products:
        u = in_parts(problem.u)
        return u, u if problem.v is None else in_parts(problem.v)
    dtype = problem.operand_dtype
    if dtype == torch.bfloat16 and interpreted():
        dtype = torch.float32  # the interpreter's bf16 products are wrong; float32 holds the same values
    u = rounded(problem.u.to(dtype))
    return u, u if problem.v is None else rounded(problem.v.to(dtype))


def in_parts(x: Tensor) -> Tensor:
    """[N, 2 D] fp16: x rounded, and beside it what the rounding lost; of numbers up to 1 both keep 22 bits."""
    high = x.half()
    return torch.cat([high, (x - high.float()).half()], 1)


def rounded(x: Tensor) -> Tensor:
    """x as an operand of products: in TF32 rounded to 11 bits, where tensor cores would cut (scores.round_to)."""
    if kind_of_products(x) != "tf32":
        return x
    high = x * (1 + 2**13)  # Dekker's splitting
    return high - (high - x)


def scale_argument(problem: Problem) -> tuple[float | Tensor, bool]:
    """The kernel's scale argument; a number would arrive as float32."""
    if isinstance(problem.scale, Tensor):
        return problem.scale, True
    if problem.u.dtype == torch.float64:
        return problem.u.new_full((), problem.scale), True
    return problem.scale, False


def shift_of(problem: Problem, exponents: tuple[float, ...], limit: float) -> str:
    """Whether exponentials need a running maximum, decided here or, for a scale tensor, by the kernel itself."""
    if not problem.unit:
        return "online"
    if isinstance(problem.scale, Tensor):
        return "device"
    return "plain" if problem.scale * kernels().scores.LOG2E.value * max(exponents) <= limit else "online"


def tile_arguments(config, operand: Tensor, products: str = "") -> dict[str, Any]:
    """The tile as arguments of a kernel."""
    features = features_of(operand, products)
    chunk = config.block_d or feature_block(features)
    return ({"maxnreg": config.registers} if config.registers else {}) | {
        "TILE": kernels().scores.Tile(features, config.block_m, config.block_n, chunk, precision(operand, products)),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # the default until Triton 3.9 announced to change it
    }


def features_of(operand: Tensor, products: str) -> int:
    """Features of an operand, in parts or not."""
    return operand.shape[1] // (2 if products else 1)


def precision(operand: Tensor, products: str = "") -> str:
    """The kernels' products: their `input_precision`, or the name of those of split operands."""
    return products or ("tf32" if kind_of_products(operand) == "tf32" else "ieee")


def kind_of_products(operand: Tensor, products: str = "") -> str:
    """Which products: 16-bit, tf32, ieee, fp64, or split for `Problem.products` that are named."""
    if products:
        return "split"
    if operand.dtype != torch.float32:
        return "fp64" if operand.dtype == torch.float64 else "16-bit"
    everything: Any = torch.backends
    allowed = everything.cuda.matmul.fp32_precision  # the older getter, allow_tf32, raises once this one was set
    if allowed == "none":  # not set for products: the setting for everything counts
        allowed = everything.fp32_precision
    return "tf32" if allowed == "tf32" and operand.is_cuda else "ieee"


def config_of(
    direction: str, operand: Tensor, mask: str, ranked: bool = False, exponents: int = 1, products: str = "",
    sums: bool = False,
):  # fmt: skip
    """The tile of a call, triton_kernels/configs.py."""
    kind, chip = kind_of_products(operand, products), architecture(operand.device)
    features = features_of(operand, products)
    return kernels().configs.choose(direction, kind, features, chip, mask, ranked, exponents, sums)


def descriptor(x: Tensor, rows: int, features: int, products: str = ""):
    """How the copy engine finds tiles of x, or None where a program computes addresses: see scores.load_tile."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.numel() > 0
    configs = kernels().configs
    described = (
        architecture(x.device) >= configs.DESCRIPTORS_FROM and kind_of_products(x, products) in configs.DESCRIBED
    )
    if not aligned or not (described or interpreted()):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    # rows are dense, but the stride of one feature of one row may be anything
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, features])


def operand_arguments(config, u: Tensor, v: Tensor, products: str = "") -> tuple[Any, ...]:
    """Rows and columns as arguments of a sweep, u, d_u, v, d_v: see scores.load_tile.

    Triton 3.6 takes no descriptor inside of a tuple.
    """
    block_d = config.block_d or feature_block(features_of(u, products))
    return (
        *((u, u.stride(0)), descriptor(u, config.block_m, block_d, products)),
        *((v, v.stride(0)), descriptor(v, config.block_n, block_d, products)),
    )


def guide_chunk(device: torch.device) -> int:
    """Features of a chunk of a gate's product."""
    configs = kernels().configs
    return configs.GUIDE_FEATURES[configs.nearest(architecture(device))]


def feature_block(features: int) -> int:
    """Features with their padding: products take powers of two from 16 on."""
    return max(16, 1 << (features - 1).bit_length())


def split(tiles: int, columns: int, block: int, programs: int) -> tuple[int, int]:
    """How many splits of the columns bring tiles x splits close to `programs`, and the columns of a split."""
    column_tiles = cdiv(columns, block)
    splits = max(1, min(programs // max(1, tiles), column_tiles))
    span = cdiv(column_tiles, splits) * block
    return max(1, cdiv(columns, max(1, span))), span


def programs_at_once(config, device: torch.device, features: int) -> int:
    """Programs of a sweep with a gradient that the device runs at a time, by their registers.

    A thread has its share of the tile and of the sum and some 64 registers more: on a processor of sm_90 3 programs of
    64x64 at 128 features, 2 at 256, which explains what an H200 took (docs/measurements.md).
    """
    threads = 32 * config.num_warps
    registers = config.block_m * (config.block_n + feature_block(features)) // threads + 64
    return processors(device) * max(1, 65536 // (threads * min(255, registers)))


def even_split(tiles: int, columns: int, block: int, fewest: int, most: int, at_once: int) -> tuple[int, int]:
    """`split` into `fewest` to `most` parts: the first number whose last wave of programs leaves at most 5 % idle."""

    def idle(splits: int) -> float:
        waves = max(1, tiles) * splits / at_once
        return 1 - waves / math.ceil(waves)

    choices = range(fewest, max(fewest, most) + 1)
    return split(1, columns, block, next((s for s in choices if idle(s) <= 0.05), min(choices, key=idle)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def on_device(device: torch.device):
    """Launches inside go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """How many programs run at a time, at least."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def why_missing() -> str | None:
    """None, or why there is no Triton."""
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})."
    return None


@cache
def kernels():
    """The kernels, imported on first use: Triton is optional."""
    from ... import triton_kernels
    from ...triton_kernels import (  # noqa: F401
        configs,
        histogram_ranks,
        merge,
        online_lse,
        pair_sums,
        pairs,
        prologue,
        row_losses,
        row_stats_backward,
        row_stats_forward,
        scores,
        top_columns,
    )

    return triton_kernels


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    import triton

    return not isinstance(kernels().merge.merge_kernel, triton.JITFunction)
