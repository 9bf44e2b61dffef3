"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from examples import docstrings, large_batch


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_docstrings_train_every_method_and_draw_a_picture(capsys, tmp_path):
    picture = tmp_path / "docstrings.png"
    sources = Path(importlib.__file__).parent
    arguments = ["--seeds", "1", "--steps", "2", "--batch", "64", "--sources", str(sources), "--picture", str(picture)]
    outcomes = docstrings.main(arguments)
    shown = capsys.readouterr().out
    assert "share their docstring" in shown
    assert picture.stat().st_size > 10_000
    for method in docstrings.METHODS:
        assert method in shown
        (run,) = outcomes[method]
        assert 0.05 < run.retrieval <= 1 and 0 < run.few_shot <= 1
        assert list(run.curve) == list(docstrings.THRESHOLDS)


def test_known_false_negatives_change_the_loss_of_a_batch_that_has_some():
    corpus = docstrings.mine(Path(importlib.__file__).parent)
    twice = (torch.bincount(corpus.ids) > 1).nonzero()[0, 0]
    which = [*(corpus.ids == twice).nonzero()[:2, 0].tolist(), 0, 1, 2]
    encoder = docstrings.TwoTowers(corpus.rarity())
    z = [encoder(side, [texts[i] for i in which]) for side, texts in enumerate((corpus.docstrings, corpus.codes))]
    plain, cancelled = (docstrings.loss_of(m, *z, corpus.ids[which]) for m in docstrings.METHODS[:2])
    assert cancelled < plain


def test_large_batch_computes_the_same_every_way_and_draws_a_picture(capsys, tmp_path):
    picture = tmp_path / "large_batch.png"
    sources = Path(importlib.__file__).parent
    arguments = ["--batches", "64", "--chunk", "16", "--sources", str(sources), "--picture", str(picture)]
    plain, *others = (steps[64] for steps in large_batch.main(arguments).values())
    assert len(others) == 2
    for other in others:  # float32 sums over the batch in another order
        assert other.value == pytest.approx(plain.value, rel=1e-5)
        assert other.gradient == pytest.approx(plain.gradient, rel=1e-4)
        assert not other.mib >= plain.mib  # NaN where it cannot be read
    assert picture.stat().st_size > 5_000
    assert "cached" in capsys.readouterr().out
