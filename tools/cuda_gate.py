"""Compiles the Hopper kernels (csrc/cuda) for sm_90a and reads the code, without a GPU.

    python tools/cuda_gate.py          part of `make gate`; needs nvcc, and cuobjdump from CUDA or Triton
    python tools/cuda_gate.py ladder   build build/ladder and run it: needs a Hopper GPU
    python tools/cuda_gate.py build-ladder PROGRAM

Fails unless every kernel spills nothing and uses no stack, every sweep has the products (WGMMA) and loads (TMA) that
are meant, fits the registers that its warps may have and keeps to LOOPS, and the compiler has not serialised
asynchronous products. Prints the table of docs/measurements.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import sass

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "csrc" / "cuda"
LADDER = ROOT / "tests" / "csrc" / "cuda" / "ladder.cu"
SOURCES = [FOLDER / f"{name}.cu" for name in ("row_stats_forward", "row_stats_backward")]
ARCHITECTURE = "90a"
# 288 threads are nine warps, three of them on one of the four partitions: 16,384 registers / 96, in steps of 8.
# 384 threads begin with as many; those of the backward hand them over, 24 for a producer and 240 for a consumer.
MOST_REGISTERS = {"row_stats_forward": 168, "row_stats_backward": 240}
MOST_OF_PRODUCER = 24
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UBLKCP", "STL", "LDL")
# instructions of a warp for an unmasked tile, in each loop of a kernel: 128 columns, of the backward at D = 256 64
LOOPS = {
    "row_stats_forward 64": (272, 510),  # without a shift, with a running maximum
    "row_stats_forward 128": (292, 530),
    "row_stats_forward 256": (330, 570),
    "row_stats_forward 64 columns": (460, 1295),
    "row_stats_forward 128 columns": (488, 1325),
    "row_stats_forward 256 columns": (545, 1382),
    "row_stats_backward 64 rows": (345,),
    "row_stats_backward 64 columns": (365,),
    "row_stats_backward 64 both": (620, 405),  # an exponential for each direction, one for both
    "row_stats_backward 128 rows": (365,),
    "row_stats_backward 128 columns": (385,),
    "row_stats_backward 128 both": (645, 430),
    "row_stats_backward 256 rows": (270,),
    "row_stats_backward 256 columns": (285,),
    "row_stats_backward 256 both": (415, 310),
}


def meant(name: str) -> dict[str, int]:
    """Products and loads in the text of a sweep: steps of 16, boxes of 64 features."""
    sweep, features, *terms = name.split()
    steps, loops = int(features) // 16, len(LOOPS[name])
    if sweep == "row_stats_backward":
        steps += 2 * (64 if int(features) > 128 else 128) // 16  # weights by the tile, in the loop and behind it
    copies = int(sweep == "row_stats_backward" and terms != ["rows"])
    return {"HGMMA": loops * steps, "UTMALDG": 2 * int(features) // 64, "UBLKCP": copies}


class Kernel(NamedTuple):
    """What the compiler made of a kernel."""

    name: str
    registers: int
    stack: int
    spills: int
    counts: dict[str, int]
    loops: list[int]  # instructions of a warp for an unmasked tile
    producer: int  # registers of the warps that hand theirs over, 0: none does

    @property
    def has_tiles(self) -> bool:
        """Whether it is one of the sweeps."""
        return self.name.startswith("row_stats")

    def faults(self) -> list[str]:
        """Why it must not pass."""
        found = []
        if self.stack or self.spills or self.counts["STL"] or self.counts["LDL"]:
            found.append(f"{self.stack} bytes of stack, {self.spills} of spills")
        if self.has_tiles:
            found += self._beyond()
        return [f"{self.name}: {fault}" for fault in found]

    def _beyond(self) -> list[str]:
        """What of a sweep is not as meant."""
        found = []
        instance = self.name.rsplit(" ", 1)[0]
        most = MOST_REGISTERS[self.name.split()[0]]
        if self.registers > most or self.producer > MOST_OF_PRODUCER:
            found.append(f"{self.registers} registers > {most}, or {self.producer} > {MOST_OF_PRODUCER} of a producer")
        for instruction, count in meant(instance).items():
            if self.counts[instruction] != count:
                found.append(f"{self.counts[instruction]} {instruction}, meant are {count}")
        limits = LOOPS[instance]
        if len(self.loops) != len(limits) or any(n > most for n, most in zip(self.loops, limits, strict=True)):
            found.append(f"loops of {self.loops} instructions, at most {limits}")
        return found


def find_nvcc() -> str | None:
    """As setup.py looks for it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """CUDA's, or the one that Triton ships."""
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path("none")
    return shutil.which("cuobjdump") or (str(shipped) if shipped.is_file() else None)


def run_nvcc(nvcc: str, *arguments: str) -> str:
    """Compile with the flags of setup.py; what the compiler said."""
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"]
    done = subprocess.run([nvcc, *flags, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build_ladder(nvcc: str, program: Path) -> int:
    """The program that climbs from one tile to the whole kernels; it needs a GPU to run."""
    compile_ladder(nvcc, *map(str, SOURCES), "-o", str(program))
    return 0


def compile_ladder(nvcc: str, *arguments: str) -> None:
    """Its own file, and what else `arguments` name."""
    run_nvcc(nvcc, "-Werror=all-warnings", f"-I{FOLDER.parent}", str(LADDER), *arguments)


def readable(mangled: str) -> str:
    """ "row_stats_backward 128 both fp16" of the mangled name of a kernel."""
    (name,) = re.findall(r"\d([a-z][a-z_]*)_kernel", mangled)
    instance = re.search(r"OperandE(\d)ELi(\d+)E(?:Lb(\d)E)?(?:.*TermsE(\d))?", mangled)
    if instance is None:
        return name
    operand, features, has_columns, terms = instance.groups()
    sides = [("rows", "columns", "both")[int(terms)]] if terms else ["columns"] if has_columns == "1" else []
    return " ".join([name, features, *sides, ("fp16", "bf16")[int(operand)]])


def read_kernels(log: str, disassembly: str) -> list[Kernel]:
    """The kernels in the compiler's log and in the disassembly."""
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", disassembly, flags=re.DOTALL))
    kernels = []
    for mangled, text in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL):
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text))
        (registers,) = map(int, re.findall(r"Used (\d+) registers", text))
        counts = {i: len(re.findall(rf"\b{re.escape(i)}\b", code[mangled])) for i in INSTRUCTIONS}
        producer = sass.registers_of_producer(code[mangled])
        if producer:  # then ptxas reports what all begin with
            registers = sass.registers_named(code[mangled])
        loops = sass.loops(code[mangled])
        kernels.append(Kernel(readable(mangled), registers, stack, stores + loads, counts, loops, producer))
    return kernels


def examine(nvcc: str, cuobjdump: str) -> tuple[list[Kernel], list[str]]:
    """All kernels, and what is wrong with them."""
    kernels: list[Kernel] = []
    faults = []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            log = run_nvcc(nvcc, "-Xptxas=-v", "-cubin", str(source), "-o", str(cubin))
            read = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
        kernels += read_kernels(log, read.stdout)
        # "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...", or a wait put in between
        said = ("serialized", "warning", "injected")
        faults += [line.strip() for line in log.splitlines() if any(word in line.lower() for word in said)]
    kernels.sort(key=lambda kernel: [(len(word), word) for word in kernel.name.split()])
    return kernels, [fault for kernel in kernels for fault in kernel.faults()] + faults


def table(kernels: list[Kernel]) -> str:
    """Markdown, one line per kernel."""
    lines = ["| kernel | registers | stack | spills | HGMMA | UTMALDG | loops |", "|---|---|---|---|---|---|---|"]
    for kernel in kernels:
        counts = " | ".join(str(kernel.counts[i]) for i in INSTRUCTIONS[:2])
        loops = ", ".join(map(str, kernel.loops)) or "-"
        lines.append(f"| {kernel.name} | {kernel.registers} | {kernel.stack} | {kernel.spills} | {counts} | {loops} |")
    return "\n".join(lines)


def climb_ladder(nvcc: str | None) -> int:
    """Build the ladder and run it."""
    if nvcc is None:
        print("The ladder needs nvcc (CUDA_HOME, PATH).")
        return 1
    program = ROOT / "build" / "ladder"
    program.parent.mkdir(exist_ok=True)
    build_ladder(nvcc, program)
    return subprocess.run([program], check=False).returncode


def main() -> int:
    if sys.argv[1:] == ["ladder"]:
        return climb_ladder(find_nvcc())
    if sys.argv[1:2] == ["build-ladder"]:
        nvcc = find_nvcc()
        return 0 if nvcc is None else build_ladder(nvcc, Path(sys.argv[2]))
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        print(f"The Hopper kernels are not examined: {'nvcc' if nvcc is None else 'cuobjdump'} was not found.")
        return 0
    kernels, faults = examine(nvcc, cuobjdump)
    print(f"sm_{ARCHITECTURE}, {len(kernels)} kernels\n\n{table(kernels)}\n")
    print("\n".join(faults or ["gate: green"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
