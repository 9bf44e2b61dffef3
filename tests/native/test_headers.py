"""The kernels' headers against numpy in float64: exponentials, pair rules, online merge, every tile pass on every ISA.

The op tests only see the instruction set that this CPU chooses; here each compiled one runs. headers.cpp is built at
test time, without torch, into a temporary folder.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")
DTYPES = {"f32": np.float32, "f64": np.float64}
# Bounds in ulps of the result. With FMA the argument keeps twice the precision; without it the products round.
FMA_ULPS, PLAIN_ULPS = 1.25, 1.6
LOG2_E = (1.4426950408889634, 2.0355273740931033e-17)


def compile_module(folder: Path, name: str, sources: list[Path]) -> ModuleType:
    """Build a pybind11 module of C++ files that include headers of csrc/, and import it."""
    pybind11 = pytest.importorskip("pybind11")
    if not CXX:
        pytest.skip("no C++ compiler was found")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen([*shlex.split(CXX), *flags, "-c", str(s), "-o", str(o)])
        for s, o in zip(sources, objects, strict=True)
    ]
    assert all([job.wait() == 0 for job in jobs])  # a list: every compiler is waited for
    subprocess.run([*shlex.split(CXX), "-shared", "-pthread", *map(str, objects), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    sources = [ROOT / "tests/native/headers.cpp", ROOT / "csrc/isa.cpp", *sorted(ROOT.glob("csrc/tile_kernels_*.cpp"))]
    return compile_module(tmp_path_factory.mktemp("native_headers"), "native_headers", sources)


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request: pytest.FixtureRequest, native: ModuleType) -> str:
    if request.param not in native.usable_isas():
        pytest.skip(f"{request.param} is not usable on this CPU")
    return str(request.param)


def ulps(got: np.ndarray, exact: np.ndarray, dtype: type) -> float:
    """Largest error in units of the last place of the exact result."""
    spacing = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    return float(np.max(np.abs(got.astype(np.longdouble) - exact) / spacing))


def has_fma(isa: str) -> bool:
    return isa != "generic"


# ---- exponentials


@pytest.mark.parametrize("kind", DTYPES)
def test_exp_is_within_its_bound(native: ModuleType, isa: str, kind: str) -> None:
    dtype, reach = DTYPES[kind], {"f32": 87.0, "f64": 708.0}[kind]
    x = np.random.default_rng(0).uniform(-reach, reach, 400_000).astype(dtype)
    error = ulps(getattr(native, f"exp_{kind}")(isa, x), np.exp(x.astype(np.longdouble)), dtype)
    assert error <= (FMA_ULPS if has_fma(isa) else PLAIN_ULPS + reach), error


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
def test_a_static_shift_costs_no_accuracy(native: ModuleType, isa: str, kind: str, beta: float) -> None:
    dtype, shift = DTYPES[kind], 20.0
    exact_factor = np.longdouble(beta) * (np.longdouble(LOG2_E[0]) + np.longdouble(LOG2_E[1]))
    high = dtype(exact_factor)
    low = dtype(exact_factor - np.longdouble(high))
    x = np.random.default_rng(1).uniform(-60.0 / beta, 60.0 / beta, 400_000).astype(dtype)
    got = getattr(native, f"exp2_{kind}")(isa, x, high, low, shift)
    error = ulps(got, np.exp2(x.astype(np.longdouble) * exact_factor - shift), dtype)
    assert error <= (FMA_ULPS if has_fma(isa) else PLAIN_ULPS + 60.0), error


@pytest.mark.parametrize("kind", DTYPES)
def test_exp_at_the_ends_of_its_range(native: ModuleType, isa: str, kind: str) -> None:
    dtype = DTYPES[kind]
    exp = getattr(native, f"exp_{kind}")
    largest = float(np.finfo(dtype).max)
    assert exp(isa, np.array([0.0, -0.0], dtype)).tolist() == [1.0, 1.0]
    assert exp(isa, np.array([-math.inf, -largest, -1e4], dtype)).tolist() == [0.0, 0.0, 0.0]
    assert exp(isa, np.array([math.inf, largest, 1e4], dtype)).tolist() == [math.inf] * 3
    payload = np.array([0x7FC00001, 0xFFFFFFFF], np.uint32).view(np.float32).astype(dtype)  # not only the default NaN
    assert np.isnan(exp(isa, payload)).all()
    tiny = exp(isa, np.linspace(-95, -85, 999).astype(np.float32)) if kind == "f32" else np.zeros(1)
    assert (tiny >= 0).all() and (np.diff(tiny) >= -np.finfo(np.float32).tiny).all()


# ---- pairs


def naive_classes(n: int, m: int, images: int, offset: int, row_ids, col_ids, unfilled: int) -> np.ndarray:
    out = np.zeros((n, m), np.uint8)
    for i in range(n):
        for j in range(m):
            shown = images > 0 and 0 <= j - offset < n and (j - offset) % images == i % images
            equal = row_ids is not None and col_ids is not None and row_ids[i] == col_ids[j]
            if not shown and not equal:
                out[i, j] = (col_ids is None or col_ids[j] != unfilled) + 2 * (
                    row_ids is None or row_ids[i] != unfilled
                )
    return out


PAIR_CASES = [  # rows, columns, images, offset: what it stands for
    (8, 8, 4, 0),  # two views
    (9, 9, 3, 0),  # three views
    (6, 6, 6, 0),  # CLIP
    (5, 13, 5, 4),  # a rank's shard, columns before and after
    (5, 7, 0, 0),  # a queue
    (7, 7, 1, 0),  # one image: nothing is a negative
    (5, 9, 3, 2),  # images do not divide the rows
    (1, 1, 1, 0),
]


@pytest.mark.parametrize("n,m,images,offset", PAIR_CASES)
@pytest.mark.parametrize("sides", ["none", "rows", "columns", "both"])
def test_pair_rules_and_counts(native: ModuleType, n: int, m: int, images: int, offset: int, sides: str) -> None:
    rng = np.random.default_rng(n * m + images)
    ids = lambda count: np.where(rng.random(count) < 0.3, native.UNFILLED, rng.integers(0, 4, count))  # noqa: E731
    row_ids = ids(n) if sides in ("rows", "both") else None
    col_ids = ids(m) if sides in ("columns", "both") else None
    expected = naive_classes(n, m, images, offset, row_ids, col_ids, native.UNFILLED)
    got = native.classify(n, m, images, offset, row_ids, col_ids)
    np.testing.assert_array_equal(got, expected)
    per_row, per_col = native.count(n, m, images, offset, row_ids, col_ids)
    np.testing.assert_array_equal(per_row, (expected & native.COLUMN_IS_NEGATIVE > 0).sum(1))
    np.testing.assert_array_equal(per_col, (expected & native.ROW_IS_NEGATIVE > 0).sum(0))


@pytest.mark.parametrize("n,m,images,offset", PAIR_CASES)
def test_a_tile_is_plain_exactly_where_no_image_is_shared(
    native: ModuleType, n: int, m: int, images: int, offset: int
) -> None:
    classes = native.classify(n, m, images, offset, None, None)
    for i0 in range(n):
        for i1 in range(i0 + 1, n + 1):
            for j0 in range(m):
                for j1 in range(j0 + 1, m + 1):
                    shared = bool((classes[i0:i1, j0:j1] == 0).any())
                    assert native.may_share_image(n, images, offset, i0, i1, j0, j1) == shared, (i0, i1, j0, j1)


# ---- online log-sum-exp


def test_online_merge_is_the_log_sum_exp(native: ModuleType) -> None:
    rng = np.random.default_rng(2)
    for spread in (0.0, 1.0, 300.0, 1e5):
        chunks = [(rng.standard_normal(k) * spread).tolist() for k in (1, 7, 0, 64, 3)]
        values = np.concatenate(chunks).astype(np.longdouble)
        top = values.max()
        exact = float(top + np.log(np.exp(values - top).sum()))
        assert native.online_lse(chunks) == pytest.approx(exact, rel=4e-16, abs=4e-16)


def test_online_merge_of_nothing_of_infinities_and_of_nan(native: ModuleType) -> None:
    inf, nan = math.inf, math.nan
    assert native.online_lse([]) == -inf and native.online_lse([[], []]) == -inf
    assert native.online_lse([[-inf], [-inf, -inf]]) == -inf
    assert native.online_lse([[-inf], [2.0]]) == 2.0 and native.online_lse([[2.0], [-inf], []]) == 2.0
    assert math.isnan(native.online_lse([[1.0], [nan, 5.0], [9.0]])) and math.isnan(native.online_lse([[nan], [1.0]]))


# ---- passes over a tile

TILES = [  # rows, columns, i0, j0, upper: ragged in both, one column, whole vectors, on and off the diagonal
    (7, 37, 0, 40, False),
    (4, 64, 64, 0, False),
    (1, 1, 5, 9, False),
    (33, 130, 32, 0, False),
    (32, 128, 32, 32, True),
    (13, 70, 3, 3, True),
]


def tile_masks(rows: int, cols: int, i0: int, j0: int, special: bool, upper: bool, images: int) -> list[np.ndarray]:
    i, j = np.arange(i0, i0 + rows)[:, None], np.arange(j0, j0 + cols)[None]
    kept = (i - j) % images != 0 if special else np.ones((rows, cols), bool)
    return [kept & (j >= i), kept & (j > i)] if upper else [kept, kept]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("rows,cols,i0,j0,upper", TILES)
def test_tile_passes(
    native: ModuleType, isa: str, kind: str, special: bool, rows: int, cols: int, i0: int, j0: int, upper: bool
) -> None:
    dtype, images, rng = DTYPES[kind], 50, np.random.default_rng(rows * cols)
    s = rng.uniform(-3, 3, (rows, cols)).astype(dtype)
    exact = s.astype(np.longdouble)
    by_row, by_col = tile_masks(rows, cols, i0, j0, special, upper, images)
    where = (isa, s, 200, images, i0, j0, special, upper)
    tolerance = {"rtol": 64 * np.finfo(dtype).eps, "atol": 64 * np.finfo(dtype).eps}
    equal = lambda got, want: np.testing.assert_allclose(  # noqa: E731
        np.asarray(got, np.float64), np.asarray(want, np.float64), **tolerance
    )

    row_max, row_sum, col_max, col_sum = getattr(native, f"moments_{kind}")(*where)
    np.testing.assert_array_equal(row_max, np.where(by_row, s, -np.inf).max(1))
    np.testing.assert_array_equal(col_max, np.where(by_col, s, -np.inf).max(0))
    equal(row_sum, np.where(by_row, exact, 0).sum(1))
    equal(col_sum, np.where(by_col, exact, 0).sum(0))

    beta = 0.5
    high = dtype(beta * LOG2_E[0])
    low = dtype(beta * LOG2_E[0] - float(high))
    row_shift, col_shift = rng.uniform(0, 2, rows).astype(dtype), rng.uniform(0, 2, cols).astype(dtype)
    for shifts in (([], []), (row_shift, col_shift)):
        static = len(shifts[0]) == 0
        got = getattr(native, f"exp_sums_{kind}")(*where, beta, high, low, 3.0, list(shifts[0]), list(shifts[1]))
        rows_e = np.exp(beta * exact) / 8 if static else np.exp(beta * exact - row_shift[:, None])
        cols_e = np.exp(beta * exact) / 8 if static else np.exp(beta * exact - col_shift)
        for power in (1, 2):
            equal(got[power - 1], np.where(by_row, rows_e**power, 0).sum(1))
            equal(got[power + 1], np.where(by_col, cols_e**power, 0).sum(0))

    a, c = rng.standard_normal((2, rows)).astype(dtype), rng.standard_normal((2, cols)).astype(dtype)
    for betas, shared, columns in [
        ([0.5], False, False),
        ([0.5], False, True),
        ([0.5], True, True),
        ([0.5, 1.0], True, True),
        ([0.5, 0.8], True, True),
        ([0.5, 1.0], False, True),
        ([0.5, 0.8], False, False),
    ]:
        k = len(betas)
        shift_r, shift_c = (0 * row_shift, 0 * col_shift) if shared else (row_shift, col_shift)
        got = getattr(native, f"weights_{kind}")(
            *where,
            shared,
            betas,
            [dtype(b * LOG2_E[0]) for b in betas],
            a[:k].tolist(),
            [shift_r.tolist()] * k,
            c[:k].tolist() if columns else [],
            [shift_c.tolist()] * k if columns else [],
        )
        want = np.zeros((rows, cols), np.longdouble)
        for b, a_k, c_k in zip(betas, a, c, strict=False):
            want += np.where(by_row, a_k[:, None] * np.exp(b * exact - shift_r[:, None]), 0)
            if columns:
                want += np.where(by_col, c_k[None] * np.exp(b * exact - shift_c), 0)
        equal(got, want)
