"""What a call over pairs can say beyond pairs, on three ranks with as many pairs and with 6, 4 and 2 of them,
against one process that has the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import contrastive_ext as ce
from two_ranks import assert_same, averaged, on_both_ranks

WORLD, PAIRS, MORE, D, E, OWN = 3, 12, 6, 5, 3, 2  # MORE documents of no query, OWN negatives of each pair
SHARES = {"even": (4, 4, 4), "uneven": (6, 4, 2), "ring": (4, 4, 4), "uneven ring": (6, 4, 2)}
BACKENDS = [name for name in ("torch", "cpu", "reference") if name in ce.available_backends()]
ALL = ("q2d", "q2q", "d2q", "d2d")


def _whole() -> dict[str, Tensor]:
    """Everything a call may take; rows of pairs come first, then the further documents."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    columns = PAIRS + MORE
    return {
        "z1": normal(PAIRS, D), "z2": normal(columns, D), "ids": torch.arange(columns) % 7,
        "g1": normal(PAIRS, E), "g2": normal(columns, E),
        "own": normal(PAIRS, OWN, D), "own_ids": torch.arange(PAIRS * OWN).view(PAIRS, OWN) % 5,
        "own_guide": normal(PAIRS, OWN, E),
        "shared": normal(6, D), "shared_ids": torch.arange(6) % 4, "shared_guide": normal(6, E),
        "temperature": 0.4 + torch.rand(PAIRS, dtype=torch.float64),
        "prior": 0.1 * torch.rand(PAIRS, dtype=torch.float64),
        "prior_of_rows": 0.1 * torch.rand(2 * PAIRS, dtype=torch.float64),
    }  # fmt: skip


def _slices(rank: int, shares: tuple[int, ...]) -> dict[str, Tensor]:
    """Which rows of the whole batch are this rank's, by how many there are."""
    before, number = sum(shares[:rank]), shares[rank]
    pairs, third = torch.arange(before, before + number), torch.arange(MORE).view(WORLD, -1)[rank]
    return {
        "pairs": pairs,
        "columns": torch.cat([pairs, PAIRS + third]),
        "rows": torch.cat([pairs, PAIRS + pairs]),
        "third": third,
    }


OF = {"z1": "pairs", "z2": "columns", "ids": "columns", "g1": "pairs", "g2": "columns",
      "own": "pairs", "own_ids": "pairs", "own_guide": "pairs",
      "shared": "third", "shared_ids": "third", "shared_guide": "third", "temperature": "pairs",
      "prior": "pairs", "prior_of_rows": "rows"}  # fmt: skip


def _plain(x: dict) -> dict:
    """z2 without further documents."""
    return {**x, "z2": x["z2"][: len(x["z1"])]}


CASES: dict[str, Callable[[dict, dict], Tensor]] = {
    "all directions": lambda x, o: ce.fused_infonce_loss(x["z1"], x["z2"], 0.4, layout=ALL, ids=x["ids"], **o),
    "directions, guide, negatives of all": lambda x, o: ce.fused_infonce_loss(
        x["z1"], x["z2"], 0.4, layout=ALL, ids=x["ids"], guide=ce.Guide(x["g1"], x["g2"], -0.1),
        negatives=ce.Columns(x["shared"], ids=x["shared_ids"], guide=x["shared_guide"]), **o,
    ),
    "decoupled directions": lambda x, o: ce.fused_decoupled_loss(x["z1"], x["z2"], 0.4, layout=("q2d", "d2q"), **o),
    "own guide": lambda x, o: ce.fused_hard_negative_loss(
        x["z1"], x["z2"], layout="one_way", guide=ce.Guide.own(-0.05), negatives=x["own"], **o
    ),
    "negatives with ids and guide": lambda x, o: ce.fused_debiased_loss(
        x["z1"], x["z2"], layout="one_way", ids=x["ids"], guide=ce.Guide(x["g1"], x["g2"], 0.1, relative=True),
        negatives=ce.Columns(x["own"], ids=x["own_ids"], guide=x["own_guide"]), **o,
    ),
    "symmetric with more": lambda x, o: ce.fused_debiased_loss(
        x["z1"], x["z2"], layout="symmetric", ids=x["ids"], negatives=x["own"], tau_plus=x["prior_of_rows"], **o
    ),
    "hardness": lambda x, o: ce.fused_infonce_loss(
        x["z1"], x["z2"], 0.3, layout=ALL, negatives=x["own"], hardness=2.0, hardness_on="all", **o
    ),
    "temperature and prior of rows": lambda x, o: ce.fused_hard_negative_loss(
        x["z1"], x["z2"], x["temperature"], x["prior"], layout="one_way", ids=x["ids"], **o
    ),
    "bayesian": lambda x, o: ce.fused_bayesian_loss(
        x["z1"], x["z2"], layout="one_way", ids=x["ids"], negatives=x["shared"], **o
    ),
    "priors of two views": lambda x, o: ce.fused_debiased_loss(
        *(_plain(x)[z] for z in ("z1", "z2")), tau_plus=x["prior_of_rows"], **o
    ),
    "prefixes": lambda x, o: ce.fused_row_loss(
        ce.Matryoshka(ce.Debiased(0.02), (2, D), (0.5, 1.0)), x["z1"], x["z2"], layout="one_way", ids=x["ids"], **o
    ),
}  # fmt: skip
LEARNED = ("z1", "z2", "own", "shared", "temperature")


def _compared(rank: int, share: str, call: Callable[[dict, dict], Tensor], backend: str) -> list:
    """Rows of this rank, and averaged gradients of the mean, against the whole batch."""
    whole, slices = _whole(), _slices(rank, SHARES[share])
    leaves = {name: x.requires_grad_() if name in LEARNED else x for name, x in whole.items()}
    local = {name: x[slices[OF[name]]] for name, x in leaves.items()}
    group = ce.AllRanks(exchange="ring" if "ring" in share else "gather", uneven="uneven" in share)
    results = []
    for x, options in ((local, {"group": group}), (leaves, {})):
        rows = call(x, {"backend": backend, "reduction": "none", **options})
        value = call(x, {"backend": backend, **options})
        grads = torch.autograd.grad(value, [leaves[n] for n in LEARNED], allow_unused=True)
        grads = [torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(LEARNED, grads, strict=True)]
        results.append((rows.detach(), [value.detach(), *grads]))
    (rows, ours), (every, expected) = results
    mine = slices["pairs"] if len(every) == PAIRS else slices["rows"]
    named = zip(("mean", *LEARNED), averaged(ours), expected, strict=True)
    return [("rows", rows, every[mine]), *named]


def _index_compared(rank: int, backend: str, exchange: str) -> list:
    """An index is of the rank's own rows of z2, which come in other numbers than the pairs do."""
    whole, slices = _whole(), _slices(rank, SHARES["even"])
    z1, z2 = (whole[name].requires_grad_() for name in ("z1", "z2"))
    own = slices["columns"]  # the columns as the ranks hold them, one after the other
    order = torch.cat([_slices(r, SHARES["even"])["columns"] for r in range(WORLD)])
    index = torch.arange(4).flip(0) // 2
    everyone = torch.cat([r * len(own) + index for r in range(WORLD)])
    mine = z1[slices["pairs"]], z2[own], index, {"group": ce.AllRanks(exchange=exchange)}
    results = []
    for a, b, i, options in (mine, (z1, z2[order], everyone, {})):
        value = ce.fused_hard_negative_loss(a, b, layout="one_way", positive_index=i, backend=backend, **options)
        results.append([value.detach(), *torch.autograd.grad(value, (z1, z2))])
    return list(zip(("mean", "z1", "z2"), averaged(results[0]), results[1], strict=True))


def _can(name: str, exchange: str, backend: str) -> bool:
    return "ring" not in exchange or (backend != "reference" and name != "bayesian")


NAMES = [case for case in itertools.product(CASES, SHARES, BACKENDS) if _can(*case)]
INDEXED = [case for case in itertools.product(("gather", "ring"), BACKENDS) if _can("", *case)]


def _run_everything(rank: int) -> dict:
    results = {}
    for name, share, backend in NAMES:
        torch.manual_seed(0)
        results[f"{name}-{share}-{backend}"] = _compared(rank, share, CASES[name], backend)
    for exchange, backend in INDEXED:
        torch.manual_seed(0)
        results[f"index-{exchange}-{backend}"] = _index_compared(rank, backend, exchange)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found, by name."""
    return on_both_ranks(_run_everything, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.mark.parametrize("name, share, backend", NAMES)
def test_three_ranks_are_the_whole_batch(ranks, name, share, backend):
    for rank in ranks:
        assert_same(rank[f"{name}-{share}-{backend}"])


@pytest.mark.parametrize("exchange, backend", INDEXED)
def test_positives_by_index(ranks, exchange, backend):
    for rank in ranks:
        assert_same(rank[f"index-{exchange}-{backend}"])
