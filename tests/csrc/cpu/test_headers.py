"""The kernels' headers against numpy in float64: exponentials, pair rules, online merge, every tile pass on every ISA.

The op tests only see the instruction set that this CPU chooses; here each compiled one runs. headers.cpp is built at
test time, without torch, into a temporary folder.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch

import contrastive_ext as ce
from native_code import PAIR_CASES, PairProblem, compile_module, same_image
from repository import ROOT

DTYPES = {"f32": np.float32, "f64": np.float64}
# Bounds in ulps of the result. With FMA the argument keeps twice the precision; without it the products round.
FMA_ULPS, PLAIN_ULPS = 1.25, 1.6
LOG2_E = (1.4426950408889634, 2.0355273740931033e-17)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    sources = [
        ROOT / "tests/csrc/cpu/headers.cpp",
        ROOT / "csrc/cpu/isa.cpp",
        *sorted(ROOT.glob("csrc/cpu/tile_kernels_*.cpp")),
    ]
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


def random_ids(rng: np.random.Generator, count: int, unfilled: int) -> np.ndarray:
    return np.where(rng.random(count) < 0.3, unfilled, rng.integers(-2, 2, count) * 2**40)  # not equal in 32 bits


@pytest.mark.parametrize("n,m,images,offset", PAIR_CASES)
@pytest.mark.parametrize("sides", ["none", "rows", "columns", "both"])
def test_images_and_ids(native: ModuleType, isa: str, n: int, m: int, images: int, offset: int, sides: str) -> None:
    rng = np.random.default_rng(n * m + images)
    row_ids = random_ids(rng, n, native.UNFILLED) if sides in ("rows", "both") else None
    col_ids = random_ids(rng, m, native.UNFILLED) if sides in ("columns", "both") else None
    for only_equal in {False, sides == "both"}:
        PairProblem(n, m, images, offset, False, only_equal, row_ids, col_ids).check(native, isa, "f32")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    "n,m,groups,length", [(8, 8, 4, 3), (70, 70, 70, 5), (70, 70, 2, 9), (6, 150, 3, 40), (5, 7, 5, 0)]
)
def test_lists(native: ModuleType, isa: str, kind: str, n: int, m: int, groups: int, length: int) -> None:
    rng = np.random.default_rng(n + length)
    lists = rng.integers(-1, m + 2, (groups, length))  # in any order, with repeats, gaps and numbers out of range
    lists[0] = -1  # nothing: its strips are plain
    for images, ids in ((0, None), (n // 2, random_ids(rng, n, native.UNFILLED) if n == m else None)):
        PairProblem(n, m, images, 0, n == m, False, ids, ids, lists).check(native, isa, kind)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("both_ways", [False, True])
def test_gates(native: ModuleType, isa: str, kind: str, both_ways: bool) -> None:
    n, m = 22, 150
    rng = np.random.default_rng(4)
    scores = rng.integers(-3, 4, (n, m)).astype(DTYPES[kind])  # often equal to the limit: not ignored
    scores[3, 5], scores[4, 6], scores[5, 7] = np.nan, np.inf, -np.inf
    row_limit, col_limit = rng.integers(0, 3, n) * 1.0, rng.integers(0, 3, m) * 1.0
    row_limit[8:12] = np.inf  # rows that ignore nothing
    row_limit[2], col_limit[9] = np.nan, np.nan
    ids = random_ids(rng, n, native.UNFILLED), random_ids(rng, m, native.UNFILLED)
    limits = (row_limit, col_limit if both_ways else ())
    PairProblem(n, m, scores=scores, row_limit=limits[0], col_limit=limits[1]).check(native, isa, kind)
    PairProblem(n, m, 11, 30, False, True, *ids, None, scores, *limits).check(native, isa, kind)


def test_a_tile_is_plain_exactly_where_no_image_is_shared(native: ModuleType) -> None:
    for n, m, images, offset in PAIR_CASES[:-1]:
        shows = same_image(n, m, images, offset)
        for i0, j0 in np.ndindex(n, m):
            for i1, j1 in ((i, j) for i in range(i0 + 1, n + 1) for j in range(j0 + 1, m + 1)):
                shared = bool(shows[i0:i1, j0:j1].any())
                assert native.may_share_image(n, images, offset, i0, i1, j0, j1) == shared, (i0, i1, j0, j1)


# ---- products

# (rows, depth, columns): every remainder of six rows and of a share's columns, depths around one share's, none
PRODUCTS = [(1, 1, 1), (6, 128, 64), (7, 5, 65), (11, 256, 40), (32, 257, 100), (4, 0, 33), (13, 700, 17)]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows,depth,cols", PRODUCTS)
def test_products(native: ModuleType, isa: str, kind: str, transposed: bool, rows: int, depth: int, cols: int) -> None:
    rng, dtype = np.random.default_rng(rows), DTYPES[kind]
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, depth), (depth, cols), (rows, cols)))
    wide = (x.astype(np.longdouble) for x in (a, b, c))
    x, y, z = wide
    for scale, accumulate in ((1.0, True), (2.5, False)):
        got = getattr(native, f"product_{kind}")(isa, a, transposed, b, c, scale, accumulate)
        exact = x @ y + z if accumulate else scale * (x @ y)
        # every term is rounded at most once a step: depth + 2 of them, products without FMA once more
        bound = (depth + 4) * np.finfo(dtype).eps * (scale * (abs(x) @ abs(y)) + abs(z))
        assert (abs(got[:, :cols].astype(np.longdouble) - exact) <= bound).all()
        assert (got[:, cols:] == -7).all(), "wrote beside the columns"


@pytest.mark.parametrize("kind", DTYPES)
def test_an_element_of_a_product_is_the_same_wherever_it_stands(native: ModuleType, isa: str, kind: str) -> None:
    product = getattr(native, f"product_{kind}")
    u = np.random.default_rng(3).standard_normal((70, 300)).astype(DTYPES[kind])
    nothing = np.zeros((70, 70), DTYPES[kind])
    whole = product(isa, u, False, np.ascontiguousarray(u.T), nothing, 1.7, False)[:, :70]
    np.testing.assert_array_equal(whole, whole.T)
    rows, cols = slice(5, 22), slice(33, 70)
    part = product(isa, u[rows], True, np.ascontiguousarray(u[cols].T), nothing[rows, cols], 1.7, False)
    np.testing.assert_array_equal(part[:, :37], whole[rows, cols])


@pytest.mark.parametrize("kind", DTYPES)
def test_transposed(native: ModuleType, isa: str, kind: str) -> None:
    for shape in ((1, 1), (4, 4), (9, 7), (64, 128), (6, 1), (3, 50)):
        x = np.random.default_rng(0).standard_normal(shape).astype(DTYPES[kind])
        np.testing.assert_array_equal(getattr(native, f"transpose_{kind}")(isa, x), x.T)


# ---- the best columns


@pytest.mark.parametrize("kind", DTYPES)
def test_larger_of_two_and_nan_of_either(native: ModuleType, isa: str, kind: str) -> None:
    special = np.array([0.0, 1.0, -2.0, math.inf, -math.inf, math.nan], DTYPES[kind])
    x, y = (np.resize(side, 64) for side in np.meshgrid(special, special))
    np.testing.assert_array_equal(getattr(native, f"larger_of_{kind}")(isa, x, y), np.maximum(x, y))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("columns", [False, True], ids=["one limit", "limits of columns"])
def test_search_finds_every_place_above_a_limit_in_order(
    native: ModuleType, isa: str, kind: str, columns: bool
) -> None:
    rng = np.random.default_rng(5)
    above = getattr(native, f"above_{kind}")
    for begin, end in ((0, 0), (0, 1), (3, 15), (0, 64), (64, 64), (63, 130), (70, 192), (0, 192)):
        x = np.where(rng.random(192) < 0.1, rng.integers(0, 3, 192), -1.0).astype(DTYPES[kind])
        x[rng.integers(0, 192, 5)] = np.nan
        x[:begin], x[end:] = 7.0, 7.0  # outside: never found
        limits = np.where(rng.random(192) < 0.2, -2.0, 1.0).astype(DTYPES[kind])
        limits[rng.integers(0, 192, 5)] = math.inf
        expected = x > np.minimum(limits, 1.0) if columns else x > 1
        expected[:begin] = expected[end:] = False
        found = above(isa, x, begin, end, 1.0, limits if columns else limits[:0])
        assert found == np.flatnonzero(expected).tolist()


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


# ---- row losses

ROW_LOSSES = [
    ce.InfoNCE(),
    ce.Decoupled(),
    ce.Debiased(0.1),
    ce.Debiased(0.0),
    ce.HardNegative(0.1, 1.0),
    ce.HardNegative(0.0, 0.3),
    ce.HardNegative(0.05, 2.0, detach_weights=True),
]
INF, NAN = math.inf, math.nan
ODD_ROWS = [  # lse_0, lse_1, pos, count: what it stands for
    (-200.0, -150.0, 200.0, 510.0),  # converged beyond any float32 exponential
    (150.0, 290.0, -190.0, 510.0),  # the positive is the least similar of all
    (3.0, 5.0, 0.0, 1.0),  # one negative
    (math.log(510.0), math.log(510.0), 0.0, 510.0),  # identical vectors
    (INF, INF, 1.0, 8.0),
    (-INF, -INF, 1.0, 8.0),
    (3.0, 4.0, INF, 8.0),
    (3.0, 4.0, -INF, 8.0),
    (NAN, NAN, 1.0, 8.0),
    (3.0, 4.0, NAN, 8.0),
]


def from_stats(loss: ce.RowLoss, rows: np.ndarray, scale: float) -> np.ndarray:
    """What row_losses returns, by autograd through the formula in PyTorch."""
    lse_0, lse_1, pos, count = (torch.from_numpy(np.ascontiguousarray(x)) for x in rows.T)
    factor = torch.full_like(pos, scale)  # one per row, to see each row's derivative
    inputs = [x.requires_grad_() for x in (lse_0, lse_1, pos, factor)]
    stats = ce.RowStatistics((lse_0, lse_1)[: len(loss.exponents)], pos, pos, count, factor)
    value = loss.from_stats(stats)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    clamped = loss.clamped(stats)
    columns = [value.detach(), *(torch.zeros_like(value) if g is None else g for g in gradients)]
    columns.append(torch.zeros_like(value) if clamped is None else clamped.to(value.dtype))
    return torch.stack(columns, 1).detach().numpy()


def random_rows(scale: float, count: int, size: int) -> np.ndarray:
    """Statistics of rows over `count` negatives with logits up to +-scale: every order of lse, pos and floor."""
    rng = np.random.default_rng(7)
    lse_0 = rng.uniform(-scale, scale, size) * 0.5 + math.log(count)
    lse_1 = lse_0 + rng.uniform(-scale, scale, size) * 0.5
    return np.stack([lse_0, lse_1, rng.uniform(-scale, scale, size), np.full(size, float(count))], 1)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 2.0, 14.0, 200.0])
@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
def test_row_losses_are_from_stats(native: ModuleType, kind: str, scale: float, loss: ce.RowLoss) -> None:
    """In float64 to rounding; in float32 no worse than from_stats in float32 is."""
    dtype = DTYPES[kind]
    rows = np.concatenate([random_rows(scale, 510, 4000), random_rows(scale, 1, 500)]).astype(dtype)
    name, parameters = loss.formula
    ours = getattr(native, f"row_losses_{kind}")(name, list(parameters), rows, scale).astype(np.float64)
    truth = from_stats(loss, rows.astype(np.float64), float(dtype(scale)))
    dense = from_stats(loss, rows, float(dtype(scale))).astype(np.float64)
    agree = (truth[:, 5] == dense[:, 5]) & (truth[:, 5] == ours[:, 5])  # rounding decides on the very edge of the floor
    assert agree.mean() > 0.995
    logit = max(1.0, scale)
    for column in range(5):
        error, largest = np.abs(ours - truth)[agree, column].max(), np.abs(truth[agree, column]).max()
        allowed = 2 * np.abs(dense - truth)[agree, column].max() + 4 * np.finfo(dtype).eps * logit * largest
        assert error <= allowed, (column, error, allowed)


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
def test_row_losses_at_odd_rows(native: ModuleType, loss: ce.RowLoss) -> None:
    """Finite where from_stats is, and infinite or NaN where it is: nothing hides."""
    rows = np.array(ODD_ROWS)
    name, parameters = loss.formula
    for kind, dtype in DTYPES.items():
        ours = getattr(native, f"row_losses_{kind}")(name, list(parameters), rows.astype(dtype), 2.0)[:, 0]
        expected = from_stats(loss, rows.astype(dtype), 2.0)[:, 0]
        np.testing.assert_allclose(ours, expected, rtol=16 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)


def test_an_unknown_formula_is_refused(native: ModuleType) -> None:
    with pytest.raises(ValueError, match="soft_margin"):
        native.row_losses_f64("soft_margin", [], np.zeros((1, 4)), 1.0)
