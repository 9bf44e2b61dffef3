"""Compiles the Triton kernels in every configuration of their table for sm_80, sm_90 and sm_100, without a GPU.

    python tools/gate.py [--only TEXT] [--write] [--jobs 2]        `make gate`

Fails unless every 16-bit and TF32 kernel uses tensor cores (WGMMA on sm_90 for 16 bits), spills nothing (KNOWN_STACKS
apart), fits the shared memory of its architecture and keeps to MOST_INSTRUCTIONS. Prints what differs from
docs/compiled. Pointers are declared divisible by 16, as they are at run time: without that another kernel is compiled.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from contrastive_ext.triton_kernels import (
    configs,
    histogram_ranks,
    merge,
    prologue,
    row_losses,
    row_stats_backward,
    row_stats_forward,
    top_columns,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from contrastive_ext.backends.triton import ranked_stats as triton_ranked
from contrastive_ext.backends.triton import sweeps as triton_sweeps
from contrastive_ext.backends.triton import whole_loss as triton_whole_loss

# bytes a block may use: CUDA C++ programming guide, "Technical Specifications per Compute Capability"
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
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
}
IMAGES_ONLY = ("sums+images", "stats")  # their masks are of the images' rule alone, as large as those of ids
# variants whose forward is that of one set, in its triangle
TRIANGLES = ("triangle", "hard", "busy", "lists", "guide", "stats")
RANKED = ("ranked", "ranked+guide", "sums", "sums+guide", "sums+images")  # variants that look weights up in histograms
# launches without products: Triton's defaults but for the one program that reduces a batch
ELEMENTWISE = {
    "merge": configs.Config(triton_sweeps.MERGE_BLOCK, 0, 0, 4, 3),
    "prologue": configs.Config(0, 0, 0, 4, 3),
    "row_losses": configs.Config(0, 0, 0, 8, 3),
}
# Bytes of kernels that an H200 has timed fastest all the same: of the branch with a running maximum, or a few at 255
# registers.
KNOWN_STACKS = {
    ("forward", "clip", 128): 160,
    ("forward", "triangle", 128): 16,
    ("backward", "plain", 256): 16,
    ("backward", "plain", 1024): 56,
}
# fp16 ("16-bit") multiplies by the scaling of its weights too
MOST_INSTRUCTIONS = {
    ("backward", "plain", "bf16", 128): 560,
    ("backward", "plain", "16-bit", 128): 640,
    ("backward", "plain", "16-bit", 256): 900,
}
MASKS_FROM = 60  # instructions that a branch must skip to count as the block of masks
TENSOR_CORES = ("16-bit", "bf16", "tf32")  # "16-bit" stands for fp16, which scales its weights
GUIDE = 256  # features of a gate
BINS = 256  # of a histogram
ROOT = Path(__file__).resolve().parents[1]
COMPILED = ROOT / "docs" / "compiled"  # the table of every Triton it was written for: what an update changes is a diff
POINTER = {"16-bit": "*fp16", "bf16": "*bf16", "tf32": "*fp32", "ieee": "*fp32", "fp64": "*fp64"}


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

    The direction "merge" is the kernel that adds partial results: plain finishes with everything there is, clip stays
    a partial result, means adds means. The direction "top_columns" has the longest lists. "prologue" is that of the
    short road, plain forward, hard backward with the gradient of a scale tensor; "row_losses" the formula with the most
    terms, "small" a batch that one program reduces, "large" that of many. "histogram" has a variant per pass, with ids;
    sums+guide is the last one with a gate, sums+images without rules.
    """

    direction: str
    variant: str
    products: str
    features: int
    architecture: int

    def __str__(self) -> str:
        return f"{self.direction} {self.variant} {self.products} D={self.features} sm_{self.architecture}"


class Outcome(NamedTuple):
    """What came of a case."""

    registers: int
    stack: int
    shared: int
    instruction: str
    hot_loop: int  # instructions of a warp for 128x128 pairs and 8 warps, masked tiles apart; 0: not counted
    faults: list[str]


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
    found += [Case("forward", "clip", "16-bit", features, 90) for features in (128, 1024)]
    found += [Case("forward", "means", "16-bit", features, 90) for features in (128, 256)]
    found += [Case(d, v, "16-bit", f, 90) for d in configs.DIRECTIONS for v in ("lists", "guide") for f in (128, 1024)]
    found += [Case(direction, "guide", "tf32", 128, 80) for direction in configs.DIRECTIONS]
    found += [Case("histogram", v, "16-bit", f, 90) for v in ("range", "count", "sums") for f in (128, 1024)]
    found += [Case("histogram", variant, "16-bit", 128, 90) for variant in ("sums+guide", "sums+images")]
    found += [Case("forward", "stats", "16-bit", features, 90) for features in (128, 1024)]
    found += [Case("backward", v, "16-bit", f, 90) for v in ("ranked", "ranked+guide") for f in (128, 1024)]
    found += [Case("top_columns", "plain", "tf32", 128, architecture) for architecture in (80, 86, 90, 100)]
    found += [Case("top_columns", "plain", products, 128, 86) for products in ("ieee", "fp64")]
    found += [Case("merge", variant, "16-bit", 128, a) for variant in ("plain", "clip", "means") for a in (80, 100)]
    prologues = itertools.product(("plain", "hard"), ("bf16", "ieee", "fp64"), (128, 1024))
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
    products = "16-bit" if case.products == "bf16" else case.products
    mask, ranked = MASKED.get(case.variant, "images"), case.variant in RANKED
    two = case.variant in ("hard", *MASKED) and not ranked
    return configs.choose(direction, products, case.features, case.architecture, mask, ranked, 2 if two else 1)


def compile_case(case: Case):
    """The compiled kernel of a case."""
    kernel, types, constants = ARGUMENTS.get(case.direction, sweep_arguments)(case)
    config = config_of(case)
    constants |= {name: None for name, type_ in types.items() if type_ is None}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    any_alignment = {kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = [
        i
        for i, (name, type_) in enumerate(signature.items())
        if (type_.startswith("*") and name not in any_alignment) or name.startswith("stride")
    ]
    source = ASTSource(
        kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)


def merge_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a case that adds partial results."""
    constants = {"EXPONENTS": (0.5, 1.5, 1.0), "NUM_PARTS": 7, "BLOCK": triton_sweeps.MERGE_BLOCK}
    if case.variant == "means":
        constants |= {"D": case.features, "BLOCK": 32, "BLOCK_D": 64}
        return merge.merge_means_kernel, dict.fromkeys(("p_partials", "p_means", "p_out"), "*fp32"), constants
    flags = {"HAS_SHIFT": True, "COUNTED": True, "DIAGNOSTICS": True, "MAXIMUM": False, "TRIANGLE": 128}
    flags["AT_ONCE"] = triton_sweeps.MERGED_AT_ONCE
    flags["FINISH"] = case.variant == "plain"
    return merge.merge_kernel, dict.fromkeys(("p_partials", "p_lse", "p_aux"), "*fp32"), constants | flags


def top_columns_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a search for the best columns."""
    pointer, config = POINTER[case.products], config_of(case)
    types = dict.fromkeys(("p_scorers", "p_features", "p_scores"), pointer)
    types |= {"p_col_ids": "*i64", "p_columns": "*i32"}
    constants = {"D": case.features, "K": top_columns.MAX_LISTED, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_D": config.block_d, "PRECISION": "tf32" if case.products == "tf32" else "ieee"}
    return top_columns.top_columns_kernel, types, constants


def rule_arguments(case: Case, accumulator: str) -> tuple[dict, dict]:
    """Argument types and constants of the pair rules."""
    rule = None if case.variant in IMAGES_ONLY else MASKED.get(case.variant)
    lists, guide, ids = rule == "lists", rule == "gate", rule in ("ids", "lists")
    types = dict.fromkeys(("p_row_ids", "p_col_ids"), "*i64" if ids else None)
    types |= dict.fromkeys(("p_listed_starts", "p_listed", "p_listing_starts", "p_listing"), "*i32" if lists else None)
    types |= dict.fromkeys(("p_row_guide", "p_col_guide", "p_row_limit"), accumulator if guide else None)
    types["p_col_limit"] = accumulator if guide and case.direction != "histogram" else None
    rules = (False, GUIDE if guide else 0, configs.GUIDE_FEATURES[case.architecture], False)
    return types, {"RULES": rules if rule else None}


def prologue_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a prologue, forward or backward."""
    block, block_d = triton_whole_loss._prologue_block(case.features)
    accumulator = "*fp64" if case.products == "fp64" else "*fp32"
    constants = {"D": case.features, "BLOCK": block, "BLOCK_D": block_d, "NORMALIZE": True}
    types = dict.fromkeys(("p_z1", "p_z2", "p_operands", "p_dz1", "p_dz2"), POINTER[case.products])
    constants["PRECISION"] = "tf32" if case.products == "tf32" else "ieee"
    if case.variant == "plain":
        return prologue.prologue_kernel, types | dict.fromkeys(("p_norm", "p_cosine"), accumulator), constants
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
        "p_losses",
        "p_sums",
    )
    constants = triton_whole_loss._formula("hard_negative", [0.1, 1.0, 0.0])
    constants |= {"EXPONENTS": (1.0, 2.0), "NUM_PARTS": 3, "HAS_SHIFT": True, "TRIANGLE": 128, "SIDES": 2, "MEAN": True}
    _, block = triton_whole_loss.blocks(triton_whole_loss.ANCHORS_OF_PROGRAM + (case.variant == "large"))
    constants |= {"BLOCK": block, "AT_ONCE": triton_whole_loss.READ_AT_ONCE // block}
    constants |= {"SCALE_IS_TENSOR": True, "LARGEST": 2.0, "BACKWARD_SHIFT": "device"}
    return row_losses.row_losses_kernel, dict.fromkeys(names, accumulator), constants


def sweep_arguments(case: Case) -> tuple[Any, dict, dict]:
    """Kernel, argument types and constants of a case with a tile loop."""
    means, masked, triangle = case.variant == "means", case.variant in MASKED, case.variant in TRIANGLES
    columns, learned = triangle or case.variant == "clip", case.variant in ("hard", "clip", *MASKED)
    config = config_of(case)
    pointer, accumulator = POINTER[case.products], "*fp64" if case.products == "fp64" else "*fp32"
    ranked = case.variant in RANKED
    exponents = (0.5, 1.5) if case.variant in ("hard", *MASKED) and not ranked else (1.0,)
    shift = "online" if means or ranked else "device" if learned else "plain"
    constants: dict[str, Any] = {
        "D": case.features, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d or case.features, "EXPONENTS": exponents, "LARGEST": max(exponents), "SHIFT": shift,
        "SCALE_IS_TENSOR": learned or case.products == "fp64", "HAS_IMAGES": True,
        "PRECISION": "tf32" if case.products == "tf32" else "ieee",
    }  # fmt: skip
    scale = accumulator if constants["SCALE_IS_TENSOR"] else "fp32"
    types: dict[str, str | None] = {"p_u": pointer, "p_v": pointer, "scale": scale}
    if case.direction in configs.DIRECTIONS:
        by_descriptor = case.architecture >= configs.DESCRIPTORS_FROM and case.products in (*configs.DESCRIBED, "bf16")
        for name, rows in (("d_u", config.block_m), ("d_v", config.block_n)):
            tile = f"tensordesc<{pointer[1:]}[{rows}, {constants['BLOCK_D']}]>"
            types[name] = tile if by_descriptor else None
    rule_types, rule_constants = rule_arguments(case, accumulator)
    types, constants = types | rule_types, constants | rule_constants
    if case.direction == "histogram":
        kernel = histogram_ranks.histogram_ranks_kernel
        types |= dict.fromkeys(("p_axis", "p_below", "p_shape", "p_out"), accumulator)
        types["p_counts"] = "*i32"
        for name in ("LARGEST", "SHIFT"):
            del constants[name]
        constants |= {"BINS": BINS, "PASS": case.variant.split("+")[0].upper(), "EXPONENTS": triton_ranked.WITH_SQUARES}
    elif case.direction == "forward":
        kernel = row_stats_forward.row_stats_forward_kernel
        types |= {"p_rows": accumulator, "p_columns": accumulator if columns else None}
        types |= {"p_mean": accumulator if means else None}
        stats = case.variant == "stats"
        exponents += (2 * exponents[0],) if stats else ()
        constants |= {"EXPONENTS": exponents, "LARGEST": max(exponents)}
        constants |= {"COLUMNS": columns, "TRIANGLE": triangle, "MEANS": means, "DIAGNOSTICS": stats}
        constants["NUM_PARTS"] = len(exponents) + (2 if stats else masked) + (shift != "plain")
    else:
        kernel = row_stats_backward.row_stats_backward_kernel
        types |= dict.fromkeys(("p_lse", "p_grad", "p_col_terms", "p_col_grad", "p_factor"), accumulator)
        types |= {"p_power": None if case.variant == "plain" or ranked else accumulator}
        types |= {"p_out": pointer if case.features > configs.RESIDENT_FEATURES else accumulator}
        tables = ("p_row_axis", "p_row_below", "p_col_axis", "p_col_below", "p_shape")
        types |= dict.fromkeys(tables, accumulator if ranked else None)
        constants |= {"FORWARD": True, "REVERSE": True, "TIMES_SCALE": True, "BINS": BINS if ranked else 0}
    return kernel, types, constants


ARGUMENTS = {  # the others have a tile loop of the row statistics
    "merge": merge_arguments,
    "top_columns": top_columns_arguments,
    "prologue": prologue_arguments,
    "row_losses": row_losses_arguments,
}


def examine(case: Case) -> Outcome:
    """Compile a case and judge the result."""
    try:
        compiled = compile_case(case)
    except Exception as error:  # ptxas, the compiler passes and the frontend raise whatever they like
        return Outcome(0, 0, 0, "", 0, [f"does not compile: {str(error).strip().splitlines()[-1][:200]}"])
    registers, stack = resource_usage(compiled.asm["cubin"])
    hot_loop = 0
    if case.direction in configs.DIRECTIONS and case.features <= configs.RESIDENT_FEATURES and case.architecture == 90:
        config = config_of(case)
        per_tile = instructions_of_loop(compiled.asm["cubin"])
        hot_loop = round(per_tile * 128 * 128 / (config.block_m * config.block_n) * config.num_warps / 8)
    found = re.findall(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync|\bfma\.rn", compiled.asm["ptx"])
    instruction = min(found, key=("tcgen05.mma", "wgmma.mma_async", "mma.sync", "fma.rn").index, default="none")
    shared, faults = compiled.metadata.shared, []
    if case.direction == "prologue" and re.search(r"\b(div|rcp)\.(full|approx)", compiled.asm["ptx"]):
        faults.append("an approximate division: div.rn is what makes rows of one feature exactly 1 or -1")
    if shared > SHARED_LIMIT[case.architecture]:
        faults.append(f"{shared} bytes of shared memory > {SHARED_LIMIT[case.architecture]}")
    if hot_loop > MOST_INSTRUCTIONS.get((case.direction, case.variant, case.products, case.features), hot_loop):
        faults.append(f"{hot_loop} instructions for 128x128 pairs")
    if case.products in TENSOR_CORES and stack > KNOWN_STACKS.get((case.direction, case.variant, case.features), 0):
        faults.append(f"{stack} bytes on the stack (spills)")
    if case.products in TENSOR_CORES and case.direction not in ELEMENTWISE:
        if instruction in ("none", "fma.rn"):
            faults.append("no tensor-core instructions")
        if case.products != "tf32" and case.architecture == 90 and instruction != "wgmma.mma_async":
            faults.append(f"{instruction} instead of wgmma")
    return Outcome(registers, stack, shared, instruction, hot_loop, faults)


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the tool in Triton's wheel says of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def instructions_of_loop(cubin: bytes) -> int:
    """Instructions of the first loop with products; what a branch forwards skips, the masks, is left out."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump("-sass", cubin))]
    place = {at: i for i, (at, _) in enumerate(code)}
    targets = [(i, place.get(int(to, 16), i)) for i, (_, text) in enumerate(code) for to in _branch_target(text)]
    for end, start in targets:
        if start < end and any("HGMMA" in text for _, text in code[start:end]):
            inside = [(i, to) for i, to in targets if start <= i < to <= end and to - i > MASKS_FROM]
            skipped, last = 0, start
            for i, to in inside:
                if i >= last:
                    skipped, last = skipped + to - i - 1, to
            return end - start + 1 - skipped
    return 0


def _branch_target(text: str) -> list[str]:
    return re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of stack and local memory."""
    output = cuobjdump("-res-usage", cubin)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def table(results: list[tuple[Case, Outcome]]) -> str:
    """Markdown, one line per case."""
    lines = [
        "| kernel | variant | products | D | arch | tile | warps, stages | registers | stack | KiB | instruction "
        "| loop |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, outcome in results:
        config = config_of(case)
        tile = "x".join(str(size) for size in config[:3] if size)
        features = f"> {configs.RESIDENT_FEATURES}" if case.features > configs.RESIDENT_FEATURES else case.features
        lines.append(
            f"| {case.direction} | {case.variant} | {case.products} | {features} | sm_{case.architecture} | {tile} "
            f"| {config.num_warps}, {config.num_stages} | {outcome.registers} | {outcome.stack} "
            f"| {outcome.shared / 1024:.0f} | {outcome.instruction} | {outcome.hot_loop or '-'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose description contains this text")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {COMPILED.relative_to(ROOT)}/")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in str(case)]
    with ProcessPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(examine, chosen))
    print(f"Triton {triton.__version__}, {len(chosen)} kernels\n")
    text, kept = table(list(zip(chosen, outcomes, strict=True))) + "\n", COMPILED / f"triton-{triton.__version__}.md"
    if options.write:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text)
    elif kept.is_file() and not options.only:
        print(
            *difflib.unified_diff(kept.read_text().splitlines(), text.splitlines(), kept.name, "now", n=0, lineterm=""),
            sep="\n",
        )
    else:
        print(text)
    faults = [f"{case}: {fault}" for case, outcome in zip(chosen, outcomes, strict=True) for fault in outcome.faults]
    print("\n" + "\n".join(faults or ["gate: green"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
