"""The Lightning callback: what it logs, what it leaves alone, and one sentence without Lightning."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
from torch import nn

import contrastive_ext as ce

NAMES = ("lightning", "pytorch_lightning")
INSTALLED = next((name for name in NAMES if importlib.util.find_spec(name)), None)


def test_without_lightning_one_sentence_says_so(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "contrastive_ext.adapters.lightning", raising=False)
    with pytest.raises(ImportError, match=r"lightning, which is not installed: pip install lightning"):
        importlib.import_module("contrastive_ext.adapters.lightning")


if INSTALLED:
    pl = importlib.import_module("lightning.pytorch" if INSTALLED == "lightning" else INSTALLED)
    Base = pl.LightningModule
else:
    Base = nn.Module
needs_lightning = pytest.mark.skipif(INSTALLED is None, reason="lightning is not installed (make test-hosts)")


class Model(Base):
    """Two losses, one of which the training step asks itself."""

    def __init__(self, criterion: nn.Module | None = None):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.criterion = criterion or ce.DebiasedLoss(temperature=0.5)
        self.other = ce.InfoNCELoss(temperature=0.5)
        self.kinds: list[tuple[type, type]] = []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        z1, z2 = self.encoder(x), self.encoder(x + 0.1)
        loss, mine = self.criterion(z1, z2), self.other(z1, z2, return_stats=batch_idx % 2 == 0)
        self.kinds.append((type(loss), type(mine)))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def _fit(model: nn.Module, callback, batches: int = 6):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8 * batches, 6)), batch_size=8)
    logged: list[dict] = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append(dict(metrics))

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=Logger(), callbacks=[callback], log_every_n_steps=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return logged


@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_it_logs_every_loss_and_the_training_step_sees_no_difference():
    from contrastive_ext.adapters.lightning import LossStatsCallback

    model = Model()
    logged = _fit(model, LossStatsCallback(prefix="train/"))
    assert [loss for loss, _ in model.kinds] == [torch.Tensor] * 6
    assert [mine for _, mine in model.kinds] == [tuple, torch.Tensor] * 3  # as it asked
    fields = {f"train/criterion/{name}" for name in ce.LossStats.__annotations__ if name != "normalized"}
    rows = [x for x in logged if fields <= set(x)]
    assert len(rows) == 3 and all("train/other/accuracy" in x for x in rows)
    assert not model.criterion._forward_hooks and not model.criterion._forward_pre_hooks


@needs_lightning
def test_it_warns_about_rows_on_the_floor():
    from contrastive_ext.adapters.lightning import LossStatsCallback

    with pytest.warns(UserWarning, match=r"of the anchors are on the floor"):
        _fit(Model(ce.DebiasedLoss(temperature=0.05, tau_plus=0.3)), LossStatsCallback())


@needs_lightning
def test_refusals():
    from contrastive_ext.adapters.lightning import LossStatsCallback

    with pytest.raises(ValueError, match="every_n_steps must be >= 1 or None; got 0"):
        LossStatsCallback(every_n_steps=0)
    model = Model()
    model.criterion, model.other = nn.CosineSimilarity(), nn.CosineSimilarity()
    with pytest.raises(TypeError, match=r"Model holds no loss module of contrastive_ext .* make the loss an attribute"):
        LossStatsCallback().on_fit_start(None, model)
