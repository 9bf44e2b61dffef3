"""The streaming primitive on its own: statistics and gradients against the dense definition, operator hygiene."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from contrastive_ext import row_stats
from contrastive_ext.backends.torch import row_stats as torch_blocks
from contrastive_ext.operators.ranked_stats import ranked_stats
from contrastive_ext.problem.pairs import NO_COLUMN, NO_COLUMN_ID, NO_ROW_ID, UNFILLED, Gate
from contrastive_ext.problem.ranking import Ranking

OP = torch.ops.contrastive_ext.row_stats

# name, rows, columns (None: one set), what else is passed, why it is there
PROBLEMS = [
    ("one_set", 20, None, {"num_images": 10}, "two views"),
    ("three_views", 21, None, {"num_images": 7}, "more than one positive is left out"),
    ("one_set_no_images", 9, None, {}, "even an anchor's own column is a candidate"),
    ("clip", 12, 12, {"num_images": 12, "columns": True}, "rows and columns from one pass"),
    ("one_way", 5, 13, {"num_images": 5}, "more columns than rows"),
    ("rank_shard", 6, 24, {"num_images": 3, "positive_offset": 12}, "local anchors, gathered columns"),
    ("rank_shard_columns", 6, 24, {"num_images": 6, "positive_offset": 12, "columns": True}, "offset, both sides"),
    ("queue", 7, 30, {}, "no positive among the columns"),
    ("two_exponents", 16, None, {"num_images": 8, "exponents": (1.0, 2.0)}, "hard negatives, squaring is possible"),
    ("odd_exponents", 16, None, {"num_images": 8, "exponents": (0.3, 1.3)}, "hard negatives, squaring is not"),
    ("two_exponents_columns", 8, 8, {"num_images": 8, "exponents": (0.5, 1.5), "columns": True}, "both at once"),
    ("ids", 20, None, {"num_images": 10, "ids": "rows"}, "equal ids are ignored"),
    ("ids_two_sets", 12, 15, {"num_images": 12, "ids": "both"}, "ids on two sides"),
    ("ids_columns", 9, 9, {"num_images": 9, "ids": "both", "columns": True}, "ids seen from both sides"),
    ("padded", 14, None, {"num_images": 7, "ids": "padded rows"}, "asymmetric: padding is no candidate, but an anchor"),
    ("padded_columns", 9, 11, {"num_images": 9, "ids": "padded both", "columns": True}, "asymmetric from both sides"),
    ("unfilled", 6, 10, {"ids": "columns"}, "a queue that is not full, anchors without ids"),
    ("all_ignored", 8, None, {"num_images": 4, "ids": "equal"}, "every row is empty"),
    ("some_ignored", 8, 6, {"ids": "one class"}, "some rows are empty"),
    ("equal_ids", 12, None, {"num_images": 12, "ids": "rows", "only_equal_ids": True}, "supervised positives"),
    ("equal_ids_columns", 9, 8, {"ids": "both", "only_equal_ids": True, "columns": True}, "the same from both sides"),
    ("lists", 20, None, {"num_images": 10, "lists": (10, 3)}, "detected false negatives, from both sides"),
    ("lists_of_rows", 70, None, {"num_images": 35, "lists": (70, 4), "ids": "padded rows"}, "lists and ids at once"),
    ("lists_two_sets", 12, 40, {"num_images": 6, "lists": (6, 5)}, "false negatives among other columns"),
    ("lists_without_end", 6, 9, {"lists": (2, 12), "exponents": (1.0, 2.0)}, "longer than there are columns"),
    ("gate", 20, None, {"num_images": 10, "gate": 1}, "a guide for one set"),
    ("gate_columns", 11, 11, {"num_images": 11, "gate": 1, "columns": True}, "a guide for rows and columns"),
    ("gate_scorers", 12, 30, {"num_images": 6, "gate": 3, "ids": "columns"}, "several scorers, shared by two rows"),
]  # fmt: skip
IDS = [p[0] for p in PROBLEMS]


def _ids(kind: str | None, n: int, m: int | None, device) -> dict[str, Tensor]:
    if kind is None:
        return {}
    rows, cols = torch.arange(n) % 4, torch.arange(m or n) % 4
    if kind == "equal":
        rows = torch.zeros(n, dtype=torch.int64)
    elif kind == "one class":
        cols = torch.zeros_like(cols)
    elif kind.startswith("padded"):
        rows[1::3], cols[::4] = UNFILLED, UNFILLED
    elif kind == "columns":
        cols = torch.where(cols < 2, UNFILLED, NO_COLUMN_ID)
    named = {"row_ids": rows, "col_ids": cols}
    keep = {"rows": ["row_ids"], "padded rows": ["row_ids"], "equal": ["row_ids"], "columns": ["col_ids"]}
    return {name: named[name].to(device) for name in keep.get(kind, named)}


def _lists(shape: tuple[int, int], m: int) -> Tensor:
    """Distinct columns in any order, then NO_COLUMN."""
    groups, length = shape
    lists = torch.full(shape, NO_COLUMN)
    for g in range(groups):
        some = torch.randperm(m)[: torch.randint(0, length + 1, ()).item()]
        lists[g, : len(some)] = some
    return lists


def _gate(num_scorers: int, n: int, m: int, one_set: bool, columns: bool, dtype, device) -> Gate:
    groups = n if num_scorers == 1 else n // 2
    scorers = torch.randn(num_scorers, groups, 3, dtype=torch.float64)
    features = scorers[0] if one_set else torch.randn(m, 3, dtype=torch.float64)
    row_limit = torch.randn(n, dtype=torch.float64)
    col_limit = row_limit if one_set else torch.randn(m, dtype=torch.float64) if columns else None
    gate = (None if x is None else x.to(device, dtype) for x in (scorers, features, row_limit, col_limit))
    return Gate(*gate)


def _negatives(n: int, m: int, options: dict, one_set: bool) -> tuple[Tensor, Tensor]:
    """keep(i -> j) and keep(j -> i), pair by pair as pairs.py states the rules."""
    images, offset = options.get("num_images", 0), options.get("positive_offset", 0)
    row_ids = options.get("row_ids", torch.full((n,), NO_ROW_ID)).tolist()
    col_ids = row_ids if one_set and "row_ids" in options else [NO_COLUMN_ID] * m
    col_ids = options["col_ids"].tolist() if "col_ids" in options else col_ids
    forward, backward = torch.zeros(n, m, dtype=torch.bool), torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            same_image = bool(images) and 0 <= j - offset < n and i % images == (j - offset) % images
            counts = not same_image and (row_ids[i] == col_ids[j]) == options.get("only_equal_ids", False)
            forward[i, j] = counts and col_ids[j] != UNFILLED
            backward[i, j] = counts and row_ids[i] != UNFILLED
    if "ignored" in options:
        lists = options["ignored"].tolist()
        for i in range(n):
            forward[i, [j for j in lists[i % len(lists)] if j >= 0]] = False
        for j in range(m if one_set else 0):
            backward[[i for i in lists[j % len(lists)] if i >= 0], j] = False
    if "gate" in options:
        gate = options["gate"]
        score = torch.stack([s.repeat(n // len(s), 1) @ gate.features.T for s in gate.scorers]).amax(0).cpu()
        forward &= score <= gate.row_limit.cpu()[:, None]
        if gate.col_limit is not None:
            backward &= score <= gate.col_limit.cpu()
    return forward, backward


def _lse(s: Tensor, keep: Tensor, beta: float) -> Tensor:
    empty = ~keep.any(1)
    masked = (beta * s).masked_fill(~keep, -torch.inf).masked_fill(empty[:, None], 0.0)
    return masked.logsumexp(1).masked_fill(empty, -torch.inf)


def _problem(problem, device, dtype=torch.float64, unit=True):
    _, n, m, options, _ = problem
    options = dict(options)
    u = torch.randn(n, 6, dtype=torch.float64)
    v = None if m is None else torch.randn(m, 6, dtype=torch.float64)
    if unit:
        u, v = torch.nn.functional.normalize(u), None if v is None else torch.nn.functional.normalize(v)
    options |= _ids(options.pop("ids", None), n, m, device)
    if "lists" in options:
        options["ignored"] = _lists(options.pop("lists"), m or n).to(device)
    if "gate" in options:
        options["gate"] = _gate(options["gate"], n, m or n, m is None, "columns" in options, dtype, device)
    scale = torch.tensor(3.0, dtype=dtype, device=device)
    return u.to(device, dtype), None if v is None else v.to(device, dtype), scale, options


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_statistics_and_gradients_match_the_definition(run, problem, unit):
    backend, device = run
    u, v, scale, options = _problem(problem, device, unit=unit)
    leaves = [x.requires_grad_() for x in (u, v, scale) if x is not None]
    swept = row_stats(u, v, scale=scale, unit=unit, diagnostics=True, backend=backend, **options)

    columns = u if v is None else v
    exponents = options.get("exponents", (1.0,))
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
    forward, backward = (k.to(device) for k in _negatives(len(u), len(columns), on_cpu, one_set=v is None))
    s = scale * (u @ columns.T)
    sides = [(swept.lse, swept.aux, s, forward)]
    if options.get("columns"):
        sides.append((swept.col_lse, swept.col_aux, s.T, backward.T))
    ours, truth = 0.0, 0.0
    for lse, aux, logits, keep in sides:
        expected = torch.stack([_lse(logits, keep, beta) for beta in exponents])
        torch.testing.assert_close(lse, expected, rtol=1e-13, atol=1e-13)
        kept = logits.where(keep, 0.0).detach()
        largest = logits.detach().masked_fill(~keep, -torch.inf).amax(1)
        expected_aux = [keep.sum(1).double(), largest, kept.sum(1), _lse(logits.detach(), keep, 2 * exponents[0])]
        torch.testing.assert_close(aux, torch.stack(expected_aux), rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(expected)
        finite = expected.isfinite()
        ours = ours + (lse.where(finite, 0.0) * weights).sum()
        truth = truth + (expected.where(finite, 0.0) * weights).sum()
    if truth.requires_grad:
        for got, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", ["u", "v", "scale", "u v", "u scale", "v scale"])
@pytest.mark.parametrize(
    "problem",
    [p for p in PROBLEMS if p[0] in ("one_way", "clip", "ids_two_sets", "lists_two_sets", "gate_scorers")],
    ids=lambda p: p[0],
)
def test_only_what_needs_a_gradient_gets_one(run, problem, needs):
    backend, device = run
    u, v, scale, options = _problem(problem, device)
    named = {"u": u, "v": v, "scale": scale}
    everything = [x.clone().requires_grad_() for x in named.values()]
    row_stats(*everything[:2], scale=everything[2], unit=True, backend=backend, **options).lse.sum().backward()
    for name, x in named.items():
        x.requires_grad_(name in needs.split())
    row_stats(u, v, scale=scale, unit=True, backend=backend, **options).lse.sum().backward()
    for (name, x), full in zip(named.items(), everything, strict=True):
        if name in needs.split():
            torch.testing.assert_close(x.grad, full.grad, rtol=1e-12, atol=1e-13)
        else:
            assert x.grad is None


def test_frozen_columns_may_change_before_the_backward(run):
    """A queue is overwritten in place between forward and backward; its gradient was made in the forward."""
    backend, device = run
    u = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    queue = torch.randn(8, 4, dtype=torch.float64, device=device)
    ids = torch.full((8,), NO_COLUMN_ID, device=device)
    expected = torch.autograd.grad((u @ queue.T).logsumexp(1).sum(), u)[0]
    swept = row_stats(u, queue, col_ids=ids, scale=1.0, backend=backend)
    queue.zero_(), ids.zero_()
    torch.testing.assert_close(torch.autograd.grad(swept.lse.sum(), u)[0], expected)


def _pair_arguments(options: dict) -> list:
    gate = options.get("gate")
    tensors = [options.get(name) for name in ("row_ids", "col_ids", "ignored")]
    tensors += [None] * 4 if gate is None else [gate.scorers, gate.features, gate.row_limit, gate.col_limit]
    numbers = [options.get("num_images", 0), options.get("positive_offset", 0), options.get("only_equal_ids", False)]
    return numbers + tensors


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_operator_passes_opcheck(run, problem):
    backend, device = run
    u, v, scale, options = _problem(problem, device)
    arguments = (
        u.requires_grad_(), v, scale.requires_grad_(), 0.0, list(options.get("exponents", (1.0,))),
        *_pair_arguments(options), True, u.dtype, backend, options.get("columns", False), False, True, False,
    )  # fmt: skip
    opcheck(OP, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", ["one_set", "clip", "queue", "ids", "lists", "gate"])
def test_operator_is_traceable_with_dynamic_shapes(run, name):
    backend, device = run
    problem = next(p for p in PROBLEMS if p[0] == name)
    u, v, scale, options = _problem(problem, device)
    v = v if v is None or name == "queue" else v.requires_grad_()
    arguments = (
        u.requires_grad_(), v, scale.requires_grad_(), 0.0, [1.0], *_pair_arguments(options),
        True, u.dtype, backend, options.get("columns", False), name == "queue", False, False,
    )  # fmt: skip
    opcheck(OP, arguments, test_utils="test_aot_dispatch_dynamic")


def test_second_derivative_raises(run):
    backend, device = run
    u = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    lse = row_stats(u, scale=2.0, num_images=3, backend=backend).lse
    (grad,) = torch.autograd.grad(lse.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_second_derivative_through_frozen_columns_raises(run):
    backend, device = run
    u = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    lse = row_stats(u, torch.randn(5, 4, dtype=torch.float64, device=device), scale=2.0, backend=backend).lse
    (grad,) = torch.autograd.grad(lse.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_reruns_are_bitwise_equal(run, problem):
    backend, device = run
    u, v, scale, options = _problem(problem, device, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (u, v) if x is not None]

    def once():
        lse = row_stats(u, v, scale=scale, unit=True, backend=backend, **options).lse
        return [lse, *torch.autograd.grad(lse.where(lse.isfinite(), 0.0).sum(), leaves)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_strided_inputs(run, problem):
    backend, device = run
    u, v, scale, options = _problem(problem, device)
    spread = [None if x is None else torch.stack([x, x + 1], -1)[..., 0].T.contiguous().T for x in (u, v)]
    assert not spread[0].is_contiguous()
    for x in (u, v, *spread):
        if x is not None:
            x.requires_grad_()
    plain = row_stats(u, v, scale=scale, backend=backend, **options).lse
    strided = row_stats(*spread, scale=scale, backend=backend, **options).lse
    assert torch.equal(plain, strided)
    upstream = torch.rand_like(plain.T).T  # an upstream gradient with strides of its own
    for a, b in ((u, spread[0]), (v, spread[1])):
        if a is not None:
            ours = [torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y, x in ((plain, a), (strided, b))]
            assert torch.equal(*ours)


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_tile_edges_do_not_matter(problem, monkeypatch):
    """Tiles of 4 put edges, corners and mixed masks everywhere a single tile has none."""
    u, v, scale, options = _problem(problem, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in (u, v, scale) if x is not None]

    def once():
        swept = row_stats(u, v, scale=scale, diagnostics=True, backend="torch", **options)
        parts = [swept.lse, swept.col_lse]
        total = sum(
            (p.where(p.isfinite(), 0.0) * torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape)).sum() for p in parts
        )
        return [*swept, *torch.autograd.grad(total, leaves)]

    whole = once()
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 4)
    for a, b in zip(whole, once(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale_type", ["float", "tensor"])
def test_extreme_logits_stay_finite(run, scale_type):
    backend, device = run
    u = torch.nn.functional.normalize(torch.randn(30, 5, device=device)).requires_grad_()
    for scale in (1e-2, 2e2, 5e3):
        given = scale if scale_type == "float" else torch.tensor(scale, device=device)
        swept = row_stats(u, scale=given, num_images=15, unit=True, exponents=(1.0, 2.0), backend=backend)
        (grad,) = torch.autograd.grad(swept.lse.sum(), u)
        assert swept.lse.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"u": torch.ones(3)}, ValueError, r"u must be \[N, D\]"),
        ({"u": torch.ones(3, 2), "v": torch.ones(3, 4)}, ValueError, r"\[3, 2\] and \[3, 4\]"),
        ({"u": torch.ones(3, 2, dtype=torch.float16)}, TypeError, "operand_dtype"),
        ({"u": torch.ones(3, 2), "v": torch.ones(3, 2).double()}, TypeError, "float64"),
        ({"v": torch.ones(3, 2, device="meta")}, TypeError, "one device"),  # once read memory that was not there
        ({"u": [[1.0]]}, TypeError, "u must be a tensor"),
        ({"scale": 0.0}, ValueError, "scale must be > 0"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"scale": float("inf")}, ValueError, "finite"),
        ({"scale": torch.tensor(-1.0)}, ValueError, "scale must be > 0"),
        ({"scale": torch.ones(1)}, ValueError, "0-d"),
        ({"exponents": (1.0, 2.0, 3.0)}, ValueError, "one or two"),
        ({"exponents": (0.0,)}, ValueError, "positive"),
        ({"num_images": 3}, ValueError, "whole views"),
        ({"num_images": -2}, ValueError, "whole views"),
        ({"num_images": 2, "positive_offset": 3}, ValueError, "inside the columns"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "int64"),
        ({"row_ids": torch.zeros(4)}, ValueError, "float32"),
        ({"col_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "second set"),
        ({"columns": True}, ValueError, "second set"),
        ({"only_equal_ids": True}, ValueError, "compares ids"),
        ({"ignored": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "divisor of 4 rows"),
        ({"ignored": torch.zeros(4, 1)}, ValueError, "float32"),
        ({"row_ids": [0, 0, 1, 1]}, TypeError, "row_ids must be a tensor"),
        ({"gate": (torch.ones(1, 4, 3), torch.ones(4, 3))}, TypeError, "pairs.Gate"),
        ({"gate": Gate(torch.ones(1, 0, 3), torch.ones(4, 3), torch.ones(4))}, ValueError, "a gate is"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 3), torch.ones(4))}, ValueError, "col_limit"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 2), torch.ones(4), torch.ones(4))}, ValueError, "a gate is"),
        ({"gate": Gate(torch.ones(1, 4, 3), torch.ones(4, 3).double(), torch.ones(4))}, TypeError, "features"),
        ({"operand_dtype": torch.int8}, TypeError, "operand_dtype must be"),
        ({"backend": "fastest"}, ValueError, "auto"),
        ({"backend": "reference"}, ValueError, "streams"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, error, says):
    with pytest.raises(error, match=says):
        row_stats(**({"u": torch.ones(4, 2), "scale": 1.0} | arguments))


@pytest.mark.parametrize("unit", [True, False], ids=["unit", "free"])
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p[2] is not None and "columns" not in p[3]], ids=lambda p: p[0]
)
def test_means_and_maximum_without_a_gradient(run, problem, unit):
    backend, device = run
    u, v, scale, options = _problem(problem, device, unit=unit)
    swept = row_stats(u, v, scale=scale, unit=unit, means=True, maximum=True, backend=backend, **options)
    on_cpu = {k: x.cpu() if isinstance(x, Tensor) else x for k, x in options.items()}
    keep = _negatives(len(u), len(v), on_cpu, one_set=False)[0].to(device)
    s = (scale * (u @ v.T)).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(swept.aux, torch.stack([keep.sum(1).double(), s.amax(1)]), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(swept.mean[0], s.softmax(1).nan_to_num(0.0) @ v, rtol=1e-12, atol=1e-13)
    for k, beta in enumerate(options.get("exponents", (1.0,))):
        torch.testing.assert_close(swept.lse[k], _lse(s, keep, beta), rtol=1e-13, atol=1e-13)


def test_maximum_of_both_sides(run):
    backend, device = run
    u, v, scale, options = _problem(next(p for p in PROBLEMS if p[0] == "clip"), device)
    some, everything = (
        row_stats(u, v, scale=scale, unit=True, backend=backend, **options, **more)
        for more in ({"maximum": True}, {"diagnostics": True})
    )
    torch.testing.assert_close(some.aux, everything.aux[:2])
    torch.testing.assert_close(some.col_aux, everything.col_aux[:2])


@pytest.mark.parametrize("function", ["row_stats", "ranked_stats"])
def test_a_gate_of_one_set_has_one_side(run, function):
    """Backends compute the score of a pair once or twice: with two sides they would disagree."""
    backend, device = run
    u = torch.randn(6, 3, dtype=torch.float64, device=device)
    guide, limit = torch.randn(6, 2, dtype=torch.float64, device=device), torch.zeros(6, dtype=torch.float64).to(device)
    calls = {
        "row_stats": lambda gate: row_stats(u, scale=2.0, gate=gate, backend=backend),
        "ranked_stats": lambda gate: ranked_stats(
            u, ranking=Ranking(0.1, 0.9, 0.9, 1e-3, 0), scale=2.0, gate=gate, backend=backend
        ),
    }
    call = calls[function]
    call(Gate(guide[None], guide.clone(), limit, limit.clone()))  # the values count, not whose memory they are in
    guide[0, 0] = torch.nan
    call(Gate(guide[None], guide.clone(), limit, limit.clone()))
    if device.type == "cpu":
        for gate in (Gate(guide[None], -guide, limit, limit), Gate(guide[None], guide, limit, limit + 1)):
            with pytest.raises(ValueError, match="one set"):
                call(gate)


def test_lists_belong_to_somebody_and_may_be_empty(run):
    backend, device = run
    u = torch.randn(6, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="G a divisor of 6"):
        row_stats(u, scale=2.0, ignored=torch.zeros(0, 4, dtype=torch.int64, device=device), backend=backend)
    for groups in (1, 6):
        none = torch.zeros(groups, 0, dtype=torch.int64, device=device)
        listed = row_stats(u, scale=2.0, num_images=6, ignored=none, backend=backend)
        plain = row_stats(u, scale=2.0, num_images=6, backend=backend)
        torch.testing.assert_close(listed.lse, plain.lse, rtol=1e-14, atol=1e-14)
        assert listed.aux.equal(plain.aux)
