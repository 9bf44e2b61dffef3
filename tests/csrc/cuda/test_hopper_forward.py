"""The `cuda` backend over what it supports, on a Hopper GPU: 64, 128, 256 features, 16 bits, one exponent.

Everywhere else these tests skip with the backend's reason. `make gpu` runs them plainly and under compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch

from accuracy import assert_as_accurate_as_dense, evaluate, largest_terms, on_rounded_operands
from contrastive_ext import row_stats
from contrastive_ext.backends import cuda, dispatch
from contrastive_ext.problem.pairs import UNFILLED
from rows import INPUTS, LOSSES, USAGES

DEVICE = torch.device("cuda")
REASON = cuda.why_not(DEVICE if torch.cuda.is_available() else torch.device("cpu"), torch.float32, torch.bfloat16, 128)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

DTYPES = [torch.float16, torch.bfloat16]
ONE_EXPONENT = [loss for loss in LOSSES if not loss.name.startswith("hard")]
NO_QUEUE = [
    u for u in USAGES if u.name in ("two_view", "one_way", "one_way_more_columns", "shared_negatives", "symmetric")
]

# rows, columns (None: one set), options, reason
PROBLEMS = [
    (128, 128, {}, "one tile, nothing masked"),
    (70, None, {"num_images": 35}, "tails of rows and columns in one tile"),
    (256, 2688, {}, "the ring goes round"),
    (1000, None, {"num_images": 500}, "positives and tails in other tiles than the diagonal"),
    (999, None, {"num_images": 333}, "three views"),
    (140, 900, {"num_images": 70, "positive_offset": 333}, "a shard of gathered columns"),
    (200, None, {"num_images": 1}, "every row is empty"),
    (300, None, {"num_images": 150, "ids": True}, "ids and padding: every tile is masked"),
    (30000, 130, {}, "more blocks than processors"),
    (0, 5, {}, "no rows"),
    (5, 0, {}, "no columns"),
]
IDS = [reason for *_, reason in PROBLEMS]


def _unit_rows(count: int, dtype: torch.dtype, features: int) -> torch.Tensor:
    rows = torch.nn.functional.normalize(torch.randn(count, features, device=DEVICE))
    return rows.to(dtype).float()


def _request(n: int, m: int | None, options: dict, dtype: torch.dtype, features: int = 128):
    u, v = _unit_rows(n, dtype, features), None if m is None else _unit_rows(m, dtype, features)
    options = dict(options)
    if options.pop("ids", False):
        ids = torch.randint(0, 40, (n,), device=DEVICE)
        options["row_ids"] = ids.masked_fill(ids == 7, UNFILLED)
        if m is not None:
            ids = torch.randint(0, 40, (m,), device=DEVICE)
            options["col_ids"] = ids.masked_fill(ids == 7, UNFILLED)
    return u, v, options | {"operand_dtype": dtype}


@pytest.mark.parametrize("n, m, options, reason", PROBLEMS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.0145, 0.01, 0.005])
@pytest.mark.parametrize("unit, features", [(True, 128), (False, 128), (True, 64), (False, 64), (True, 256)])
def test_statistics_match_the_definition(n, m, options, reason, dtype, temperature, unit, features):
    u, v, options = _request(n, m, options, dtype, features)
    scale = 1 / temperature
    ours = row_stats(u, v, scale=scale, unit=unit, backend="cuda", **options)
    exact = row_stats(u.double(), None if v is None else v.double(), scale=scale, backend="torch", **options)
    torch.testing.assert_close(ours.aux, exact.aux.float(), rtol=0, atol=0)
    # a few ulps of the largest logit and of the result
    allowed = 4 * torch.finfo(torch.float32).eps * (scale + 10)
    torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=0, atol=allowed)


TWO_SETS = [p for p in PROBLEMS if p[1] is not None] + [
    (1000, 1000, {"num_images": 1000}, "pairs, tails of both sides"),
    (300, 400, {"num_images": 300, "ids": True}, "ids and padding of two sets"),
    (6000, 300000, {}, "windows of columns"),
]


@pytest.mark.parametrize("n, m, options, reason", TWO_SETS, ids=[reason for *_, reason in TWO_SETS])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01, 0.005])
@pytest.mark.parametrize("unit, features", [(True, 128), (False, 128), (True, 64), (True, 256)])
def test_statistics_of_both_sides_match_the_definition(n, m, options, reason, dtype, temperature, unit, features):
    u, v, options = _request(n, m, options, dtype, features)
    options |= {"scale": 1 / temperature, "columns": True}
    ours, again = (row_stats(u, v, unit=unit, backend="cuda", **options) for _ in range(2))
    exact = row_stats(u.double(), v.double(), backend="torch", **options)
    for ours_of_side, exact_of_side in ((ours.aux, exact.aux), (ours.col_aux, exact.col_aux)):
        torch.testing.assert_close(ours_of_side, exact_of_side.float(), rtol=0, atol=0)
    # a few ulps of the largest logit and of the result
    allowed = 4 * torch.finfo(torch.float32).eps * (1 / temperature + 10)
    for ours_of_side, exact_of_side in ((ours.lse, exact.lse), (ours.col_lse, exact.col_lse)):
        torch.testing.assert_close(ours_of_side.double(), exact_of_side, rtol=0, atol=allowed)
    assert torch.equal(ours.lse, again.lse) and torch.equal(ours.col_lse, again.col_lse)


@pytest.mark.parametrize("n, m, options, reason", PROBLEMS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize("features", cuda.FEATURES)
def test_gradients_match_the_definition(n, m, options, reason, dtype, temperature, features):
    """Both sides, with coefficients of either sign, within what weights rounded to 16 bits allow."""
    u, v, options = _request(n, m, options, dtype, features)
    weights = torch.randn(n, device=DEVICE)

    def gradients(backend, to):
        inputs = [x.to(to).requires_grad_() for x in (u, v) if x is not None]
        more = options if backend == "cuda" else {k: x for k, x in options.items() if k != "operand_dtype"}
        lse = row_stats(*inputs, scale=1 / temperature, unit=True, backend=backend, **more).lse[0]
        finite = lse.isfinite()  # rows without negatives
        return torch.autograd.grad((lse[finite] * weights[finite]).sum(), inputs)

    ours, exact, again = (
        gradients("cuda", torch.float32),
        gradients("torch", torch.float64),
        gradients("cuda", torch.float32),
    )
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for got, truth, repeated in zip(ours, exact, again, strict=True):
        assert torch.equal(got, repeated)
        if truth.numel():  # of rows at random both a sum and its error grow with the square root of their number
            assert (got.double() - truth).abs().max() <= 4 * rounding * truth.abs().max()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("usage", NO_QUEUE, ids=lambda u: u.name)
@pytest.mark.parametrize("loss", ONE_EXPONENT, ids=lambda x: x.name)
def test_losses_and_gradients_obey_the_error_rule(loss, usage, dtype, inputs):
    z1, z2 = INPUTS[inputs](150, 128, dtype, DEVICE)
    z2, options = usage.options(z1, z2)
    options |= loss.parameters | {"temperature": 0.1}
    differentiable = {"z1": z1, "z2": z2}
    vectors = loss.vectors(z1)
    differentiable |= {name: vectors.pop(name) for name in ("positives",) if name in vectors}
    differentiable |= {name: options.pop(name) for name in ("negatives",) if name in options}
    options |= vectors
    upstream = 2.0**16 if dtype == torch.float16 else 1.0
    ours = evaluate(loss.function, differentiable, upstream, backend="cuda", **options)
    dense = evaluate(loss.function, differentiable, upstream, backend="reference", **options)
    exact = on_rounded_operands(loss.function, True)
    truth = evaluate(exact, {k: x.double() for k, x in differentiable.items()}, upstream, dtype=dtype, **options)
    terms = largest_terms(loss.function, differentiable, upstream, **options)
    assert_as_accurate_as_dense(ours, dense, truth, 10.0, terms, dtype)


@pytest.mark.parametrize("n, m, options, reason", PROBLEMS, ids=IDS)
def test_reruns_are_bitwise_equal(n, m, options, reason):
    u, v, options = _request(n, m, options, torch.bfloat16)
    first = row_stats(u, v, scale=14.0, unit=True, backend="cuda", **options)
    for _ in range(20):
        again = row_stats(u, v, scale=14.0, unit=True, backend="cuda", **options)
        assert torch.equal(first.lse, again.lse) and torch.equal(first.aux, again.aux)


def test_a_scale_tensor_is_read_on_the_device():
    u, _, options = _request(300, None, {"num_images": 150}, torch.bfloat16)
    for temperature in (0.5, 0.01):
        scale = torch.tensor(1 / temperature, device=DEVICE)
        by_tensor = row_stats(u, scale=scale, unit=True, backend="cuda", **options)
        by_number = row_stats(u, scale=scale.item(), unit=True, backend="cuda", **options)
        assert torch.equal(by_tensor.lse, by_number.lse)


def test_bad_numbers_reach_the_statistics():
    for bad in (torch.nan, torch.inf):
        for unit in (True, False):
            u, _, options = _request(300, None, {"num_images": 150}, torch.bfloat16)
            u[3, 1] = bad
            lse = row_stats(u, scale=2.0, unit=unit, backend="cuda", **options).lse
            assert not lse[0, 3].isfinite()


@pytest.mark.parametrize(
    "call, says",
    [
        ({"exponents": (1.0, 2.0)}, "second exponent"),
        ({"diagnostics": True}, "diagnostics"),
        ({}, "means of frozen columns"),
    ],
)
def test_what_the_kernels_lack_raises_and_says_so(call, says):
    u, v, options = _request(8, 8 if "frozen" in says else None, {}, torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run this call.*{says}"):
        row_stats(u.requires_grad_(), v, scale=2.0, backend="cuda", **options, **call)


def test_other_dtypes_and_sizes_have_reasons():
    assert "operands" in cuda.why_not(DEVICE, torch.float32, torch.float32, 128)
    assert "D = 64, 128, 256" in cuda.why_not(DEVICE, torch.float32, torch.bfloat16, 96)
    assert "float64" in cuda.why_not(DEVICE, torch.float64, torch.bfloat16, 128)
    assert dispatch.select("auto", DEVICE, torch.float32, torch.bfloat16, 128).name != "cuda"
