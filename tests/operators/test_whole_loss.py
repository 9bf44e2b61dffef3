"""The short road (one operator each way) against the composed one: the same numbers, and taken where it may be."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.backends import dispatch
from contrastive_ext.batch.request import Request
from contrastive_ext.losses import pair_loss
from rows import INPUTS, LOSSES, random_pairs

LAYOUTS = ("two_view", "one_way", "symmetric")
FUSED = [loss for loss in LOSSES if loss.name not in ("dclw", "debiased_positives")]
ULPS = 64  # two orders of the same few operations on numbers as large as the logits


def _operators(backend):
    return next(b for b in dispatch.BACKENDS if b.name == backend).whole_loss(torch.float32, 1)


@pytest.fixture
def short(run, monkeypatch):
    """(backend, device, list that grows by one with every call that takes the short road)"""
    backend, device = run
    if _operators(backend) is None:
        pytest.skip(f"{backend} has no operators of its own for a whole loss")
    taken, whole_loss = [], pair_loss.whole_loss
    monkeypatch.setattr(pair_loss, "whole_loss", lambda *args: taken.append(1) or whole_loss(*args))
    return backend, device, taken


def _with_gradients(function, z1, z2, temperature, upstream_seed=3, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (z1, z2, temperature)]
    value = function(*leaves, **options)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def _assert_same_as_composed(short, monkeypatch, loss, z1, z2, temperature, **options):
    backend, _, taken = short
    call = options | loss.parameters | {"backend": backend}
    temperature = torch.tensor(temperature, dtype=z1.dtype, device=z1.device)
    ours = _with_gradients(loss.function, z1, z2, temperature, **call)
    assert taken
    with monkeypatch.context() as context:
        context.setattr(pair_loss, "operators_for", lambda *_: None)
        composed = _with_gradients(loss.function, z1, z2, temperature, **call)
    assert len(taken) == 1
    logit = max(1.0, 1 / temperature.item())
    # the temperature's gradient is a difference of logits over the temperature, however small it comes out
    for a, b, term in zip(ours, composed, (1e-3, 1e-3, 1e-3, logit), strict=True):
        largest = logit * max(b.abs().max().item(), term)
        torch.testing.assert_close(a, b, rtol=0, atol=ULPS * torch.finfo(z1.dtype).eps * largest)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", FUSED, ids=lambda x: x.name)
def test_short_road_gives_what_the_composed_one_gives(short, monkeypatch, loss, layout, reduction):
    z1, z2 = random_pairs(9, 21, torch.float64, short[1])
    z2 = torch.cat([z2, z1[:3] + 0.1]) if layout == "one_way" else z2
    _assert_same_as_composed(short, monkeypatch, loss, z1, z2, 0.4, layout=layout, reduction=reduction)


@pytest.mark.parametrize("temperature", [0.02, 0.5])  # with tau_plus = .1 nearly every row is on the floor, and none
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("loss", FUSED, ids=lambda x: x.name)
def test_short_road_on_every_kind_of_input(short, monkeypatch, loss, inputs, temperature):
    z1, z2 = INPUTS[inputs](33, 17, torch.float64, short[1])
    if inputs == "degenerate":  # a zero row has no length to compare gradients at
        z1, z2 = z1 + 1e-3, z2 + 1e-3
    _assert_same_as_composed(short, monkeypatch, loss, z1, z2, temperature)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", FUSED, ids=lambda x: x.name)
def test_short_road_without_normalisation_and_without_negatives(short, monkeypatch, loss, layout):
    z1, z2 = random_pairs(5, 3, torch.float64, short[1])
    _assert_same_as_composed(short, monkeypatch, loss, z1 / 4, z2 / 4, 0.9, layout=layout, normalize=False)
    short[2].clear()
    _assert_same_as_composed(short, monkeypatch, loss, z1[:1], z2[:1], 0.9, layout=layout)


def test_views_may_be_strided_and_need_no_gradient(short):
    backend, device, taken = short
    z1, z2 = random_pairs(8, 12, torch.float64, device)
    expected = ce.fused_debiased_loss(z1, z2, backend="reference")
    strided = torch.stack([z1, z2], 1)
    torch.testing.assert_close(ce.fused_debiased_loss(strided[:, 0], strided[:, 1], backend=backend), expected)
    z1.requires_grad_()
    (ours,) = torch.autograd.grad(ce.fused_debiased_loss(z1, z2, backend=backend), z1)
    (dense,) = torch.autograd.grad(ce.fused_debiased_loss(z1, z2, backend="reference"), z1)
    torch.testing.assert_close(ours, dense)
    assert len(taken) == 2


def test_a_loss_of_another_formula_does_not_inherit_the_fused_one(run):
    backend, device = run

    class Doubled(ce.InfoNCE):
        def from_stats(self, stats):
            return 2 * super().from_stats(stats)

    z1, z2 = random_pairs(6, 4, torch.float64, device)
    doubled = ce.fused_row_loss(Doubled(), z1, z2, backend=backend)
    torch.testing.assert_close(doubled, 2 * ce.fused_infonce_loss(z1, z2, backend=backend))


def test_every_keyword_says_what_the_short_road_knows_of_it():
    """A field of a request has one plain value, or any value goes to the short road."""
    said = {f.name: f.metadata for f in dataclasses.fields(Request)}
    assert all(("plain" in x) != ("neutral" in x) for x in said.values()), said
    assert all(x["plain"] in (None, True, False) for x in said.values() if "plain" in x)  # `is` tells them apart
    keywords = set(inspect.signature(ce.fused_row_loss).parameters) - {"row_loss", "labels"}
    assert keywords == set(said) - {"default_temperature", "ids_name"}


@pytest.mark.parametrize(
    "extra",
    [
        {"queue": ce.Columns(torch.ones(2, 3))}, {"negatives": torch.ones(2, 3)}, {"in_batch_negatives": False},
        {"positives": torch.ones(1, 4, 3)}, {"ids": torch.arange(4)}, {"guide": ce.Guide(*torch.ones(2, 4, 2))},
        {"operand_dtype": torch.bfloat16}, {"return_stats": True}, {"group": ce.AllRanks()},
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_only_plain_requests_take_the_short_road(extra):
    z = torch.ones(4, 3)
    neutral = {"logit_scale": 2.0, "normalize": False, "reduction": "none", "default_temperature": 1.0}
    plain = Request(z1=z, z2=z, layout="one_way", **neutral)
    assert plain.is_plain
    assert not dataclasses.replace(plain, **extra).is_plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_know_their_shapes(short, layout):
    backend, device, _ = short
    operators = _operators(backend)
    if backend == "torch":
        pytest.skip("its operators are plain functions of torch's own, which know theirs.")
    z1, z2 = random_pairs(5, 4, torch.float32, device)
    call = (z1, z2, torch.tensor(2.0, device=device), 0.0, layout, True)
    checks = ("test_schema", "test_faketensor")
    forward = (*call, "debiased", (0.1,), (1.0,), "none")
    torch.library.opcheck(operators.forward, forward, test_utils=checks)
    loss, *state, _ = operators.forward(*forward)
    backward = (*call, (1.0,), "none", *state, torch.rand_like(loss), True)
    torch.library.opcheck(operators.backward, backward, test_utils=checks)


def test_shapes_without_data(short):
    """In FakeTensorMode, as memory estimators use it, the short road is taken and nothing is read."""
    from torch._subclasses import FakeTensorMode

    backend, device, taken = short
    with FakeTensorMode():
        z1, z2 = (torch.empty(6, 4, device=device, requires_grad=True) for _ in range(2))
        loss = ce.fused_infonce_loss(z1, z2, backend=backend)
        grads = torch.autograd.grad(loss, [z1, z2])
    assert taken and loss.shape == () and [g.shape for g in grads] == [(6, 4), (6, 4)]
