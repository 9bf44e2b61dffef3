"""A batch in chunks is the batch in one piece: value, gradients, statistics, under everything a training loop does."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contrastive_ext as ce
from peak_memory import needs_proc, peak_growths
from rows import LOSSES, RANKED, USAGES
from two_ranks import assert_same

PAIRS, INPUTS, FEATURES = 10, 4, 5
CHUNKS = [10, 5, 4, 3, 1]  # 1, 2, 3, 4 and 10 of them, the last one ragged for 4 and 3
TABLE = [*LOSSES, *RANKED]


def _encoder(dropout: float = 0.0) -> nn.Sequential:
    layers = [nn.Linear(INPUTS, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, FEATURES)]
    return nn.Sequential(*layers).double()


def _inputs(*rows: int) -> list[Tensor]:
    return [torch.randn(n, INPUTS, dtype=torch.float64) for n in rows]


def _gradients(*modules: nn.Module) -> list[Tensor]:
    """What backward left, taken away."""
    gradients = [p.grad for module in modules for p in module.parameters()]
    for module in modules:
        module.zero_grad()
    return gradients


def _compared(loss: Callable, chunk: int, encoders: tuple[nn.Module, ...], xs: list[Tensor], **keywords) -> list:
    """(label, ours, expected) of value and gradients, chunked and in one piece, by a random upstream gradient."""
    upstream = torch.randn((), dtype=torch.float64)
    expected = loss(*(encoder(x) for encoder, x in zip(encoders, xs, strict=True)), **keywords)
    (upstream * expected).backward()
    gradients = _gradients(*dict.fromkeys(encoders))
    ours = ce.GradientCache(loss, chunk)(encoders, *xs, **keywords)
    (upstream * ours).backward()
    pairs = zip(_gradients(*dict.fromkeys(encoders)), gradients, strict=True)
    return [("value", ours.detach(), expected.detach())] + [(f"gradient {i}", *pair) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)
def test_every_loss_is_that_of_one_piece(loss, chunk):
    encoder = _encoder()
    xs = _inputs(PAIRS, PAIRS)
    keywords = loss.vectors(encoder(xs[0]).detach())
    for what in (partial(loss.function, **loss.parameters), loss.module(**loss.parameters)):
        assert_same(_compared(what, chunk, (encoder, encoder), xs, temperature=0.4, **keywords))


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_every_usage_is_that_of_one_piece(usage):
    encoders = _encoder(), _encoder()
    xs = _inputs(PAIRS, PAIRS)
    columns, keywords = usage.options(*(encoder(x).detach() for encoder, x in zip(encoders, xs, strict=True)))
    xs += _inputs(len(columns) - PAIRS)
    xs = [xs[0], torch.cat(xs[1:])]
    assert_same(_compared(ce.fused_debiased_loss, 3, encoders, xs, temperature=0.4, **keywords))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_that_are_no_pair_and_any_other_callable(chunk):
    encoder, average = _encoder(), _encoder().requires_grad_(False)
    labels = torch.randint(0, 3, (2 * PAIRS,))
    queue = ce.NegativeQueue(7, FEATURES, dtype=torch.float64)
    queue.enqueue(torch.randn(7, FEATURES, dtype=torch.float64))
    perm, theta = torch.randperm(PAIRS), torch.rand(PAIRS)

    def false_negatives(z1, z2):
        return ce.fused_false_negative_loss(torch.stack([z1, z2]), mode="attract", top_k=2)

    def self_labeling(q, k, mixed):
        return ce.fused_self_labeling_loss(q, k, queue, mixed, perm, theta)

    def triplet(anchor, positive, negative):
        return F.triplet_margin_loss(anchor, positive, negative)

    for loss, encoders, rows in (
        (false_negatives, (encoder, encoder), [PAIRS] * 2),
        (self_labeling, (encoder, average, encoder), [PAIRS] * 3),
        (triplet, (encoder, encoder, encoder), [PAIRS] * 3),
    ):
        compared = _compared(loss, chunk, encoders, _inputs(*rows))
        assert_same([row for row in compared if row[1] is not None])
    assert_same(_compared(ce.fused_supcon_loss, chunk, (encoder,), _inputs(2 * PAIRS), labels=labels))


def test_a_learned_temperature_has_its_gradient_and_statistics_come_along():
    encoder, scale = _encoder(), ce.LogitScale(0.2).double()
    xs = _inputs(PAIRS, PAIRS)
    ids = torch.randint(0, 4, (PAIRS,))
    loss = ce.InfoNCELoss(layout="symmetric", return_stats=True)
    value, stats = loss(encoder(xs[0]), encoder(xs[1]), logit_scale=scale(), ids=ids)
    value.backward()
    expected = _gradients(scale, encoder)
    ours, same_stats = ce.GradientCache(loss, 3)(encoder, *xs, logit_scale=scale(), ids=ids)
    ours.backward()
    assert_same([("value", ours.detach(), value.detach()), ("temperature", _gradients(scale)[0], expected[0])])
    assert same_stats.to_dict() == pytest.approx(stats.to_dict(), rel=1e-12)


def test_the_recipe_of_the_paper_gives_the_same():
    """GradCache: embeddings without a graph, the loss's gradient in them, a product with every chunk's embeddings."""
    encoder = _encoder(dropout=0.3)
    xs = _inputs(PAIRS, PAIRS)
    torch.manual_seed(0)
    states, leaves = [], []
    with torch.no_grad():
        for x in xs:
            encoded = []
            for piece in x.split(3):
                states.append(torch.get_rng_state())
                encoded.append(encoder(piece))
            leaves.append(torch.cat(encoded).requires_grad_())
    value = ce.fused_infonce_loss(*leaves, 0.4)
    value.backward()
    chunks = [pair for x, z in zip(xs, leaves, strict=True) for pair in zip(x.split(3), z.grad.split(3), strict=True)]
    for (piece, gradient), state in zip(chunks, states, strict=True):
        torch.set_rng_state(state)
        (encoder(piece) * gradient).sum().backward()
    expected = _gradients(encoder)
    torch.manual_seed(0)
    ours = ce.GradientCache(ce.fused_infonce_loss, 3)(encoder, *xs, temperature=0.4)
    ours.backward()
    pairs = zip(_gradients(encoder), expected, strict=True)
    assert_same([("value", ours.detach(), value.detach()), *((str(i), *pair) for i, pair in enumerate(pairs))])


def test_the_cached_loss_of_sentence_transformers_gives_the_same():
    losses = pytest.importorskip("sentence_transformers.losses", reason="sentence-transformers is not installed")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = _encoder()

        def forward(self, features):
            return {"sentence_embedding": self.encoder(features["x"])}

    model = Model()
    features = [{"x": x} for x in _inputs(PAIRS, PAIRS)]
    theirs = losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=3)
    value = theirs(features, torch.empty(0))
    value.backward()
    expected = _gradients(model)
    cache = ce.GradientCache(ce.fused_infonce_loss, 3, lambda output: output["sentence_embedding"])
    ours = cache(model, *((x,) for x in features), logit_scale=20.0, layout="one_way")
    ours.backward()
    pairs = zip(_gradients(model), expected, strict=True)
    assert_same([("value", ours.detach(), value.detach()), *((str(i), *pair) for i, pair in enumerate(pairs))])


class Tokens(NamedTuple):
    ids: Tensor
    weights: Tensor


class _Recording(nn.Module):
    """An encoder that keeps what came in and what went out, and takes what tokenizers and collators return."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inner = _encoder(dropout)
        self.seen: list[tuple] = []

    def forward(self, x, nested=None, scale=None, training=True):
        z = self.inner(x) if nested is None else self.inner(x * nested["tokens"].weights) * scale
        self.seen.append((len(x), z.detach().clone(), torch.get_rng_state(), torch.is_autocast_enabled("cpu")))
        return {"hidden": z[:, None], "training": training}


def _first(output: dict) -> Tensor:
    return output["hidden"][:, 0]


@pytest.mark.parametrize("kind", ["dict", "mapping", "tuple", "list"])
def test_inputs_are_what_encoders_take(kind):
    encoder = _Recording()
    xs = []
    for x in _inputs(PAIRS, PAIRS):
        tokens = Tokens(torch.arange(PAIRS), torch.rand(PAIRS, 1, dtype=torch.float64))
        keywords = {"x": x, "nested": {"tokens": tokens}, "scale": torch.tensor(2.0), "training": False}
        parts = {"dict": keywords, "mapping": UserDict(keywords), "list": [*keywords.values()]}
        xs.append(parts | {"tuple": tuple(keywords.values())})
    whole = ce.fused_infonce_loss(*(_first(encoder(**x["dict"])) for x in xs))
    whole.backward()
    expected = _gradients(encoder)
    encoder.seen.clear()
    ours = ce.GradientCache(ce.fused_infonce_loss, 4, _first)(encoder, *(x[kind] for x in xs))
    ours.backward()
    pairs = zip(_gradients(encoder), expected, strict=True)
    assert_same([("value", ours.detach(), whole.detach()), *((str(i), *pair) for i, pair in enumerate(pairs))])
    assert [length for length, *_ in encoder.seen] == [4, 4, 2] * 4


@pytest.mark.parametrize("outside", [False, True])
def test_the_second_pass_has_the_random_state_and_the_autocast_of_the_first(outside):
    encoder = _Recording(dropout=0.5).float()
    xs = [x.float() for x in _inputs(PAIRS, PAIRS)]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        value = ce.GradientCache(ce.fused_infonce_loss, 4, _first)(encoder, *xs)
    half = len(encoder.seen)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
        value.backward()
    assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(encoder.seen[:half], encoder.seen[half:], strict=True):
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[2], second[2])
        assert first[3] == second[3] == outside


def test_autocast_around_call_and_backward_leaves_no_weight_without_gradient():
    encoder = _encoder().float()
    x, labels = torch.randn(2 * PAIRS, INPUTS), torch.arange(2 * PAIRS) % PAIRS
    gradients = []
    for encode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if encode:
                value = ce.fused_supcon_loss(encoder(x), labels)
            else:
                value = ce.GradientCache(ce.fused_supcon_loss, 2 * PAIRS)(encoder, x, labels=labels)
            value.backward()
        gradients.append(_gradients(encoder))
    for plain, ours in zip(*gradients, strict=True):
        assert torch.equal(plain, ours)


def test_an_encoder_that_computes_something_else_the_second_time_is_refused():
    encoder, calls = _encoder(), []

    def drifting(x):
        calls.append(len(x))
        return encoder(x) * len(calls)

    value = ce.GradientCache(ce.fused_infonce_loss, 4)(drifting, *_inputs(PAIRS, PAIRS))
    with pytest.raises(RuntimeError, match="other embeddings in the second pass"):
        value.backward()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda value, p: torch.autograd.grad(value, p), "torch.autograd.grad"),
        (lambda value, p: torch.autograd.grad(value, p, allow_unused=True), "torch.autograd.grad"),
        (lambda value, p: value.backward(inputs=p), "torch.autograd.grad"),
        (lambda value, p: value.backward(create_graph=True), "create_graph=True"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_what_the_second_pass_cannot_give_is_refused_with_the_reason(wrong, reason):
    encoder = _encoder()
    value = ce.GradientCache(ce.fused_infonce_loss, 4)(encoder, *_inputs(PAIRS, PAIRS))
    with pytest.raises(RuntimeError, match=reason):
        wrong(value, list(encoder.parameters()))
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("retain", [False, True])
def test_a_second_backward_is_refused(retain):
    encoder = _encoder()
    value = ce.GradientCache(ce.fused_infonce_loss, 4)(encoder, *_inputs(PAIRS, PAIRS))
    value.backward(retain_graph=retain)
    before = _gradients(encoder)
    with pytest.raises(RuntimeError, match="once per call"):
        value.backward()
    assert before[0] is not None and all(p.grad is None for p in encoder.parameters())


def test_scaled_and_accumulated_gradients_add_up():
    encoder = _encoder()
    cache = ce.GradientCache(ce.fused_infonce_loss, 4)
    batches = [_inputs(PAIRS, PAIRS) for _ in range(2)]
    whole = sum(ce.fused_infonce_loss(*map(encoder, xs)) for xs in batches)
    (2.0**10 * whole / 2).backward()
    expected = _gradients(encoder)
    for xs in batches:
        (2.0**10 * cache(encoder, *xs) / 2).backward()
    assert_same([(str(i), *pair) for i, pair in enumerate(zip(_gradients(encoder), expected, strict=True))])


def test_a_grad_scaler_steps_as_with_any_loss():
    xs = [x.float() for x in _inputs(PAIRS, PAIRS)]
    trained = []
    start = _encoder().float()
    for cached in (False, True):
        encoder = copy.deepcopy(start)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for _ in range(3):
            if cached:
                value = ce.GradientCache(ce.fused_infonce_loss, PAIRS)(encoder, *xs)
            else:
                value = ce.fused_infonce_loss(*map(encoder, xs))
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append(list(encoder.parameters()))
    for plain, ours in zip(*trained, strict=True):
        assert torch.equal(plain, ours)


def test_a_frozen_encoder_runs_once():
    frozen, encoder = _Recording().requires_grad_(False), _Recording()
    cache = ce.GradientCache(ce.fused_infonce_loss, 4, _first)
    cache((encoder, frozen), *_inputs(PAIRS, PAIRS)).backward()
    assert (len(frozen.seen), len(encoder.seen)) == (3, 6)
    assert all(p.grad is not None for p in encoder.parameters())
    assert not cache(frozen, *_inputs(PAIRS, PAIRS)).requires_grad
    with torch.no_grad():
        assert not cache(encoder, *_inputs(PAIRS, PAIRS)).requires_grad


def test_hooks_of_parameters_run_for_every_chunk_and_never_without_a_gradient():
    encoder, seen = _encoder(), []
    weight = encoder[0].weight
    weight.register_hook(lambda gradient: seen.append(gradient.shape))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    ce.GradientCache(ce.fused_infonce_loss, 5)(encoder, *_inputs(PAIRS, PAIRS)).backward()
    assert seen == [weight.shape] * 8


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_flow_into_inputs_and_what_made_them(shared):
    encoder, trunk = _encoder(), nn.Linear(INPUTS, INPUTS).double()
    leaf, other = (x.requires_grad_() for x in _inputs(PAIRS, PAIRS))

    def backward(loss_of: Callable) -> list[Tensor]:
        made = trunk(leaf)
        loss_of(made, made if shared else other).backward()
        gradients = [*_gradients(encoder, trunk), leaf.grad, *(() if shared else (other.grad,))]
        leaf.grad = other.grad = None
        return gradients

    def loss(z1, z2):
        return ce.fused_infonce_loss(z1, 1.5 * z2 + z2.detach().roll(1, 0))

    expected = backward(lambda a, b: loss(encoder(a), encoder(b)))
    ours = backward(lambda a, b: ce.GradientCache(loss, 3)(encoder, a, b))
    assert_same([(str(i), *pair) for i, pair in enumerate(zip(ours, expected, strict=True))])


def test_an_embedding_that_the_loss_does_not_use_has_no_second_pass():
    encoder, unused = _encoder(), _Recording()

    def first_two(z1, z2, z3):
        return ce.fused_infonce_loss(z1, z2)

    ce.GradientCache(first_two, 4, lambda z: z if isinstance(z, Tensor) else _first(z))(
        (encoder, encoder, unused), *_inputs(PAIRS, PAIRS, PAIRS)
    ).backward()
    assert len(unused.seen) == 3 and all(p.grad is None for p in unused.parameters())


def test_it_is_a_module_that_holds_the_loss():
    queue = ce.NegativeQueue(7, FEATURES)
    cache = ce.GradientCache(ce.InfoNCELoss(queue=queue), 4)
    assert any("features" in name or "queue" in name for name in cache.state_dict())
    assert "chunk_size=4" in repr(cache)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ce.GradientCache(None, 4), TypeError, "loss must be callable"),
        (lambda: ce.GradientCache(F.mse_loss, 0), ValueError, "chunk_size must be >= 1; got 0"),
        (lambda: ce.GradientCache(F.mse_loss, 2.0), TypeError, "chunk_size must be an integer"),
        (lambda: ce.GradientCache(F.mse_loss, 4, 3), TypeError, "get_embedding must be callable"),
        (lambda: ce.GradientCache(F.mse_loss, 4)(nn.Identity()), TypeError, "for 0 inputs"),
        (lambda: ce.GradientCache(F.mse_loss, 4)((nn.Identity(),), *_inputs(3, 3)), TypeError, "for 2 inputs"),
        (lambda: ce.GradientCache(F.mse_loss, 4)(*_inputs(3, 3)), TypeError, "expected an encoder"),
        (
            lambda: ce.GradientCache(F.mse_loss, 4)(nn.Identity(), tuple(_inputs(3, 2))),
            ValueError,
            "same number of rows",
        ),
        (lambda: ce.GradientCache(F.mse_loss, 4)(nn.Identity(), {}), ValueError, "input 1 must hold tensors"),
        (lambda: ce.GradientCache(F.mse_loss, 4)(nn.Identity(), *_inputs(0, 0)), ValueError, "at least 1"),
        (lambda: ce.GradientCache(F.mse_loss, 4)(dict, {"z": torch.ones(3)}), ValueError, "get_embedding takes"),
        (lambda: ce.GradientCache(F.mse_loss, 4)(torch.sum, *_inputs(3, 3)), ValueError, r"tensor \[3, ...\]"),
        (lambda: ce.GradientCache(lambda z: 1.0, 4)(_encoder(), *_inputs(3)), TypeError, "the loss must return"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


@needs_proc
def test_memory_grows_with_the_chunk_and_not_with_the_batch():
    # two tanh keep 2 x 4,096 floats of a row, 32 KiB: 128 MiB for two views of 2,048 rows, 4 for a chunk of 128
    setup = """
from torch import nn
encoder = nn.Sequential(nn.Linear(16, 4096), nn.Tanh(), nn.Tanh(), nn.Linear(4096, 16))
x1, x2 = torch.randn(2, 2048, 16)
cache = ce.GradientCache(ce.InfoNCELoss(), n)
"""
    call = "(cache(encoder, x1, x2) if n > 8 else ce.fused_infonce_loss(encoder(x1), encoder(x2))).backward()"
    plain, quarter, half, whole = peak_growths(setup, call, 32, 8, 256, 512, 1024)
    assert whole - half == pytest.approx(2 * (half - quarter), rel=0.35)
    assert whole < 0.7 * plain and quarter < 0.35 * plain
