"""What of the Hopper kernels runs on a host: shared-memory layout, masks, partition, merge, and the ring protocol.

The same headers are compiled into the kernels; here they are compared with plain models.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from types import ModuleType

import numpy as np
import pytest

from native_code import PAIR_CASES, PairProblem, compile_module, same_image
from repository import ROOT

TILE, FEATURES = 128, 128


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compile_module(tmp_path_factory.mktemp("hopper"), "hopper_headers", [ROOT / "tests/csrc/cuda/hopper.cpp"])


# ---- shared memory


def tile_in_memory(rows: int) -> np.ndarray:
    """Which element (row * 128 + feature) lies at which 2-byte place, as TMA's 128-byte swizzle is documented.

    A box has 64 features; its rows of 128 bytes follow each other; address bits 4-6 are xor-ed with bits 7-9.
    """
    place = np.full(rows * FEATURES, -1)
    for box in range(2):
        for row in range(rows):
            for feature in range(64):
                address = box * rows * 128 + row * 128 + feature * 2
                address ^= (address >> 7 & 7) << 4
                place[address // 2] = row * FEATURES + box * 64 + feature
    return place


@pytest.mark.parametrize("rows", [64, 128])
def test_swizzled_offset_is_where_tma_puts_an_element(hopper: ModuleType, rows: int) -> None:
    place = tile_in_memory(rows)
    assert (np.sort(place) == np.arange(rows * FEATURES)).all()
    for row in range(rows):
        for feature in range(FEATURES):
            assert place[hopper.swizzled_offset(rows, row, feature) // 2] == row * FEATURES + feature


def read_as_wgmma(descriptor: int, memory: np.ndarray, rows: int) -> np.ndarray:
    """The [rows, 16] operand that a K-major descriptor names, its fields taken apart as the PTX ISA lists them."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0  # 128-byte swizzle, atoms at multiples of 1024 bytes
    operand = np.empty((rows, 16), int)
    for row in range(rows):
        for k in range(16):
            address = start + row // 8 * stride + row % 8 * 128 + 2 * k
            address ^= (address >> 7 & 7) << 4
            operand[row, k] = memory[address // 2]
    return operand


def read_by_rows(descriptor: int, memory: np.ndarray, features: int) -> np.ndarray:
    """The [features, 16] operand that an MN-major descriptor names: 16 rows of the tile are summed over."""
    start, leading = (descriptor & 0x3FFF) << 4, (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    operand = np.empty((features, 16), int)
    for feature in range(features):
        for k in range(16):
            address = start + feature // 64 * leading + k // 8 * stride + k % 8 * 128 + feature % 64 * 2
            address ^= (address >> 7 & 7) << 4
            operand[feature, k] = memory[address // 2]
    return operand


@pytest.mark.parametrize("first, rows", [(0, 64), (64, 64), (0, 128)], ids=["rows 0-63", "rows 64-127", "columns"])
def test_descriptors_name_the_features_of_each_step(hopper: ModuleType, first: int, rows: int) -> None:
    base = 3 * 32768 + 1024
    memory = np.concatenate([np.full(base // 2, -1), tile_in_memory(TILE), np.full(4096, -1)])
    for step in range(FEATURES // 16):
        low = hopper.k_major(base + first * 128) + hopper.descriptor_offset(hopper.step_offset(TILE, step))
        expected = (first + np.arange(rows))[:, None] * FEATURES + step * 16 + np.arange(16)
        np.testing.assert_array_equal(read_as_wgmma(hopper.matrix_descriptor(low), memory, rows), expected)


@pytest.mark.parametrize("rows", [64, 128])
def test_descriptors_name_the_rows_of_each_step(hopper: ModuleType, rows: int) -> None:
    base = 3 * 32768 + 1024
    memory = np.concatenate([np.full(base // 2, -1), tile_in_memory(rows), np.full(4096, -1)])
    for step in range(rows // 16):
        low = hopper.mn_major(base, rows) + hopper.descriptor_offset(hopper.row_step_offset(step))
        expected = np.arange(FEATURES)[:, None] + (step * 16 + np.arange(16)) * FEATURES
        np.testing.assert_array_equal(read_by_rows(hopper.matrix_descriptor(low), memory, FEATURES), expected)


def test_descriptors_are_those_that_hardware_has_run(hopper: ModuleType) -> None:
    """Of Triton's kernels: K-major, and MN-major with 64 and 128 rows."""
    lows = hopper.k_major(0), hopper.mn_major(0, 64), hopper.mn_major(0, 128)
    assert [hopper.matrix_descriptor(low) for low in lows] == [
        0x4000004000010000,
        0x4000004002000000,
        0x4000004004000000,
    ]


def test_descriptors_keep_their_fields_up_to_the_end_of_shared_memory(hopper: ModuleType) -> None:
    end = 227 * 1024
    for low in (hopper.k_major, lambda address: hopper.mn_major(address, 128)):
        moved = low(0) + hopper.descriptor_offset(end - 16)
        assert moved == low(end - 16) and moved >> 16 == low(0) >> 16


def test_fragments_cover_the_tile_once(hopper: ModuleType) -> None:
    seen = np.zeros((64, TILE), int)
    for thread in range(128):
        row, column = hopper.fragment(thread)
        for value in range(64):
            g, h, e = value // 4, value // 2 % 2, value % 2
            seen[row + 8 * h, column + 8 * g + e] += 1
    assert (seen == 1).all()


# ---- which pairs

MANY_TILES = [(300, 300, 150, 0), (140, 500, 70, 130), (130, 400, 1, 7)]


def ids_of(n: int, m: int, sides: str, unfilled: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    rng = np.random.default_rng(n + m)
    ids = lambda count: np.where(rng.random(count) < 0.3, unfilled, rng.integers(0, 4, count))  # noqa: E731
    return ids(n) if sides in ("rows", "both") else None, ids(m) if sides in ("columns", "both") else None


@pytest.mark.parametrize("n, m, images, offset", [*PAIR_CASES, *MANY_TILES])
@pytest.mark.parametrize("sides", ["none", "rows", "columns", "both"])
@pytest.mark.parametrize("width, swapped", [(128, False), (64, True)], ids=["rows by columns", "columns by rows"])
def test_mask_bits_are_the_pair_rules(hopper: ModuleType, n, m, images, offset, sides: str, width, swapped) -> None:
    """In both directions, and with the roles of rows and columns swapped."""
    row_ids, col_ids = ids_of(n, m, sides, hopper.UNFILLED)
    problem = PairProblem(n, m, images, offset, row_ids=row_ids, col_ids=col_ids)
    forward, reverse = problem.expected(hopper.UNFILLED)
    if swapped:
        forward, reverse = reverse.T, forward.T
        rules = n, images, 0, offset, col_ids, row_ids
    else:
        rules = n, images, offset, 0, row_ids, col_ids
    anchors, others = forward.shape
    expected = np.zeros((2, anchors, -(-others // width) * width), bool)
    expected[0, :, :others], expected[1, :, :others] = forward, reverse
    for row in np.random.default_rng(0).permutation(anchors)[:12]:
        for j0 in range(0, others, width):
            for column in (0, 2, 4, 6):
                columns = [j0 + column + k // 2 * 8 + k % 2 for k in range(width // 4)]
                for direction in (0, 1):
                    bits = hopper.negatives(*rules, row, j0, column, others, width, bool(direction))
                    assert bits == expected[direction, row, columns].tolist(), (row, j0, column, direction)


@pytest.mark.parametrize("n, m, images, offset", [*PAIR_CASES, *MANY_TILES, (700, 900, 350, 77), (600, 2000, 5, 1300)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("swapped", [False, True], ids=["rows by columns", "columns by rows"])
def test_tiles_are_masked_exactly_where_a_pair_is_ignored(hopper: ModuleType, n, m, images, offset, width, swapped):
    keep = ~same_image(n, m, images, offset)
    keep = keep.T if swapped else keep
    rules = (n, images, 0, offset, None, None) if swapped else (n, images, offset, 0, None, None)
    anchors, others = keep.shape
    tiles = -(-others // width)
    padded = np.zeros((anchors, tiles * width), bool)
    padded[:, :others] = keep
    for i0 in range(0, anchors, 64):
        i1 = min(i0 + 64, anchors)
        whole = padded[i0:i1].reshape(i1 - i0, tiles, width).all((0, 2))
        for begin in sorted({0, tiles // 2, tiles - 1}):
            assert hopper.masked_tiles(*rules, i0, i1, others, width, begin, tiles) == (~whole[begin:]).tolist()


def test_ids_mask_every_tile(hopper: ModuleType) -> None:
    ids = np.zeros(300, int)
    assert hopper.masked_tiles(300, 0, 0, 0, None, ids, 0, 64, 300, 128, 0, 3) == [True] * 3


# ---- partition and merge


@pytest.mark.parametrize("tiles", [1, 2, 7, 128, 1000, 2**23])
@pytest.mark.parametrize("splits", [1, 2, 3, 131])
def test_every_column_tile_belongs_to_one_split(hopper: ModuleType, tiles: int, splits: int) -> None:
    spans = [hopper.span_of_split(tiles, splits, k) for k in range(splits)]
    assert spans[0][0] == 0 and spans[-1][1] == tiles
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    lengths = [end - begin for begin, end in spans]
    assert max(lengths) - min(lengths) <= 1


def test_splits_fill_the_processors_and_leave_none_without_tiles(hopper: ModuleType) -> None:
    for rows in (1, 3, 8, 32, 128, 131, 512, 8192):
        for tiles in (1, 2, 8, 32, 512):
            splits = hopper.choose_splits(rows, tiles, 132, 3, 132)
            assert 1 <= splits <= tiles
            waves = lambda s, rows=rows: -(-rows * s // 132)  # noqa: E731
            time = lambda s, tiles=tiles, waves=waves: waves(s) * (-(-tiles // s) + 3)  # noqa: E731
            assert time(splits) <= min(time(s) for s in range(1, min(tiles, 132) + 1))
    assert hopper.choose_splits(32, 32, 132, 3, 132) == 4  # 4096 x 4096: 128 blocks of 132
    assert hopper.choose_splits(512, 512, 132, 3, 132) == 1  # 65,536: four waves anyway
    assert hopper.choose_splits(0, 0, 132, 3, 132) == 1 and hopper.choose_splits(4, 0, 132, 3, 132) == 1
    assert hopper.choose_splits(1, 64, 132, 3, 4) == 4


def test_splits_of_a_gradient_occupy_the_processors_within_64_mib(hopper: ModuleType) -> None:
    mib = 1 << 20
    assert hopper.gradient_splits(8, 512, 132, mib) == 16  # 1,024 rows against 65,536 columns: 128 blocks of 132
    assert hopper.gradient_splits(256, 256, 132, 16 * mib) == 1  # 32,768 rows: two waves, 97 % full
    assert hopper.gradient_splits(133, 133, 132, 8 * mib) == 4  # one block beyond a wave
    assert hopper.gradient_splits(133, 133, 132, 30 * mib) == 2 and hopper.gradient_splits(133, 133, 132, 65 * mib) == 1
    assert hopper.gradient_splits(0, 5, 132, 0) == 1 and hopper.gradient_splits(5, 0, 132, mib) == 1


def test_merge_adds_splits_and_knows_empty_rows(hopper: ModuleType) -> None:
    rng = np.random.default_rng(0)
    splits, rows = 5, 6
    shift = rng.uniform(-50, 50, (splits, rows)).astype(np.float32)
    total = rng.uniform(0.5, 100, (splits, rows)).astype(np.float32)
    count = rng.integers(0, 1000, (splits, rows)).astype(np.float32)
    shift[:, 1], total[:, 1], count[:, 1] = -np.inf, 0, 0  # nothing anywhere
    shift[1:, 2], total[1:, 2] = -np.inf, 0  # only the first split has negatives
    shift[:, 3] = 0  # without a shift
    total[2, 4] = np.nan
    got = hopper.merge(np.ascontiguousarray(np.stack([shift, total, count], 1)))
    exact = shift.astype(float) + np.log(np.where(total > 0, total, np.nan).astype(float))
    for row in (0, 2, 3, 5):
        expected = np.logaddexp.reduce(exact[:, row][~np.isnan(exact[:, row])])
        assert got[row][0] == pytest.approx(expected, rel=3e-7, abs=3e-7)
        assert got[row][1] == count[:, row].sum()
    assert got[1] == (-math.inf, 0.0)
    assert math.isnan(got[4][0])


def test_no_shift_is_chosen_up_to_a_reach_of_2_to_the_100(hopper: ModuleType) -> None:
    assert hopper.fits_without_shift(100.0) and not hopper.fits_without_shift(100.01)
    assert not hopper.fits_without_shift(math.nan) and not hopper.fits_without_shift(math.inf)
    largest, smallest = 2.0 ** (1.008 * 100), 2.0 ** (-1.008 * 100)  # cosines of rounded unit vectors
    assert np.float32(2**24 * largest) < np.inf and np.float32(smallest) >= np.finfo(np.float32).tiny


# ---- whole blocks

PROBLEMS = [  # rows, columns, images, offset, ids, splits: why
    (128, 256, 0, 0, False, 1, "full tiles"),
    (70, 333, 0, 0, False, 2, "tails"),
    (300, 300, 150, 0, False, 2, "two views"),
    (60, 60, 1, 0, False, 1, "every row is empty"),
    (140, 500, 70, 130, False, 3, "a shard of gathered columns"),
    (150, 150, 75, 0, True, 1, "ids and padding"),
]


@pytest.mark.parametrize("online", [False, True], ids=["static", "online"])
@pytest.mark.parametrize("scale", [2.0, 60.0])
@pytest.mark.parametrize("n, m, images, offset, has_ids, splits, reason", PROBLEMS, ids=[p[-1] for p in PROBLEMS])
def test_blocks_add_up_to_the_definition(
    hopper: ModuleType, n, m, images, offset, has_ids, splits, reason, scale: float, online: bool
) -> None:
    rng = np.random.default_rng(n)
    u, v = rng.standard_normal((n, 8)), rng.standard_normal((m, 8))
    v = u if n == m else v
    u, v = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (u, v))
    ids = np.where(rng.random(n) < 0.2, hopper.UNFILLED, rng.integers(0, 9, n)) if has_ids else None
    kept, _ = PairProblem(n, m, images, offset, row_ids=ids, col_ids=ids).expected(hopper.UNFILLED)
    logits = np.where(kept, scale * (u.astype(float) @ v.astype(float).T), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(kept.any(1), logits.max(1), 0)
        exact = top + np.log(np.exp(logits - top[:, None]).sum(1))
    got = np.array(hopper.play_blocks(u, v, images, offset, ids, ids, scale, online, splits))
    np.testing.assert_array_equal(got[:, 1], kept.sum(1))
    # a few ulps of the largest logit and of the result
    np.testing.assert_allclose(got[:, 0], exact, rtol=0, atol=4 * np.finfo(np.float32).eps * (scale + 10))


# ---- columns


def test_lanes_hold_every_column_of_a_tile_once(hopper: ModuleType) -> None:
    """Four neighbouring places are of columns of one lane's fragment, and a warp of places is 32 columns in a row."""
    columns = [hopper.column_of_place(place) for place in range(TILE)]
    assert sorted(columns) == list(range(TILE))
    for lane in range(32):
        first = hopper.fragment(lane)[1]
        assert all((column - first) % 8 in (0, 1) for column in columns[4 * lane : 4 * lane + 4])
    for warp in range(4):
        assert sorted(columns[32 * warp : 32 * warp + 32]) == list(range(32 * warp, 32 * warp + 32))


@pytest.mark.parametrize("online", [False, True], ids=["static", "online"])
@pytest.mark.parametrize("n, m, images, offset, has_ids, splits, reason", PROBLEMS, ids=[p[-1] for p in PROBLEMS])
def test_columns_of_blocks_add_up_to_the_definition(
    hopper: ModuleType, n, m, images, offset, has_ids, splits, reason, online: bool
) -> None:
    """Padding of one side is left out by the other alone; logits of -200 beside 200 need their own shifts."""
    scale = 60.0 if not online else 200.0
    rng = np.random.default_rng(n)
    u, v = rng.standard_normal((n, 8)), rng.standard_normal((m, 8))
    v = u if n == m else v
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    cosines = (u @ v.T).astype(np.float32)
    row_ids, col_ids = ids_of(n, m, "both", hopper.UNFILLED) if has_ids else (None, None)
    problem = PairProblem(n, m, images, offset, row_ids=row_ids, col_ids=col_ids)
    _, kept = problem.expected(hopper.UNFILLED)
    logits = np.where(kept, scale * cosines.astype(float), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(kept.any(0), logits.max(0), 0)
        exact = top + np.log(np.exp(logits - top).sum(0))
    got = np.array(hopper.play_columns(cosines, images, offset, row_ids, col_ids, scale, online))
    np.testing.assert_array_equal(got[:, 1], kept.sum(0))
    # a few ulps of the largest logit and of the result
    np.testing.assert_allclose(got[:, 0], exact, rtol=0, atol=4 * np.finfo(np.float32).eps * (scale + 10))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_reach_their_column_and_no_other(hopper: ModuleType, bad: float) -> None:
    for online in (False, True):
        logits = np.random.default_rng(0).standard_normal((130, 140)).astype(np.float32)
        logits[37, 5] = bad
        got = np.array(hopper.play_columns(logits, 0, 0, None, None, 1.0, online))[:, 0]
        assert not np.isfinite(got[5]) and np.isfinite(np.delete(got, 5)).all()


def test_windows_bound_what_columns_leave(hopper: ModuleType) -> None:
    mib = 1 << 20
    assert hopper.choose_windows(8, 0) == hopper.choose_windows(8, 64 * mib) == hopper.choose_windows(0, 0) == 1
    assert hopper.choose_windows(256, 96 * mib) == 2  # 32,768 x 32,768
    assert hopper.choose_windows(512, 384 * mib) == 6 and hopper.choose_windows(3, 640 * mib) == 3


# ---- weights


def test_powers_of_two_bring_a_bound_to_2_to_the_14(hopper: ModuleType) -> None:
    for x in [1.0, 1.0000001, 1.9999999, 2.0, 3e-20, 7e20, 2.0**-80, *np.random.default_rng(0).exponential(1, 100)]:
        x = float(np.float32(x))
        exponent = hopper.exponent_to_largest(x)
        assert 2.0**13 < x * 2.0**exponent <= 2.0**14 and hopper.power_of_two(exponent) == 2.0**exponent
    assert hopper.exponent_to_largest(0.0) == 100 and hopper.exponent_to_largest(math.inf) == -100
    assert hopper.exponent_to_largest(math.nan) == -100


def test_one_exponential_serves_both_terms_up_to_a_reach_of_2_to_the_64(hopper: ModuleType) -> None:
    assert hopper.fits_factored(True, 64.0) and not hopper.fits_factored(True, 64.01)
    assert not hopper.fits_factored(False, 1.0) and not hopper.fits_factored(True, math.nan)


WEIGHTS = [
    ("both", True, False),
    ("both", True, True),
    ("both", False, True),
    ("rows", False, False),
    ("columns", False, True),
]


@lru_cache
def kept_pairs(n: int, m: int, images: int, offset: int, has_ids: bool, unfilled: int):
    """(ids, kept in both directions)"""
    rng = np.random.default_rng(n)
    ids = np.where(rng.random(n) < 0.2, unfilled, rng.integers(0, 9, n)) if has_ids else None
    return ids, PairProblem(n, m, images, offset, row_ids=ids, col_ids=ids).expected(unfilled)


@pytest.mark.parametrize("terms, factored, narrow", WEIGHTS)
@pytest.mark.parametrize(
    "n, m, images, offset, has_ids, size, reason",
    [(*p[:5], 1.0, p[-1]) for p in PROBLEMS]
    + [(*PROBLEMS[-1][:5], x, f"2^{math.log2(x):.0f}") for x in (2.0**-70, 2.0**70)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_are_the_definition(
    hopper: ModuleType, n, m, images, offset, has_ids, size: float, reason, terms: str, factored, narrow
) -> None:
    """Of every pair, in both directions, whatever the size of the coefficients; scaled they fit fp16."""
    rng = np.random.default_rng(n)
    u, v = rng.standard_normal((n, 8)), rng.standard_normal((m, 8))
    v = u if n == m else v
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    cosines = (u @ v.T).astype(np.float32)
    ids, keep = kept_pairs(n, m, images, offset, has_ids, hopper.UNFILLED)
    beta, scale = 0.5, 60.0
    logits = beta * scale * cosines.astype(float)
    expected, magnitude, sides = np.zeros((n, m)), np.zeros((n, m)), []
    for axis, kept, wanted in ((1, keep[0], terms != "columns"), (0, keep[1], terms != "rows")):
        with np.errstate(divide="ignore"):
            lse = np.log((np.exp(logits) * kept).sum(axis)).astype(np.float32)
        grad = (size * rng.standard_normal(len(lse))).astype(np.float32)
        sides += [lse.tolist(), grad.tolist()] if wanted else [[], []]
        if wanted:
            x = logits - np.where(np.isneginf(lse), np.inf, lse.astype(float)).reshape((-1, 1) if axis else (1, -1))
            term = beta * np.where(kept, grad.astype(float).reshape((-1, 1) if axis else (1, -1)) * np.exp(x), 0)
            expected, magnitude = expected + term, magnitude + np.abs(term)
    got, largest = hopper.play_weights(cosines, images, offset, ids, ids, beta, scale, *sides, factored, narrow)
    # an exponent and lse of up to 2 beta scale log2(e) in all are rounded to float32, which is the relative error
    allowed = 8 * np.finfo(np.float32).eps * beta * scale * magnitude
    worst = np.unravel_index(np.argmax(np.abs(got - expected) - allowed), got.shape)
    assert (np.abs(got - expected) <= allowed).all(), (worst, got[worst], expected[worst], allowed[worst])
    assert (got[~(keep[0] | keep[1])] == 0).all()
    assert largest <= 2.0**14 * 1.001


# ---- the ring


@pytest.mark.parametrize("delays", [0, 60])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("tiles", [1, 2, 3, 9, 64])
def test_ring_delivers_every_tile_to_every_warp_in_turns(hopper: ModuleType, stages, tiles, delays) -> None:
    for seed in range(5):
        hopper.play(stages, tiles, seed, delays)
