"""Products by tile registers: the model of the instructions against their description in numpy, layouts and ragged
sizes, weights in three parts, the check of the first use, and the machine code of the AMX unit."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from contrastive_ext.backends import native as library
from native_code import CXX, compile_module
from repository import ROOT

SOURCES = [
    *(ROOT / f"csrc/cpu/{unit}.cpp" for unit in ("bf16_kernels_amx", "bf16_kernels_model", "bf16_choice")),
    ROOT / "tests/csrc/cpu/chosen_isa.cpp",
]
BLOCK, PANEL = 32, 16
TINY = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native_bf16")


@pytest.fixture(scope="session")
def native(built: Path) -> ModuleType:
    return compile_module(built, "native_bf16", [ROOT / "tests/csrc/cpu/bf16_products.cpp", *SOURCES])


def bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of numbers that bf16 holds."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def values(upper: np.ndarray) -> np.ndarray:
    return (upper.astype(np.uint32) << 16).view(np.float32)


def random_bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return values((rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))


# ---- the model of the instructions


def described(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """TDPBF16PS of float32 c [M, N] and bf16 a [M, 2K], b [2K, N], as it is described: sums of even and of odd elements
    by fused multiply-adds, then their sum is added to c. A product of two bf16 is exact in float64, its sum with a
    float32 is rounded once more only if their exponents are far apart: the data below avoid that."""

    def flushed(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x).astype(np.float32)

    a, b = flushed(a).astype(np.float64), flushed(b).astype(np.float64)
    sums = np.zeros((2, *c.shape), np.float32)
    for k in range(a.shape[1]):
        sums[k % 2] = flushed((sums[k % 2] + a[:, k, None] * b[k]).astype(np.float32))
    return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def pairs_of_rows(b: np.ndarray) -> np.ndarray:
    """[2K, N] as the instruction reads it: [K, 2N], elements 2k and 2k + 1 of a column side by side."""
    return np.ascontiguousarray(b.reshape(-1, 2, b.shape[1]).transpose(0, 2, 1).reshape(-1, 2 * b.shape[1]))


@pytest.mark.parametrize("m, k, n", [(16, 16, 16), (1, 1, 1), (3, 5, 7), (16, 1, 2)])
def test_a_dot_of_registers_is_what_its_description_says(native: ModuleType, m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(m + n)
    a, b = random_bf16(rng, m, 2 * k), random_bf16(rng, 2 * k, n)
    c = rng.standard_normal((m, n)).astype(np.float32)
    got = native.dot(c, bf16(a), bf16(pairs_of_rows(b)))
    assert got.tobytes() == described(c, a, b).tobytes()


def test_a_dot_rounds_to_even_and_flushes_denormals(native: ModuleType) -> None:
    def one(c: float, *products: tuple[float, float]) -> float:
        a, b = np.array([[x for x, _ in products]], np.float32), np.array([[y] for _, y in products], np.float32)
        return float(native.dot(np.array([[c]], np.float32), bf16(a), bf16(pairs_of_rows(b)))[0, 0])

    half = 2.0**-24  # half a unit in the last place of 1
    assert one(1.0, (half, 1), (0, 0)) == 1.0  # the tie goes to the even number below,
    assert one(1.0 + 2 * half, (half, 1), (0, 0)) == 1.0 + 4 * half  # and to the one above
    # 1 + half is 1 again: one after the other all would be lost, but odd elements have a sum of their own,
    assert one(0.0, (1, 1), (half, 1), (half, 1), (half, 1)) == 1.0 + 2 * half
    assert one(0.0, (1, 1), (0, 0), (half, 1), (0, 0), (half, 1), (0, 0)) == 1.0
    assert one(1.0, (half, 1), (0, 0), (half, 1), (0, 0)) == 1.0 + 2 * half  # and the accumulator comes last
    assert one(0.0, (TINY / 2, 2.0**10), (0, 0)) == 0.0  # an operand,
    assert one(0.0, (2.0**-100, 2.0**-30), (0, 0)) == 0.0  # a product,
    assert one(TINY / 2, (0, 0), (0, 0)) == 0.0  # an accumulator,
    assert one(-1.5 * TINY, (TINY, 1), (0, 0)) == 0.0  # a sum
    assert one(0.0, (TINY, 1), (0, 0)) == TINY
    assert np.isnan(one(0.0, (np.inf, 1), (-np.inf, 1)))


# ---- products in blocks


def padded(size: int, multiple: int = BLOCK) -> int:
    return -(-size // multiple) * multiple


def as_rows(a: np.ndarray) -> np.ndarray:
    """[parts, rows, depth] in whole blocks; rows beyond are poison, depth beyond is 0."""
    out = np.full((len(a), padded(a.shape[1]), padded(a.shape[2])), 0x7FC0, np.uint16)
    out[:, : a.shape[1]] = 0
    out[:, : a.shape[1], : a.shape[2]] = bf16(a)
    return out


def as_panels(b: np.ndarray) -> np.ndarray:
    """[parts, depth, cols] in panels of columns; columns beyond are poison, depth beyond is a number."""
    parts, depth, cols = b.shape
    whole = np.full((parts, padded(depth), padded(cols)), 0x7FC0, np.uint16)
    whole[..., :cols] = 0x4000
    whole[:, :depth, :cols] = bf16(b)
    return np.ascontiguousarray(whole.reshape(parts, -1, 2, padded(cols) // PANEL, PANEL).transpose(0, 3, 1, 4, 2))


# (rows, depth, columns): whole blocks, one more, one less, less than a register, several panels
PRODUCTS = [(32, 32, 32), (33, 33, 33), (31, 31, 31), (1, 1, 1), (5, 257, 70), (64, 128, 96), (17, 6, 15)]


@pytest.mark.parametrize("parts", [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows, depth, cols", PRODUCTS)
def test_products_of_every_size_are_exact_where_their_sums_are(
    native: ModuleType, rows: int, depth: int, cols: int, accumulate: bool, parts: tuple[int, int]
) -> None:
    rng = np.random.default_rng(rows + depth)
    a = rng.integers(-8, 9, (parts[0], rows, depth)).astype(np.float32)
    b = rng.integers(-8, 9, (parts[1], depth, cols)).astype(np.float32)
    before = rng.integers(-9, 10, (rows, cols + 5)).astype(np.float32)  # rows of c are longer than the product
    c = before.copy()
    native.product(c, as_rows(a), as_panels(b), rows, cols, depth, 0.5, accumulate)
    expected = before.copy()
    terms = [a[i] @ b[k] for i in range(parts[0]) for k in range(parts[1]) if i + k < 3]  # six of nine
    expected[:, :cols] = 0.5 * sum(terms) + (before[:, :cols] if accumulate else 0)
    np.testing.assert_array_equal(c, expected)


def test_an_element_has_the_same_bits_wherever_it_stands(native: ModuleType) -> None:
    """What forward and backward rely on, and s_ij = s_ji."""
    rng = np.random.default_rng(0)
    u, v = random_bf16(rng, 70, 129), random_bf16(rng, 90, 129)

    def scores(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        c = np.zeros((len(u), len(v)), np.float32)
        native.product(c, as_rows(u[None]), as_panels(v.T[None]), len(u), len(v), u.shape[1], 3.7, False)
        return c

    whole = scores(u, v)
    assert (scores(u[11:], v[29:]) == whole[11:, 29:]).all()
    assert (scores(v, u) == whole.T).all()
    exact = 3.7 * u.astype(np.float64) @ v.T.astype(np.float64)
    # a sum of 129 terms in two accumulators a step, rounded at most once a term, and the scale
    bound = (129 + 2) * 2.0**-24 * 3.7 * (np.abs(u).astype(np.float64) @ np.abs(v.T))
    assert (np.abs(whole - exact) <= bound).all()


# ---- weights in three parts


@pytest.mark.parametrize("name", ["model", "amx"])
def test_three_parts_are_the_weight_in_every_bit(native: ModuleType, name: str) -> None:
    if name == "amx" and native.isa() != "avx512":
        pytest.skip("the AMX unit needs AVX-512")
    rng = np.random.default_rng(0)
    for exponent in (-149, -130, -60, 0, 100, 126):
        w = (rng.standard_normal((32, 70)) * np.exp2(rng.uniform(-40, 0, (32, 70)))).astype(np.float64)
        w = np.clip(w, -1.9, 1.9) * 2.0**exponent
        w = w.astype(np.float32)
        parts, scale = native.split(name, w, 29, 67, 96)
        assert not parts[:, 29:].any() and not parts[:, :, 67:].any()
        largest = np.abs(w[:29, :67]).max()
        assert scale == 2.0 ** np.clip(np.floor(np.log2(largest)), -126, 126)
        summed = values(parts[:, :29, :67]).astype(np.float64).sum(0) * float(scale)
        # bits below 2^-126 of the largest weight are those of a subnormal
        assert (np.abs(summed - w[:29, :67]) <= 2.0**-149 * float(scale)).all()
    for bad in (np.nan, np.inf, -np.inf):
        w = np.zeros((32, 64), np.float32)
        w[3, 60] = bad
        assert native.split(name, w, 32, 64, 64)[1] == 0.0
        assert native.split(name, w, 32, 60, 64)[1] != 0.0  # beside the tile


# ---- who multiplies


def test_the_first_use_refuses_registers_that_do_not_multiply(native: ModuleType) -> None:
    """What the model gives is taken; a missing part, a missing depth, a last bit of an exact sum, NaN and a row in
    another's place are refused."""
    assert [native.accepted(fault) for fault in range(6)] == [True, False, False, False, False, False]


def test_without_amx_the_reason_is_said(native: ModuleType) -> None:
    flags = Path("/proc/cpuinfo")
    has_amx = flags.exists() and {"amx_tile", "amx_bf16"} <= set(flags.read_text().split())
    name, reason = native.chosen()
    assert (name, bool(reason)) == (("amx", False) if has_amx else ("widened", True)), reason
    assert native.choose("amx") == has_amx
    assert not native.choose("something")
    assert native.chosen() == (name, reason)
    for choice in ("model", "widened"):
        assert native.choose(choice) and native.chosen()[0] == choice
    assert native.choose("auto") and native.chosen() == (name, reason)


# ---- the machine code

INSTRUCTIONS = r"\t(ldtilecfg|sttilecfg|tilerelease|tilezero|tileloaddt?1?|tilestored|tdp\w+)\b"


def disassembled(path: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return re.findall(INSTRUCTIONS, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_amx_instructions_are_in_their_unit_and_nowhere_else(native: ModuleType, built: Path) -> None:
    if sys.platform != "linux" or not shutil.which("objdump"):
        pytest.skip("needs Linux and objdump (binutils)")
    found = {path.stem: disassembled(path) for path in sorted(built.glob("*.o"))}
    ours = found.pop("bf16_kernels_amx")
    assert not any(found.values()), found
    if "amx" not in native.compiled():
        assert not ours
        return
    assert {name: ours.count(name) for name in set(ours)} == {
        "ldtilecfg": 1, "tilezero": 4, "tileloadd": 4, "tdpbf16ps": 4, "tilestored": 4, "tilerelease": 1,
    }  # fmt: skip
    path = library.library()
    if path is not None:  # as many in the whole library as in the one unit
        assert sorted(disassembled(path)) == sorted(ours)


def test_the_machine_code_of_the_unit_multiplies_like_the_model(native: ModuleType, built: Path) -> None:
    """On AMX, or interpreted from the bytes that the compiler wrote."""
    if sys.platform != "linux" or native.isa() != "avx512" or "amx" not in native.compiled():
        pytest.skip("the AMX unit needs Linux, AVX-512 and a compiler that knows AMX")
    objects = [built / f"{source.stem}.o" for source in SOURCES]
    program = built / "amx_machine"
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-pthread"]
    source = ROOT / "tests/csrc/cpu/amx_machine.cpp"
    subprocess.run([*shlex.split(CXX), *flags, str(source), *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match("on AMX|interpreted", done.stdout)
