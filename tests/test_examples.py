"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import pytest
import torch

import contrastive_ext as ce
from bench.digits import FEATURES, load, new_encoder
from examples import moco_digits


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_moco_digits_trains_both_methods_and_prints_a_table(capsys):
    outcomes = moco_digits.main(["--seeds", "1", "--steps", "3", "--batch", "16"])
    shown = capsys.readouterr().out
    for method in moco_digits.METHODS:
        assert method in shown
        assert all(0.1 < accuracy <= 1 for accuracy in outcomes[method][0].accuracy.values())
    plain, sane = (outcomes[method][0].stats for method in moco_digits.METHODS)
    assert plain["mixed_loss"] == 0 and plain["own_weight"] == 1
    assert sane["mixed_loss"] > 0 and 0 < sane["alpha"] < 1
    assert sane["keys"] == 16 + 2 * 16  # its own batch, and two earlier ones in the queue


def test_a_step_moves_the_encoder_and_not_its_average():
    encoder, average = new_encoder(), new_encoder().requires_grad_(False)
    criterion = ce.SelfLabelingLoss(queue=ce.NegativeQueue(7, FEATURES))
    x, _ = load(moco_digits.Device("cpu"))
    loss, _ = moco_digits.training_step(encoder, average, criterion, x[:8], mu=1.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in encoder.parameters())
    assert all(p.grad is None for p in average.parameters())
    assert criterion.queue.count.item() == 7
