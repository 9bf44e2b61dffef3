"""A Lightning module whose loss's statistics are logged by a callback; half a minute on two cores.

    pip install contrastive_ext lightning scikit-learn
    python lightning_digits.py --epochs 20

The training step returns the loss and knows nothing of statistics: `LossStatsCallback` asks for them on the steps that
Lightning logs, from the same pass, as "train/criterion/accuracy" and so on. `group=AllRanks()` would make the same
module right under `Trainer(devices=4, strategy="ddp")`.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import contrastive_ext as ce
from contrastive_ext.adapters.lightning import LossStatsCallback


class SimCLR(L.LightningModule):
    """An encoder of digits and hard negatives; the loss is an attribute, so that it moves and is found."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.criterion = ce.HardNegativeLoss(temperature=0.5, tau_plus=0.1, beta=0.5)

    def augment(self, x: Tensor) -> Tensor:
        """One random view of images [n, 64]: shifted by up to a pixel each way, brighter or darker, with noise."""
        down, right = torch.randint(-1, 2, (2,)).tolist()
        moved = x.reshape(-1, 8, 8).roll((down, right), (1, 2)).flatten(1)
        return moved * (0.8 + 0.4 * torch.rand(len(x), 1, device=x.device)) + 0.15 * torch.randn_like(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (x,) = batch
        loss = self.criterion(self.encoder(self.augment(x)), self.encoder(self.augment(x)))
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--logs", type=Path, help="folder for metrics.csv; a temporary one without it")
    options = parser.parse_args(arguments)

    L.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 16
    batches = DataLoader(TensorDataset(images), options.batch, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(options.logs or folder, name="", version="")
        trainer = L.Trainer(
            max_epochs=options.epochs,
            accelerator="auto",
            devices=1,
            logger=logger,
            log_every_n_steps=len(batches),
            callbacks=[LossStatsCallback(prefix="train/")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(SimCLR(), batches)
        with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    for row in rows[:: max(1, len(rows) // 5)]:
        numbers = {name.split("/")[-1]: float(value) for name, value in row.items() if name.startswith("train/")}
        print(
            f"epoch {row['epoch']:>3}  loss {numbers['loss']:.3f}  accuracy {numbers['accuracy']:.2f}  "
            f"hardest negative {numbers['hardest_negative']:.2f}  on the floor {numbers['clamped_fraction']:.0%}"
        )
    return rows


if __name__ == "__main__":
    main()
