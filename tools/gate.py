"""Compiles the Triton kernels in every configuration of their table for sm_80, sm_90 and sm_100, without a GPU.

    python tools/gate.py [--only TEXT] [--write] [--jobs 2]        `make gate`

Fails unless every 16-bit and TF32 kernel uses tensor cores (WGMMA on sm_90 for 16 bits), spills nothing (KNOWN_STACKS
apart), fits the shared memory of its architecture and keeps to MOST_INSTRUCTIONS. Prints what differs from
docs/compiled. Pointers are declared divisible by 16, as they are at run time: without that another kernel is compiled.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass
import triton
from contrastive_ext.triton_kernels import configs
from gate_cases import ELEMENTWISE, SPLIT, Case, cases, config_of, kernel_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# bytes a block may use: CUDA C++ programming guide, "Technical Specifications per Compute Capability"
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of kernels that an H200 has timed fastest all the same: of the branch with a running maximum, or a few at 255
# registers.
KNOWN_STACKS = {
    ("forward", "clip", 128): 160,
    ("forward", "clip", 1024): 8,  # Triton 3.8 alone
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
WGMMA_ROWS = 64  # of the smallest product
TENSOR_CORES = ("16-bit", "bf16", "tf32", *SPLIT)  # "16-bit" stands for fp16, which scales its weights
ROOT = Path(__file__).resolve().parents[1]
COMPILED = ROOT / "docs" / "compiled"  # the table of every Triton it was written for: what an update changes is a diff


class Outcome(NamedTuple):
    """What came of a case."""

    registers: int
    stack: int
    shared: int
    instruction: str
    hot_loop: int  # instructions of a warp for 128x128 pairs and 8 warps, masked tiles apart; 0: not counted
    faults: list[str]


def compile_case(case: Case):
    """The compiled kernel of a case."""
    kernel, types, constants = kernel_of(case)
    config = config_of(case)
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    any_alignment = {p.num for p in kernel.params if p.do_not_specialize_on_alignment}
    leaves = dict(_leaves(tuple(signature.values())))
    constants |= {path: None for path, type_ in leaves.items() if type_ is None}
    # numbers inside of tuples are strides, too
    aligned = [
        path
        for path, type_ in leaves.items()
        if (str(type_).startswith("*") and path[0] not in any_alignment)
        or kernel.arg_names[path[0]].startswith("stride")
        or (len(path) > 1 and type_ == "i32")
    ]
    attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(kernel, {k: _constexprs(t) for k, t in signature.items()}, constexprs=constants, attrs=attrs)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)


def _leaves(types, path: tuple[int, ...] = ()):
    """(path, type) of everything inside of nested tuples of types."""
    if not isinstance(types, tuple):
        yield path, types
        return
    for i, inner in enumerate(types):
        yield from _leaves(inner, (*path, i))


def _constexprs(types):
    """Types with "constexpr" for None."""
    return tuple(map(_constexprs, types)) if isinstance(types, tuple) else types or "constexpr"


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
        wide = config_of(case).block_m >= WGMMA_ROWS and case.products != "tf32"
        if wide and case.architecture == 90 and instruction != "wgmma.mma_async":
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
    """Instructions of the first loop with products, masks left out."""
    return next(iter(sass.loops(cuobjdump("-sass", cubin))), 0)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of stack and local memory."""
    output = cuobjdump("-res-usage", cubin)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


HEAD = [
    "| kernel | variant | products | D | arch | tile | warps, stages | registers | stack | KiB | instruction | loop |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def name_in_table(case: Case) -> str:
    """How the line of a case begins."""
    features = f"> {configs.RESIDENT_FEATURES}" if case.features > configs.RESIDENT_FEATURES else case.features
    return f"| {case.direction} | {case.variant} | {case.products} | {features} | sm_{case.architecture} |"


def line(case: Case, outcome: Outcome) -> str:
    """The line of a case, Markdown."""
    config = config_of(case)
    tile = "x".join(str(size) for size in config[:3] if size)
    return (
        f"{name_in_table(case)} {tile} | {config.num_warps}, {config.num_stages} | {outcome.registers} "
        f"| {outcome.stack} | {outcome.shared / 1024:.0f} | {outcome.instruction} | {outcome.hot_loop or '-'} |"
    )


def table(found: dict[str, str], kept: str = "") -> str:
    """All cases that have a line, in `found` by their names in the table or else in the table `kept`."""
    before = {name_of_line(old): old for old in kept.splitlines()[len(HEAD) :]}
    names = [name_in_table(case) for case in cases()]
    return "\n".join([*HEAD, *((before | found)[name] for name in names if name in before or name in found)]) + "\n"


def name_of_line(text: str) -> str:
    """`name_in_table` of a line."""
    return "|".join(text.split("|")[:6]) + "|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose description contains this text")
    parser.add_argument("--write", action="store_true", help=f"keep these lines in {COMPILED.relative_to(ROOT)}/")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in str(case)]
    with ProcessPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(examine, chosen))
    print(f"Triton {triton.__version__}, {len(chosen)} kernels\n")
    found = {name_in_table(case): line(case, outcome) for case, outcome in zip(chosen, outcomes, strict=True)}
    path = COMPILED / f"triton-{triton.__version__}.md"
    kept = path.read_text() if path.is_file() else ""
    if options.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(table(found, kept))
    elif kept:
        difference = difflib.unified_diff(
            kept.splitlines(), table(found, kept).splitlines(), path.name, "now", n=0, lineterm=""
        )
        print(*difference, sep="\n")
    if options.only or not kept:
        print(table(found))
    faults = [f"{case}: {fault}" for case, outcome in zip(chosen, outcomes, strict=True) for fault in outcome.faults]
    print("\n" + "\n".join(faults or ["gate: green"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
