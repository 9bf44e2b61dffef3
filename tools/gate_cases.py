"""What tools/gate.py compiles: the cases, and of each the kernel, the types of its arguments and its constants.

A type is what Triton calls it ("i32" where none is given), a tuple where the argument is one, None for a missing
pointer.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import triton.language as tl
from contrastive_ext.triton_kernels import (
    configs,
    histogram_ranks,
    merge,
    pair_sums,
    prologue,
    row_losses,
    row_stats_backward,
    row_stats_forward,
    scores,
    top_columns,
)
from contrastive_ext.triton_kernels import pairs as pair_rules

from contrastive_ext import numerics
from contrastive_ext.backends.triton import forward as triton_forward
from contrastive_ext.backends.triton import ranked_stats as triton_ranked
from contrastive_ext.backends.triton import whole_loss as triton_whole_loss
from contrastive_ext.backends.triton.unit_rows import prologue_block

MASKED = {  # variants that make a mask for every tile, and its costliest rule
    "busy": "ids",
    "lists": "lists",
    "guide": "gate",
    "ranked+guide": "gate",
    "range": "ids",
    "count": "ids",
    "sums": "ids",
    "sums+guide": "gate",
    "sums+images": "ids",
    "stats": "ids",
    "softplus+ids": "ids",
    "rows": "ids",
}
IMAGES_ONLY = ("sums+images", "stats")  # their masks are of the images' rule alone, as large as those of ids
# variants whose forward is that of one set, in its triangle
TRIANGLES = ("triangle", "hard", "busy", "lists", "guide", "stats")
SUMS = ("softplus", "softplus+ids")  # variants that are sums over pairs
RANKED = ("ranked", "ranked+guide", "sums", "sums+guide", "sums+images")  # variants that look weights up in histograms
# launches without products: Triton's defaults but for the one program that reduces a batch
ELEMENTWISE = {
    "merge": configs.Config(triton_forward.MERGE_BLOCK, 0, 0, 4, 3),
    "prologue": configs.Config(0, 0, 0, 4, 3),
    "row_losses": configs.Config(0, 0, 0, 8, 3),
}
GUIDE = 256  # features of a gate
BINS = 256  # of a histogram
SPLIT = numerics.SPLIT_PRODUCTS
POINTER = {"16-bit": "*fp16", "fp16x3": "*fp16", "bf16": "*bf16", "tf32": "*fp32", "ieee": "*fp32", "fp64": "*fp64"}


class Case(NamedTuple):
    """One compilation. The variant says what is asked for; all but the first are compiled for 16 bits only.

    plain   one exponent, number as scale; backward of one set
    triangle  forward of one set, rows and columns from the same tile
    hard    two exponents, scale tensor: both ways to shift in one kernel
    clip    column statistics, scale tensor
    busy    two exponents, ids, scale tensor
    means   the mean of frozen columns
    lists   two exponents, ids, lists, scale tensor
    guide   two exponents, a gate, scale tensor
    stats   two exponents, diagnostics, scale tensor
    ranked  backward of one set with weights from histograms; ranked+guide: and a gate
    softplus  sums over pairs, scale tensor; softplus+ids: and ids

    The direction "merge" is the kernel that adds partial results: plain finishes with everything there is, clip stays
    a partial result, means adds means. The direction "top_columns" has the longest lists, rows: and rules of single
    rows. "prologue" is that of the short road, plain forward, hard backward with the gradient of a scale tensor, rows
    and rows back without pairs; "row_losses" the formula with the most terms, "small" a batch that one program reduces,
    "large" that of many. "histogram" has a variant per pass, with ids; sums+guide is the last one with a gate,
    sums+images without rules.
    """

    direction: str
    variant: str
    products: str
    features: int
    architecture: int

    def __str__(self) -> str:
        return f"{self.direction} {self.variant} {self.products} D={self.features} sm_{self.architecture}"


def cases() -> list[Case]:
    """Every line of the table; the larger variants on sm_90 only; exact products, the same everywhere, once."""
    found = []
    for direction, features in itertools.product(configs.DIRECTIONS, configs.FEATURES):
        found += [Case(direction, "plain", "16-bit", features, a) for a in configs.ARCHITECTURES]
        found += [Case(direction, "plain", "tf32", features, a) for a in configs.ARCHITECTURES if a != 86]
        found += [Case(direction, "plain", products, features, 86) for products in ("ieee", "fp64")]
        found.append(Case(direction, "hard", "16-bit", features, 90))
    found += [Case("forward", "triangle", "16-bit", f, a) for f in configs.FEATURES for a in configs.ARCHITECTURES]
    found += [Case("forward", "triangle", "tf32", f, a) for f in (128, 1024) for a in (80, 90, 100)]
    found += [Case(direction, "busy", "16-bit", f, 90) for direction in configs.DIRECTIONS for f in (128, 1024)]
    found += [Case(direction, "plain", "bf16", f, 90) for direction in configs.DIRECTIONS for f in (128, 1024)]
    found += [
        Case(direction, "plain", "fp16x3", f, a)
        for direction in configs.DIRECTIONS
        for f in configs.FEATURES[:-1]
        for a in configs.ARCHITECTURES
    ]
    found += [Case(direction, "hard", "fp16x3", 128, 90) for direction in configs.DIRECTIONS]
    found.append(Case("forward", "means", "fp16x3", 128, 90))
    found += [Case("forward", "clip", "16-bit", features, 90) for features in (128, 1024)]
    found += [Case("forward", "means", "16-bit", features, 90) for features in (128, 256)]
    found += [Case(d, v, "16-bit", f, 90) for d in configs.DIRECTIONS for v in ("lists", "guide") for f in (128, 1024)]
    found += [Case(direction, "guide", "tf32", 128, 80) for direction in configs.DIRECTIONS]
    found += [Case("histogram", v, "16-bit", f, 90) for v in ("range", "count", "sums") for f in (128, 1024)]
    found += [Case("histogram", variant, "16-bit", 128, 90) for variant in ("sums+guide", "sums+images")]
    found += [Case("forward", "stats", "16-bit", features, 90) for features in (128, 1024)]
    found += [Case("backward", v, "16-bit", f, 90) for v in ("ranked", "ranked+guide") for f in (128, 1024)]
    found += [Case(direction, "softplus", "16-bit", f, a) for direction in configs.DIRECTIONS for f in (128, 1024)
              for a in (80, 90, 100)]  # fmt: skip
    found += [Case(direction, "softplus", p, 128, 90) for direction in configs.DIRECTIONS for p in ("tf32", "fp64")]
    found += [Case(direction, "softplus+ids", "16-bit", 128, 90) for direction in configs.DIRECTIONS]
    found += [Case("top_columns", "plain", "tf32", 128, architecture) for architecture in (80, 86, 90, 100)]
    found += [Case("top_columns", "rows", "tf32", 128, architecture) for architecture in (80, 90, 100)]
    found += [Case("top_columns", "plain", products, 128, 86) for products in ("ieee", "fp64")]
    found += [Case("merge", variant, "16-bit", 128, a) for variant in ("plain", "clip", "means") for a in (80, 100)]
    prologues = itertools.product(("plain", "hard", "rows", "rows back"), ("bf16", "ieee", "fp64"), (128, 1024))
    found += [Case("prologue", *prologue, 90) for prologue in prologues]
    found += [
        Case("row_losses", v, p, 128, a) for v in ("small", "large") for p in ("16-bit", "fp64") for a in (80, 100)
    ]
    return found


def config_of(case: Case) -> configs.Config:
    """The tile the backend would take."""
    if case.direction in ELEMENTWISE:
        return ELEMENTWISE[case.direction]
    direction = "backward" if case.variant == "means" else case.direction
    direction = "forward" if direction == "histogram" else direction
    products = {"bf16": "16-bit"}.get(case.products, "split" if case.products in SPLIT else case.products)
    mask, ranked = MASKED.get(case.variant, "images"), case.variant in RANKED
    sums = case.variant in SUMS
    two = case.variant in ("hard", *MASKED) and not (ranked or sums)
    exponents = 2 if two else 1
    return configs.choose(direction, products, case.features, case.architecture, mask, ranked, exponents, sums)


def kernel_of(case: Case) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Kernel, argument types and constants of a case."""
    return ARGUMENTS.get(case.direction, sweep_arguments)(case)


def merge_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a case that adds partial results."""
    parts = merge.Parts(7, shift=True, count=True, diagnostics=True)
    constants = {"EXPONENTS": (0.5, 1.5, 1.0), "PARTS": parts, "BLOCK": triton_forward.MERGE_BLOCK}
    if case.variant == "means":
        constants |= {"D": case.features, "BLOCK": 32, "BLOCK_D": 64}
        return merge.merge_means_kernel, dict.fromkeys(("p_partials", "p_means", "p_out"), "*fp32"), constants
    flags = {"MAXIMUM": False, "TRIANGLE": 128, "AT_ONCE": triton_forward.MERGED_AT_ONCE}
    flags["FINISH"] = case.variant == "plain"
    return merge.merge_kernel, dict.fromkeys(("p_partials", "p_lse", "p_aux"), "*fp32"), constants | flags


def top_columns_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a search for the best columns."""
    types = dict.fromkeys(("p_scorers", "p_features", "p_scores"), POINTER[case.products])
    types |= {"p_col_ids": "*i64", "p_columns": "*i32"}
    of_rows = {"p_row_ids": "*i64", "p_excluded": "*i64", "p_below": POINTER[case.products]}
    types |= of_rows if case.variant == "rows" else dict.fromkeys(of_rows)
    return top_columns.top_columns_kernel, types, {"K": top_columns.MAX_LISTED, "TILE": tile_of(case)}


def tile_of(case: Case) -> scores.Tile:
    """The constant of the sweeps."""
    config, precision = config_of(case), case.products if case.products in ("tf32", *SPLIT) else "ieee"
    return scores.Tile(case.features, config.block_m, config.block_n, config.block_d or case.features, precision)


def rule_arguments(case: Case, accumulator: str) -> tuple[dict, dict]:
    """Argument types and constants of the pair rules."""
    rule = None if case.variant in IMAGES_ONLY else MASKED.get(case.variant)
    lists, guide, ids = rule == "lists", rule == "gate", rule in ("ids", "lists")
    if rule is None:
        return {"rules": None}, {"RULES": None}
    both_ids, both_lists = ("*i64" if ids else None,) * 2, ("*i32" if lists else None,) * 2
    guides = (accumulator if guide else None,) * 3 + (
        accumulator if guide and case.direction != "histogram" else None,
    )  # rows alone are anchors of a histogram
    rules = pair_rules.Rules(False, GUIDE if guide else 0, configs.GUIDE_FEATURES[case.architecture], False)
    return {"rules": (both_ids, guides, both_lists, both_lists)}, {"RULES": rules}


def prologue_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a prologue, forward or backward."""
    block, block_d = prologue_block(case.features)
    accumulator = "*fp64" if case.products == "fp64" else "*fp32"
    constants = {"D": case.features, "BLOCK": block, "BLOCK_D": block_d, "NORMALIZE": True}
    types = dict.fromkeys(("p_z", "p_dz", "p_z1", "p_z2", "p_operands", "p_dz1", "p_dz2"), POINTER[case.products])
    if case.variant in ("rows", "rows back"):
        del constants["NORMALIZE"]
        types |= dict.fromkeys(("p_unit", "p_norm", "p_gradient"), accumulator)
        if case.variant == "rows back":
            return prologue.unit_rows_backward_kernel, types, constants
        dtypes = {"bf16": tl.bfloat16, "ieee": tl.float32, "fp64": tl.float64}
        return prologue.unit_rows_kernel, types, constants | {"DTYPE": dtypes[case.products]}
    constants["PRECISION"] = "tf32" if case.products == "tf32" else "ieee"
    if case.variant == "plain":
        return (
            prologue.prologue_kernel,
            types | dict.fromkeys(("p_norm", "p_cosine", "p_bounds"), accumulator),
            constants | {"BOUNDS": 2},
        )
    vectors = ("p_norm", "p_by_pos", "p_by_scale", "p_du", "p_dv", "p_upstream", "p_dscale", "scale")
    constants |= {"ONE_SET": True, "SCALE_IS_TENSOR": True}
    return prologue.prologue_backward_kernel, types | dict.fromkeys(vectors, accumulator), constants


def row_losses_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of the row losses, every loss stored too."""
    accumulator = "*fp64" if case.products == "fp64" else "*fp32"
    names = (
        "p_rows",
        "p_columns",
        "p_cosine",
        "scale",
        "p_clamped",
        "p_lse",
        "p_coefficients",
        "p_terms",
        "p_bounds",
        "p_losses",
        "p_sums",
    )
    constants: dict[str, Any] = {"FORMULA": triton_whole_loss._formula("hard_negative", [0.1, 1.0, 0.0])}
    constants |= {"EXPONENTS": (1.0, 2.0), "PARTS": merge.Parts(3, shift=True, count=False, diagnostics=False)}
    constants |= {"TRIANGLE": 128, "SIDES": 2, "MEAN": True}
    _, block = triton_whole_loss.blocks(triton_whole_loss.ANCHORS_OF_PROGRAM + (case.variant == "large"))
    constants |= {"BLOCK": block, "AT_ONCE": triton_whole_loss.READ_AT_ONCE // block}
    constants |= {"SCALE_IS_TENSOR": True, "LARGEST": 2.0, "BACKWARD_SHIFT": "device"}
    return row_losses.row_losses_kernel, dict.fromkeys(names, accumulator), constants


def sweep_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a case with a tile loop."""
    means, masked, triangle = case.variant == "means", case.variant in MASKED, case.variant in TRIANGLES
    columns, learned = triangle or case.variant == "clip", case.variant in ("hard", "clip", *SUMS, *MASKED)
    config = config_of(case)
    pointer, accumulator = POINTER[case.products], "*fp64" if case.products == "fp64" else "*fp32"
    ranked, sums = case.variant in RANKED, case.variant in SUMS
    exponents = (0.5, 1.5) if case.variant in ("hard", *MASKED) and not (ranked or sums) else (1.0,)
    shift = "online" if means or ranked or sums else "device" if learned else "plain"
    constants: dict[str, Any] = {
        "TILE": tile_of(case), "EXPONENTS": exponents, "LARGEST": max(exponents), "SHIFT": shift,
        "SCALE_IS_TENSOR": learned or case.products == "fp64", "HAS_IMAGES": True,
    }  # fmt: skip
    scale = accumulator if constants["SCALE_IS_TENSOR"] else "fp32"
    types: dict[str, Any] = {"u": (pointer, "i32"), "v": (pointer, "i32"), "scale": scale}
    if case.direction in configs.DIRECTIONS:
        described = (*configs.DESCRIBED, "bf16", *SPLIT)
        by_descriptor = case.architecture >= configs.DESCRIPTORS_FROM and case.products in described
        for name, rows in (("d_u", config.block_m), ("d_v", config.block_n)):
            tile = f"tensordesc<{pointer[1:]}[{rows}, {constants['TILE'].chunk}]>"
            types[name] = tile if by_descriptor else None
    rule_types, rule_constants = rule_arguments(case, accumulator)
    types, constants = types | rule_types, constants | rule_constants
    if case.direction == "histogram":
        kernel = histogram_ranks.histogram_ranks_kernel
        types |= dict.fromkeys(("p_shape", "p_out"), accumulator)
        types |= {"histograms": (accumulator, accumulator), "p_counts": "*i32"}
        for name in ("LARGEST", "SHIFT"):
            del constants[name]
        constants |= {"BINS": BINS, "PASS": case.variant.split("+")[0].upper(), "EXPONENTS": triton_ranked.WITH_SQUARES}
    elif case.direction == "forward" and sums:
        kernel = pair_sums.pair_sums_kernel
        types |= dict.fromkeys(("p_offset", "p_rows"), accumulator)
        for name in ("EXPONENTS", "LARGEST", "SHIFT"):
            del constants[name]
        constants["PARTS"] = merge.Parts(2 + masked, False, masked, False)
    elif case.direction == "forward":
        kernel = row_stats_forward.row_stats_forward_kernel
        types |= {"p_rows": accumulator, "p_columns": accumulator if columns else None}
        types |= {"p_mean": accumulator if means else None}
        stats = case.variant == "stats"
        exponents += (2 * exponents[0],) if stats else ()
        constants |= {"EXPONENTS": exponents, "LARGEST": max(exponents)}
        constants |= {"COLUMNS": columns, "TRIANGLE": triangle, "MEANS": means}
        count, has_shift = masked and not stats, shift != "plain"
        constants["PARTS"] = merge.Parts(len(exponents) + count + 2 * stats + has_shift, has_shift, count, stats)
    else:
        kernel = row_stats_backward.row_stats_backward_kernel
        types |= dict.fromkeys(("p_lse", "p_grad", "p_bounds", "p_factor"), accumulator)
        types |= {"p_power": None if case.variant == "plain" or ranked else accumulator}
        stored = pointer if case.features > configs.RESIDENT_FEATURES else accumulator
        types |= {"col_terms": (accumulator, "i32"), "out": (stored, "i32")}
        if sums:
            types |= dict.fromkeys(("col_terms", "p_bounds", "p_power"))
        histograms = (accumulator, accumulator)
        types["ranks"] = (histograms, histograms, accumulator) if ranked else None
        constants |= {"SIGMOID": sums, "FORWARD": True, "REVERSE": not sums, "TIMES_SCALE": True}
        constants |= {"BINS": BINS if ranked else 0}
    return kernel, types, constants


ARGUMENTS = {  # the others have a tile loop of the row statistics
    "merge": merge_arguments,
    "top_columns": top_columns_arguments,
    "prologue": prologue_arguments,
    "row_losses": row_losses_arguments,
}
