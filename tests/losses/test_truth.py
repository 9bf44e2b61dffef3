"""Every keyword of every loss with every other, on every backend, held to the formulas of truth.py.

The cases are covering arrays: any two levels of any two factors (layouts, shapes, dtypes, kinds of memory, keywords)
meet in at least one of them. `make fuzz` draws further ones at random.
"""

from __future__ import annotations

import inspect
import warnings
from itertools import chain

import pytest
import torch
import torch.distributed as dist

import contrastive_ext as ce
import truth
from contrastive_ext.backends import dispatch
from contrastive_ext.problem.ranking import histogram_axis
from covering import covering_array, pairs_of, possible_pairs
from fuzz import FAMILIES, backends, drawn, one_rank, spoken
from truth_check import compare, ours

# losses over pairs have far more keywords, and had a fault that took three of them: three arrays
SEEDS = {"pairs": (0, 1, 2)}
ARRAYS = {
    family.name: [
        case for seed in SEEDS.get(family.name, (0,)) for case in covering_array(family.levels, family.allowed, seed)
    ]
    for family in FAMILIES
}
CASES = [(family, case, seed) for family in FAMILIES for seed, case in enumerate(ARRAYS[family.name])]
ON_THE_CPU = [name for name in ("cpu", "torch", "reference") if name in ce.available_backends()]
IN_THE_INTERPRETER = 40


def _id(item) -> str:
    family, _, seed = item
    return f"{family.name}-{seed}"


def _small(item) -> bool:
    """Of the interpreter's size, and not in a dtype it does not know."""
    _, case, _ = item
    b, d = case["shape"]
    return b * d <= 9 * 16 and case["dtype"] != "bfloat16" and case.get("operand_dtype") != torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    started = not dist.is_initialized()
    one_rank()
    yield
    if started:
        dist.destroy_process_group()


def _check(item, names: list[str]) -> None:
    family, case, seed = item
    call, truth, dense, upstream = drawn(family, case, seed)
    failures = []
    for name in [x for x in names if x in backends(case)]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # rows on the debiasing floor, raw queues: other tests ask for them
                compare(call, name, ours(call, name, upstream), dense, truth)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join([spoken(family, case), *failures])


@pytest.mark.parametrize("item", CASES, ids=_id)
def test_loss_gradients_and_statistics_are_the_truth(item):
    _check(item, ON_THE_CPU)


def _triton():
    reason = next(b for b in dispatch.BACKENDS if b.name == "triton").why_not(
        torch.device("cpu"), torch.float32, torch.float32, 8
    )
    small = [item for item in CASES if _small(item)]
    few = small[:: max(1, len(small) // IN_THE_INTERPRETER)][:IN_THE_INTERPRETER]
    marks = [pytest.mark.interpreter, *([pytest.mark.skip(reason=reason)] if reason else [])]
    return [pytest.param(item, id=_id(item), marks=marks) for item in few]


@pytest.mark.parametrize("item", _triton())
def test_triton_computes_the_truth(item):
    _check(item, ["triton"])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_any_two_levels_meet(family):
    met = set(chain.from_iterable(pairs_of(case) for case in ARRAYS[family.name]))
    assert possible_pairs(family.levels, family.allowed) <= met
    levels = {(name, level) for name, factor in family.factors.items() for level in factor.levels}
    assert levels <= {item for case in ARRAYS[family.name] for item in case.items()}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_keyword_is_known(family):
    """A new keyword of a public loss has to become a factor of its family."""
    known = set(chain.from_iterable(factor.keywords for factor in family.factors.values())) | set(family.inputs)
    spoken_of = set()
    for function, _, _ in family.functions.values():
        keywords = set(inspect.signature(function).parameters)
        assert keywords <= known, f"{function.__name__}: no factor says {sorted(keywords - known)}"
        spoken_of |= keywords
    assert known <= spoken_of, f"no loss takes {sorted(known - spoken_of)}"


def test_every_loss_is_in_a_family():
    public = {getattr(ce, name) for name in ce.__all__ if name.startswith("fused_")}
    assert {function for family in FAMILIES for function, _, _ in family.functions.values()} == public


@pytest.mark.parametrize("ulps", [10, 23, 25])
def test_a_rank_near_the_edge_of_a_bin_is_decided_beyond_the_slack_of_the_axis(ulps):
    """The axis ends 16 ulps below the highest logit: a negative 10 ulps below an edge counts as one above it."""
    bins, eps = 4, torch.finfo(torch.float32).eps
    x = torch.tensor([[0.0, 0.75 - ulps * eps, 1.0]], dtype=torch.float64)
    how = truth.Arithmetic(torch.float64, torch.float32, normalize=True)
    truth._histogram_rank(how, x, torch.ones_like(x, dtype=torch.bool), torch.full((1, 1), 3.0), bins)
    assert (how.clearance >= 1) == (ulps > 24)
    low, per_logit, _ = histogram_axis(x[:, 0].float(), x[:, 2].float(), torch.full((1,), 3.0), bins)
    assert ((x[0, 1].float() - low) * per_logit >= 3).item() == (ulps == 10)
