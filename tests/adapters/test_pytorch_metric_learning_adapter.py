"""pytorch-metric-learning: its own losses, wrappers, reducers and memory, with ours in their place."""

from __future__ import annotations

import pytest
import torch

from parity import assert_same, assert_survives_copies
from peak_memory import needs_proc, peak_growth
from rows import INPUTS, random_pairs
from two_ranks import WORLD, on_both_ranks

host = pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import distributed as host_distributed  # noqa: E402
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices  # noqa: E402

from contrastive_ext.adapters import pytorch_metric_learning as adapter  # noqa: E402

LABELS = torch.tensor([0, 3, 0, 5, 3, 0, 7, 3, -2, -2, 9, 0, 3])  # 5, 7 and 9 stand alone
PAIRS = torch.tensor([4, 1, 2, 1, 8, 4, 2])  # 8 stands alone
KINDS = ["random", "peaked", "crowded"]
DISTANCES = {
    "cosine": distances.CosineSimilarity(),
    "dot of unit rows": distances.DotProductSimilarity(),
    "dot": distances.DotProductSimilarity(normalize_embeddings=False),
}
# loss -> (ours, the host's, labels it takes)
BOTH = {
    "supcon": (adapter.SupConLoss, losses.SupConLoss, LABELS),
    "ntxent": (adapter.NTXentLoss, losses.NTXentLoss, PAIRS),
}
WITH_CLASSES = BOTH | {"ntxent of classes": (adapter.NTXentLoss, losses.NTXentLoss, LABELS)}


def _rows(labels: torch.Tensor, kind: str = "random") -> torch.Tensor:
    return INPUTS[kind](len(labels), 5, torch.float64)[0]


@pytest.fixture(params=BOTH)
def both(request):
    return BOTH[request.param]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("loss", WITH_CLASSES)
def test_same_as_the_package(loss, distance, kind):
    ours, theirs, labels = WITH_CLASSES[loss]
    options = {"temperature": 0.4 if distance != "dot" else 4.0, "distance": DISTANCES[distance]}
    a, b = ours(**options), theirs(**options)
    assert_same(lambda x: a(x, labels), lambda x: b(x, labels), _rows(labels, kind))


def test_defaults_are_the_packages(both):
    ours, theirs, _ = both
    assert ours().temperature == theirs().temperature
    assert type(ours().reducer) is type(theirs().reducer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", WITH_CLASSES)
def test_reference_embeddings(loss, kind):
    """Of other labels too, with gradients on both sides; a row without a positive among them."""
    ours, theirs, labels = WITH_CLASSES[loss]
    ref_labels = torch.cat([labels.unique(), torch.tensor([77, 78])])[1:]  # one label is missing
    if labels is LABELS:
        ref_labels = torch.cat([ref_labels, ref_labels[:4]])
    a, b = ours(temperature=0.3), theirs(temperature=0.3)
    assert_same(
        lambda x, y: a(x, labels, ref_emb=y, ref_labels=ref_labels),
        lambda x, y: b(x, labels, ref_emb=y, ref_labels=ref_labels),
        _rows(labels, kind),
        _rows(ref_labels, kind),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_self_supervised_loss(both, symmetric, kind):
    ours, theirs, _ = both
    a, b = (losses.SelfSupervisedLoss(loss(temperature=0.3), symmetric=symmetric) for loss in (ours, theirs))
    assert_same(a, b, *INPUTS[kind](7, 5, torch.float64))


@pytest.mark.parametrize(
    "reducer",
    [reducers.MeanReducer(), reducers.AvgNonZeroReducer(), reducers.ThresholdReducer(low=1.0), reducers.SumReducer()],
    ids=lambda r: type(r).__name__,
)
def test_reducers_and_regularizers_of_the_host(both, reducer):
    ours, theirs, labels = both
    options = {"reducer": reducer, "embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1}
    a, b = ours(0.3, **options), theirs(0.3, **options)
    assert_same(lambda x: a(x, labels), lambda x: b(x, labels), _rows(labels))


def test_reducers_see_pairs(both):
    """A reducer that weighs by label looks the anchors up by index."""
    ours, theirs, labels = both
    weights = torch.rand(10, dtype=torch.float64)
    labels = labels.abs()
    a, b = (loss(0.3, reducer=reducers.ClassWeightedReducer(weights)) for loss in (ours, theirs))
    assert_same(lambda x: a(x, labels), lambda x: b(x, labels), _rows(labels))


@pytest.mark.parametrize("labels", [[1, 2, 3, 4], [1, 1, 1, 1], [1, 1], [1], [1, 2]], ids=str)
def test_batches_that_tell_nothing_apart_have_loss_zero(both, labels):
    ours, theirs, _ = both
    labels = torch.tensor(labels)
    if ours is adapter.NTXentLoss and len(labels) == 4 and labels[0] == labels[1]:
        labels = torch.tensor([1, 1])
    x = _rows(labels).requires_grad_()
    loss = ours()(x, labels)
    assert loss == theirs()(x, labels) == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_one_anchor_of_one_positive_and_one_negative_has_loss_zero_as_there(both):
    ours, theirs, _ = both
    x, ref = torch.randn(1, 5).double(), torch.randn(2, 5).double()
    arguments = x, torch.tensor([1]), None, ref, torch.tensor([1, 2])
    assert ours()(*arguments) == theirs()(*arguments) == 0


def test_all_pairs_as_indices(both):
    ours, theirs, labels = both
    pairs = get_all_pairs_indices(labels)
    a, b = ours(0.3), theirs(0.3)
    assert_same(lambda x: a(x, labels, pairs), lambda x: b(x, labels, pairs), _rows(labels))


@pytest.mark.parametrize("loss", WITH_CLASSES)
def test_inside_cross_batch_memory(loss):
    """The memory holds the batch's own rows, which wrap around its end; the host leaves each row's own out."""
    ours, theirs, _ = WITH_CLASSES[loss]
    a, b = (losses.CrossBatchMemory(one(temperature=0.3), 5, memory_size=22) for one in (ours, theirs))
    for step in range(5):
        labels = torch.arange(8) // 2 + 4 * step if loss == "ntxent" else torch.randint(0, 4, (8,))
        x = _rows(labels)
        assert_same(_once(a, labels), _once(b, labels), x)
    masked = torch.arange(8) < 3
    labels = torch.arange(8) + 100 if loss == "ntxent" else torch.randint(0, 4, (8,))
    assert_same(_once(a, labels, enqueue_mask=masked), _once(b, labels, enqueue_mask=masked), _rows(labels))


def _once(memory, labels, **options):
    return lambda x: memory(x, labels, **options)


def test_modules_are_values(both):
    ours, theirs, labels = both
    module = ours(temperature=0.2)
    module(_rows(labels), labels)
    assert module.temperature == 0.2 and isinstance(module, theirs)
    assert_survives_copies(module, _rows(labels), labels)
    assert repr(module).startswith(type(module).__name__)


def test_labels_may_be_anywhere_and_of_any_integer(both):
    ours, _, labels = both
    x = _rows(labels)
    assert torch.equal(ours()(x, labels.int()), ours()(x, labels))


def test_half_precision_is_computed_in_float32(both):
    ours, _, labels = both
    x = _rows(labels).to(torch.bfloat16)
    torch.testing.assert_close(ours(0.3)(x, labels), ours(0.3)(x.float(), labels), rtol=0.01, atol=0.01)


def test_it_compiles_around_the_hosts_reducer(both):
    """Graphs break where the host looks at numbers of pairs, as its own do."""
    ours, _, labels = both
    module, x = ours(0.3), _rows(labels).requires_grad_()
    torch._dynamo.reset()
    compiled, expected = torch.compile(module, backend="aot_eager")(x, labels), module(x, labels)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-13)
    got, wanted = (torch.autograd.grad(loss, x)[0] for loss in (compiled, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@needs_proc
@pytest.mark.parametrize("loss", ["SupConLoss", "NTXentLoss"])
def test_memory_is_linear(loss):
    setup = f"""
from contrastive_ext.adapters.pytorch_metric_learning import {loss}
x, labels = torch.randn(n, 128).requires_grad_(), torch.arange(n // 2).repeat(2)
"""
    growth = peak_growth(setup, f"{loss}(0.1)(x, labels).backward()", small=16, large=8192)
    assert growth <= 150 * 2**20, f"{growth / 2**20:.0f} MiB; the matrix alone is 256 MiB"


def _on_a_rank(rank: int) -> dict:
    torch.manual_seed(0)
    x, labels = random_pairs(6 * WORLD, 5, torch.float64)[0], torch.arange(3).repeat(4)
    own, found = slice(6 * rank, 6 * rank + 6), {}
    for name, loss in (("ours", adapter.SupConLoss(0.3)), ("theirs", losses.SupConLoss(0.3))):
        z = x[own].clone().requires_grad_()
        value = host_distributed.DistributedLossWrapper(loss)(z, labels[own])
        found[name] = value.detach(), torch.autograd.grad(value, z)[0]
    return found


def test_inside_the_distributed_wrapper(tmp_path):
    for rank in on_both_ranks(_on_a_rank, tmp_path):
        for ours, theirs in zip(rank["ours"], rank["theirs"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def _without(position: int) -> tuple:
    pairs = list(get_all_pairs_indices(LABELS))
    for i in (position, position + 1):
        pairs[i] = pairs[i][1:]
    return tuple(pairs)


@pytest.mark.parametrize(
    "pairs",
    [
        _without(0),
        _without(2),
        miners.MultiSimilarityMiner(epsilon=-0.1)(
            torch.randn(13, 5, generator=torch.Generator().manual_seed(0)), LABELS
        ),
        miners.TripletMarginMiner(margin=0.1)(torch.randn(13, 5, generator=torch.Generator().manual_seed(0)), LABELS),
    ],
    ids=["a positive fewer", "a negative fewer", "mined pairs", "triplets"],
)
def test_mined_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match=r"must hold all pairs that the labels give, .* use the host's loss for them"):
        adapter.SupConLoss()(_rows(LABELS), LABELS, pairs)


def test_a_miner_in_the_memory_is_refused():
    memory = losses.CrossBatchMemory(adapter.SupConLoss(), 5, memory_size=32, miner=miners.MultiSimilarityMiner())
    with pytest.raises(ValueError, match="or leave the miner out"):
        memory(_rows(LABELS), LABELS)


@pytest.mark.parametrize(
    "reducer", [reducers.AvgNonZeroReducer(), reducers.SumReducer()], ids=lambda r: type(r).__name__
)
def test_several_positives_have_no_loss_of_every_pair(reducer):
    with pytest.raises(ValueError, match=r"with 3 positives of a row .* for \w+Reducer: use MeanReducer\(\)"):
        adapter.NTXentLoss(reducer=reducer)(_rows(LABELS), LABELS)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"distance": distances.LpDistance()}, r"CosineSimilarity\(\) or DotProductSimilarity\(\) .*; got LpDistance"),
        ({"distance": distances.DotProductSimilarity(p=1)}, "with p=2 and power=1"),
        ({"distance": distances.DotProductSimilarity(power=2)}, "with p=2 and power=1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_refused_options(both, options, says):
    with pytest.raises(ValueError, match=says):
        both[0](**options)


def test_labels_are_needed(both):
    with pytest.raises(ValueError, match="labels are needed"):
        both[0]()(_rows(LABELS), None, get_all_pairs_indices(LABELS))
    with pytest.raises(ValueError, match="labels must be integers"):
        both[0]()(_rows(LABELS), LABELS.double())
