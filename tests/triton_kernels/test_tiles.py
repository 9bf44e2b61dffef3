"""What is special to the Triton kernels: tiles, chunks of features, splits, workspaces, the way exponentials shift.

Runs in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU; the tables of the other tests cover values and gradients.
"""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext import row_stats
from contrastive_ext.backends.torch import ranked_stats as torch_ranked
from contrastive_ext.backends.triton import launch as triton_launch
from contrastive_ext.backends.triton import ranked_stats as triton_ranked
from contrastive_ext.backends.triton import row_stats as backend
from contrastive_ext.backends.triton import whole_loss as triton_whole_loss
from contrastive_ext.operators.top_columns import top_columns
from contrastive_ext.problem.pairs import NO_COLUMN, UNFILLED, Gate, Pairs
from contrastive_ext.problem.problem import Problem
from contrastive_ext.problem.ranking import Ranking
from rows import random_pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backend.why_not(DEVICE, torch.float32, torch.float32, 8)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    *([pytest.mark.interpreter] if DEVICE.type == "cpu" else []),
]


@pytest.fixture(autouse=True)
def _small_device(monkeypatch):
    """As few processors as the interpreter has: with those of a GPU small problems have no triangle and no splits."""
    monkeypatch.setattr(triton_launch, "processors", lambda device: triton_launch.INTERPRETED_PROCESSORS)


# name, rows, columns (None: one set), features, what else is passed, why it is there
PROBLEMS = [
    ("one_set", 70, None, 20, {"num_images": 35}, "a triangle with tails, views between tile edges"),
    ("one_square", 40, None, 20, {"num_images": 20}, "too few tiles for a triangle"),
    ("small_images", 70, None, 20, {"num_images": 5}, "every tile holds pairs of views, more than one apart"),
    ("clip", 70, 70, 20, {"num_images": 70, "columns": True}, "column partials of several row tiles"),
    ("hard_clip", 70, 70, 20, {"num_images": 70, "columns": True, "exponents": (0.5, 1.5)}, "and two exponents"),
    ("shard", 36, 150, 20, {"num_images": 36, "positive_offset": 70}, "images inside a range that no tile starts at"),
    ("shard_columns", 36, 150, 20, {"num_images": 36, "positive_offset": 70, "columns": True}, "seen from both sides"),
    ("wide", 40, None, 300, {"num_images": 20}, "more features than a program holds: chunks and stored weights"),
    ("wide_two_sets", 40, 45, 290, {"num_images": 40, "columns": True}, "and the columns' gradient"),
    ("wide_hard", 40, None, 300, {"num_images": 20, "exponents": (1.0, 2.0)}, "and two exponents"),
]
IDS = [p[0] for p in PROBLEMS]


def _vectors(rows: int, features: int, dtype=torch.float64) -> torch.Tensor:
    x = torch.nn.functional.normalize(torch.randn(rows, features, dtype=torch.float64))
    return x.to(DEVICE, dtype).requires_grad_()


def _everything(u, v, name: str, upstream_seed: int = 1, **arguments) -> list[torch.Tensor]:
    """Statistics and gradients under a random upstream gradient."""
    swept = row_stats(u, v, backend=name, **arguments)
    random = torch.Generator().manual_seed(upstream_seed)
    total = u.new_zeros(())
    for part in (swept.lse, swept.col_lse):
        weights = torch.rand(part.shape, generator=random, dtype=torch.float64).to(part)
        total = total + (part * weights).sum()
    leaves = [x for x in (u, v, arguments["scale"]) if isinstance(x, torch.Tensor) and x.requires_grad]
    return [swept.lse, swept.aux, swept.col_lse, swept.col_aux, *torch.autograd.grad(total, leaves)]


def _assert_like_torch(u, v, rtol=1e-11, atol=1e-11, **arguments) -> None:
    ours, theirs = (_everything(u, v, name, **arguments) for name in ("triton", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("scale", [2.0, 60.0, 300.0, "learned 2", "learned 300"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_tiles_splits_and_shifts(problem, scale):
    """Scale 2: nothing is shifted; 60: the backward is; 300: the forward too. A learned scale: the kernel decides."""
    _, n, m, features, options, _ = problem
    u, v = _vectors(n, features), None if m is None else _vectors(m, features)
    if isinstance(scale, str):
        scale = torch.tensor(float(scale.split()[1]), dtype=torch.float64, device=DEVICE, requires_grad=True)
    _assert_like_torch(u, v, scale=scale, unit=True, diagnostics=bool(scale == 60.0), **options)


def _lists(groups: int, columns: int) -> torch.Tensor:
    """Half of the lists are empty, some hold every column of a tile, none are sorted."""
    lists = torch.stack([torch.randperm(columns)[:50] for _ in range(groups)])
    lists[::4, :32] = torch.randperm(32)
    lists[1::2] = NO_COLUMN
    return lists.to(DEVICE)


def _gate(scorers: int, rows: int, columns: int | None, both_ways: bool) -> Gate:
    """Features in two chunks; limits that about half of the pairs exceed."""
    guides = torch.randn(scorers, rows if scorers == 1 else rows // 2, 40, dtype=torch.float64, device=DEVICE)
    features = guides[0] if columns is None else torch.randn(columns, 40, dtype=torch.float64, device=DEVICE)
    row_limit = torch.randn(rows, dtype=torch.float64, device=DEVICE)
    col_limit = row_limit if columns is None else torch.randn(columns, dtype=torch.float64, device=DEVICE)
    return Gate(guides, features, row_limit, col_limit if both_ways else None)


# name, rows, columns (None: one set), features, rules, why it is there
RULES = [
    ("lists", 70, None, 20, lambda: {"ignored": _lists(35, 70), "num_images": 35}, "cursors from both sides"),
    ("lists_two_sets", 40, 200, 20, lambda: {"ignored": _lists(40, 200)}, "cursors that begin inside their lists"),
    ("lists_wide", 70, None, 300, lambda: {"ignored": _lists(70, 70)}, "stored weights, a tile of rows at a time"),
    ("gate", 70, None, 20, lambda: {"gate": _gate(1, 70, None, True)}, "one guide for both directions"),
    ("gate_columns", 40, 70, 20, lambda: {"gate": _gate(1, 40, 70, True), "columns": True}, "limits of both sides"),
    ("gate_scorers", 40, 200, 300, lambda: {"gate": _gate(3, 40, 200, False)}, "scorers change sides for the columns"),
    ("everything", 70, None, 20, lambda: {
        "ignored": _lists(70, 70), "gate": _gate(1, 70, None, True), "num_images": 35, "only_equal_ids": True,
        "row_ids": torch.where(torch.arange(70, device=DEVICE) % 5 == 0, UNFILLED, torch.arange(70, device=DEVICE) % 3),
    }, "each rule applies to what the others leave"),
]  # fmt: skip


@pytest.mark.parametrize("exponents", [(1.0,), (0.5, 1.5)], ids=["one", "two"])
@pytest.mark.parametrize("problem", RULES, ids=[r[0] for r in RULES])
def test_rules_across_tiles(problem, exponents, monkeypatch):
    _, n, m, features, rules, _ = problem
    monkeypatch.setattr(triton_launch, "WORKSPACE_BYTES", 1)  # weights and column partials in several launches
    u, v = _vectors(n, features), None if m is None else _vectors(m, features)
    _assert_like_torch(u, v, scale=5.0, exponents=exponents, diagnostics=len(exponents) == 2, **rules())


@pytest.mark.parametrize("name", ["lists_two_sets", "gate_scorers", "everything"])
def test_histograms_of_what_the_rules_leave(name):
    _, n, m, features, rules, _ = next(r for r in RULES if r[0] == name)
    options = rules()
    u, v = _vectors(n, features).detach(), None if m is None else _vectors(m, features).detach()
    pairs = Pairs(n, m or n, device=DEVICE, **options, col_ids=options.get("row_ids"))  # ids of one set
    problem = Problem(u, v, 5.0, (1.0,), pairs, True, u.dtype)
    ranking, upstream = Ranking(0.1, 0.9, 0.7, 1e-6, 16), torch.rand(n, dtype=u.dtype, device=DEVICE)
    results = []
    for ranked in (triton_ranked, torch_ranked):
        stats = ranked.ranked_forward(problem, ranking, diagnostics=True)
        gradients = ranked.ranked_backward(problem, ranking, stats, upstream, need_u=True, need_v=m is not None)
        results.append((stats.lse, stats.aux, stats.below, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("features", [20, 300])
@pytest.mark.parametrize("name", ["lists_two_sets", "gate_scorers"])
def test_rules_with_frozen_columns(name, features):
    rules = next(r[4] for r in RULES if r[0] == name)
    _assert_like_torch(_vectors(40, features), _vectors(200, features).detach(), scale=5.0, **rules())


def test_rows_that_list_every_column():
    u, v = _vectors(40, 20), _vectors(70, 20)
    ignored = torch.randperm(70, device=DEVICE).expand(2, -1).clone()
    ignored[0] = NO_COLUMN
    swept = row_stats(u, v, scale=1.0, ignored=ignored, backend="triton")
    assert swept.aux[0].eq(torch.tensor([70.0, 0.0], device=DEVICE).repeat(20)).all()
    assert swept.lse[0, 1::2].eq(-torch.inf).all()
    du, dv = torch.autograd.grad(swept.lse[0, ::2].sum() + 0 * swept.lse[0, 1::2].nan_to_num(neginf=0.0).sum(), (u, v))
    assert du[1::2].eq(0).all()
    assert dv.isfinite().all()


@pytest.mark.parametrize("k", [1, 20, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_columns_over_splits_and_chunks(dtype, k):
    """Small integers: scores are exact and most are equal. 129 columns are more than a program lists."""
    scorers = torch.randint(-1, 2, (2, 40, 300), device=DEVICE).to(dtype)
    features = torch.randint(-1, 2, (200, 300), device=DEVICE).to(dtype)
    ours, theirs = (top_columns(scorers, features, k, num_images=40, backend=name) for name in ("triton", "torch"))
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.columns, theirs.columns)


@pytest.mark.parametrize("rules", [("row_ids", "col_ids"), ("excluded",), ("below",), ("row_ids", "excluded", "below")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_columns_by_rules_of_single_rows(dtype, rules):
    """Some rows have fewer candidates than the list is long; ids of rows alone say nothing."""
    scorers = torch.randint(-1, 2, (1, 40, 20), device=DEVICE).to(dtype)
    features = torch.randint(-1, 2, (200, 20), device=DEVICE).to(dtype)
    columns = torch.arange(200)
    everything = {
        "row_ids": torch.arange(40) % 3, "col_ids": torch.where(columns % 7 == 0, UNFILLED, columns % 3),
        "excluded": torch.where(torch.arange(40) % 5 == 0, NO_COLUMN, (scorers[0] @ features.T).argmax(1).cpu()),
        "below": torch.arange(-21, 19).to(dtype),
    }  # fmt: skip
    how = {name: everything[name].to(DEVICE) for name in rules}
    ours, theirs = (top_columns(scorers, features, 20, **how, backend=name) for name in ("triton", "torch"))
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.columns, theirs.columns)
    if "below" in rules:
        assert ours.columns[0].eq(NO_COLUMN).all() and not ours.columns[-1].eq(NO_COLUMN).any()


@pytest.mark.parametrize("exponents", [(1.0,), (0.5, 1.5)], ids=["fused", "by_weights"])
@pytest.mark.parametrize("features", [20, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_mean_of_frozen_columns(exponents, features, dtype):
    u, queue = _vectors(40, features), _vectors(130, features).detach()
    if dtype == torch.float16:
        u, queue = (x.detach().half().float().requires_grad_(x.requires_grad) for x in (u, queue))
    arguments = {"scale": 15.0, "exponents": exponents, "unit": True, "operand_dtype": dtype}
    *_, ours = _everything(u, queue, "triton", **arguments)
    *_, theirs = _everything(u, queue, "torch", **arguments)
    assert (ours - theirs).norm() <= (1e-12 if dtype == torch.float64 else 5e-4) * theirs.norm()


@pytest.mark.parametrize("columns", [None, 100], ids=["triangle", "two_sets"])
def test_column_partials_in_several_launches(monkeypatch, columns):
    """A workspace for one tile of rows gives what a workspace for all gives."""
    u, v = _vectors(100, 20), None if columns is None else _vectors(columns, 20)
    arguments = {"scale": 5.0, "num_images": 50, "columns": v is not None, "unit": False, "diagnostics": True}
    at_once = _everything(u, v, "triton", **arguments)
    monkeypatch.setattr(triton_launch, "WORKSPACE_BYTES", 1)
    for a, b in zip(at_once, _everything(u, v, "triton", **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("workspace", [1, 3_000, 64 << 20], ids=["tile", "tiles", "everything"])
@pytest.mark.parametrize("rows", [65, 96, 97, 128, 129, 161])
def test_triangles_of_any_length(monkeypatch, rows, workspace):
    """Last tiles of one row, of all rows, in a launch of their own; every column partial has one place and is read."""
    monkeypatch.setattr(triton_launch, "WORKSPACE_BYTES", workspace)
    u = _vectors(rows, 20).detach()
    for scale in (5.0, 200.0):
        ours, theirs = (row_stats(u, scale=scale, unit=True, backend=name) for name in ("triton", "torch"))
        torch.testing.assert_close(ours.lse, theirs.lse, rtol=1e-12, atol=1e-12)
        assert torch.equal(ours.aux, theirs.aux)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_triangle_of_each_kind_of_products(dtype):
    """As many rows as four tiles of 16 bits have on a GPU, and a tail."""
    u = _vectors(390, 64).detach().to(dtype)
    truth = row_stats(u.double(), scale=10.0, unit=True, num_images=195, backend="torch").lse
    errors = []
    for name in ("triton", "torch"):
        lse = row_stats(
            u.float(), scale=10.0, unit=True, num_images=195, backend=name, operand_dtype=dtype
        ).lse  # fmt: skip
        errors.append((lse - truth).abs().max())
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("layout", ["two_view", "symmetric"])
def test_programs_of_a_larger_batch_leave_parts(monkeypatch, layout):
    """Blocks beyond the first, a last one with a tail, column partials of several launches."""
    z1, z2 = (z.requires_grad_() for z in random_pairs(150, 8, torch.float64, DEVICE))
    monkeypatch.setattr(triton_whole_loss, "ANCHORS_OF_PROGRAM", 64)
    results = []
    for name, workspace in (("triton", triton_launch.WORKSPACE_BYTES), ("triton", 1), ("torch", 1)):
        monkeypatch.setattr(triton_launch, "WORKSPACE_BYTES", workspace)
        loss = ce.fused_hard_negative_loss(z1, z2, layout=layout, backend=name)
        results.append((loss.detach(), *torch.autograd.grad(loss, (z1, z2))))
    for ours in results[:2]:
        for a, b in zip(ours, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("exponents", [(1.0,), (0.5, 1.5)], ids=["one", "two"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both_sides"])
@pytest.mark.parametrize("workspace", [1, 64 * 64 * 8, 256 << 20], ids=["tile", "squares", "everything"])
def test_weights_of_many_features_serve_both_sides(monkeypatch, workspace, columns, exponents):
    """Blocks of a tile, several of them in both directions with tails, one; a limit above each makes no difference."""
    monkeypatch.setattr(triton_launch, "WIDE_FEATURES", 256)
    monkeypatch.setattr(triton_launch, "WIDE_WORKSPACE_BYTES", workspace)
    u, v = _vectors(100, 260), _vectors(150, 260)
    _assert_like_torch(u, v, scale=5.0, unit=True, num_images=50, columns=columns, exponents=exponents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("workspace", [1, 64 * 64 * 8, 256 << 20], ids=["tile", "squares", "everything"])
def test_weights_of_one_set_are_stored_once(monkeypatch, workspace, dtype):
    """Blocks above the diagonal serve the rows below it; lists make the pairs' rules asymmetric, weights are not."""
    monkeypatch.setattr(triton_launch, "WIDE_FEATURES", 256)
    monkeypatch.setattr(triton_launch, "WIDE_WORKSPACE_BYTES", workspace)
    u = _vectors(150, 260).detach().to(dtype).to(torch.float32 if dtype == torch.float16 else dtype).requires_grad_()
    ignored = torch.full((75, 2), NO_COLUMN, device=DEVICE)
    ignored[3, 0], ignored[40, 0], ignored[40, 1] = 100, 7, 90
    coefficients = torch.logspace(-12, 0, 150, 2.0, device=DEVICE, dtype=u.dtype)
    gradients = []
    for name in ("triton", "torch"):
        arguments = {"scale": 5.0, "unit": True, "num_images": 75, "ignored": ignored, "operand_dtype": dtype}
        lse = row_stats(u, None, backend=name, **arguments).lse
        gradients.append(torch.autograd.grad((lse * coefficients).sum(), u)[0])
    ours, theirs = gradients
    assert (ours - theirs).norm() <= (1.5e-3 if dtype == torch.float16 else 1e-12) * theirs.norm()


@pytest.mark.parametrize("upstream", [2.0**-20, 2.0**16])
def test_fp16_weights_of_both_sides_neither_overflow_nor_vanish(monkeypatch, upstream):
    """Coefficients of rows differ by 2^12: what scales a row's weights must not reach the columns."""
    monkeypatch.setattr(triton_launch, "WIDE_FEATURES", 256)
    u, v = (_vectors(n, 300).detach().half().float().requires_grad_() for n in (60, 90))
    coefficients = torch.logspace(-12, 0, 60, 2.0, device=DEVICE) * upstream
    gradients = []
    for name in ("triton", "torch"):
        lse = row_stats(u, v, scale=2.0, unit=True, backend=name, operand_dtype=torch.float16).lse
        gradients.append(torch.autograd.grad((lse * coefficients).sum(), (u, v)))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1.5e-3 * theirs.norm()
        assert (ours - theirs).norm(dim=1).max() <= 1e-2 * theirs.norm(dim=1).max()


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both_sides"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["none", "half", "all"])
def test_fp16_weights_of_both_sides_without_coefficients(monkeypatch, share, columns):
    """A row that the loss ignores weighs nothing: 0, not 0 times what scaling by its neighbours' coefficients gives."""
    monkeypatch.setattr(triton_launch, "WIDE_FEATURES", 256)
    u, v = (_vectors(n, 300).detach().half().float().requires_grad_() for n in (60, 90))
    coefficients = (torch.arange(60, device=DEVICE) >= share * 60) * 2.0**-20
    gradients = []
    for name in ("triton", "torch"):
        lse = row_stats(u, v, scale=2.0, unit=True, columns=columns, backend=name, operand_dtype=torch.float16).lse
        gradients.append(torch.autograd.grad((lse * coefficients).sum(), (u, v)))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1.5e-3 * theirs.norm()


def test_weights_in_several_launches(monkeypatch):
    """Rows of weights are independent: a workspace for one tile changes no bit."""
    u, v = _vectors(100, 300), _vectors(70, 300)
    arguments = {"scale": 5.0, "unit": True}
    at_once = _everything(u, v, "triton", **arguments)
    monkeypatch.setattr(triton_launch, "WORKSPACE_BYTES", 1)
    for a, b in zip(at_once, _everything(u, v, "triton", **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows, columns", [(40, 300), (300, None)], ids=["two_sets", "triangle"])
def test_splits_change_rounding_only(monkeypatch, rows, columns, splits):
    u, v = _vectors(rows, 20), None if columns is None else _vectors(columns, 20)
    arguments = {"scale": 5.0, "exponents": (1.0, 2.0), "unit": True}
    usual = _everything(u, v, "triton", **arguments)
    span = -(-320 // splits // 32) * 32
    monkeypatch.setattr(triton_launch, "split", lambda tiles, columns, block, programs: (splits, span))
    for a, b in zip(usual, _everything(u, v, "triton", **arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("features", [20, 300])
@pytest.mark.parametrize("upstream", [2.0**-20, 1.0, 2.0**16])
def test_fp16_weights_neither_overflow_nor_vanish(upstream, features):
    """A flat softmax over many columns under the upstream gradients a mean and a GradScaler send."""
    x = (_vectors(200, features).detach().half().float()).requires_grad_()
    tuned = {"scale": 2.0, "unit": True, "num_images": 100}
    gradients = []
    for name in ("triton", "torch"):
        lse = row_stats(x, backend=name, operand_dtype=torch.float16, **tuned).lse
        gradients.append(torch.autograd.grad(lse.sum() * upstream, x)[0])
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error <= 1.5e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
def test_bad_numbers_reach_every_statistic_of_their_row(bad, unit):
    """Masks, maxima and padding may pass over NaN; the row's results must not."""
    u = _vectors(40, 20, torch.float32).detach()
    u[7, 3] = bad
    swept = row_stats(u, _vectors(50, 20, torch.float32), scale=3.0, unit=unit, diagnostics=True, backend="triton")
    lse, (_, largest, total, squared) = swept.lse[0], swept.aux
    for statistic in (lse, largest, total, squared):
        assert not statistic[7].isfinite()
        assert statistic[torch.arange(40, device=DEVICE) != 7].isfinite().all()


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0), (1, 1)])
def test_nothing_to_sweep(rows, columns):
    u, v = _vectors(rows, 4), _vectors(columns, 4)
    for both_sides in (False, True):
        _assert_like_torch(u, v, scale=1.0, columns=both_sides, diagnostics=True)
