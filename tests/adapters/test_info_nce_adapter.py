"""info-nce-pytorch: the installed package, copies, what is refused."""

from __future__ import annotations

import pytest
import torch

from contrastive_ext.adapters import info_nce as adapter
from parity import assert_compiles, assert_same, assert_survives_copies
from rows import INPUTS, random_pairs

NEGATIVES = {"implicit": None, "unpaired": (9,), "paired": (7, 3)}


def _inputs(mode: str, kind: str = "random"):
    pair = INPUTS[kind](7, 5, torch.float64)
    shape = NEGATIVES[mode]
    return pair if shape is None else (*pair, torch.randn(*shape, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["random", "peaked", "crowded"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", NEGATIVES)
def test_same_as_the_package(mode, reduction, kind):
    host = pytest.importorskip("info_nce")
    options = {
        "temperature": 0.2,
        "reduction": reduction,
        "negative_mode": "paired" if mode == "paired" else "unpaired",
    }
    assert_same(adapter.InfoNCE(**options), host.InfoNCE(**options), *_inputs(mode, kind))
    assert_same(
        lambda *x: adapter.info_nce(*x, **options), lambda *x: host.info_nce(*x, **options), *_inputs(mode, kind)
    )


def test_defaults_are_the_packages():
    host = pytest.importorskip("info_nce")
    assert_same(adapter.InfoNCE(), host.InfoNCE(), *_inputs("unpaired"))


def test_module_is_a_value():
    module = adapter.InfoNCE(0.2, negative_mode="paired")
    assert_survives_copies(module, *_inputs("paired"))
    assert_compiles(module, *_inputs("paired"))
    assert repr(module) == "InfoNCE(temperature=0.2, reduction='mean', negative_mode='paired')"


@pytest.mark.parametrize(
    "arguments, options, error, says",
    [
        ((torch.ones(4, 2), torch.ones(5, 2)), {}, ValueError, r"same shape \[N, D\]; got \[4, 2\] and \[5, 2\]"),
        ((torch.ones(4), torch.ones(4)), {}, ValueError, r"same shape \[N, D\]"),
        (([1.0], torch.ones(4, 2)), {}, TypeError, "query must be a tensor; got list"),
        ((*random_pairs(4, 2), torch.ones(4, 3, 2)), {}, ValueError, r"negative_mode='unpaired' .* \[M, D\]; got"),
        (
            (*random_pairs(4, 2), torch.ones(9, 2)),
            {"negative_mode": "paired"},
            ValueError,
            r"negative_mode='paired' .* \[N, M, D\]; got",
        ),
        ((*random_pairs(4, 2), torch.ones(0, 2)), {}, ValueError, "K, n >= 1"),
        (random_pairs(4, 2), {"negative_mode": "both"}, ValueError, "negative_mode must be one of unpaired, paired"),
        (random_pairs(4, 2), {"temperature": 0.0}, ValueError, "temperature must be > 0"),
        (random_pairs(4, 2), {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
def test_refusals(arguments, options, error, says):
    with pytest.raises(error, match=says):
        adapter.info_nce(*arguments, **options)
    if options:
        with pytest.raises(error, match=says):
            adapter.InfoNCE(**options)(*arguments)
