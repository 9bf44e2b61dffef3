"""A Lightning callback that logs `LossStats` of every contrastive_ext loss in a module: `from
contrastive_ext.adapters.lightning import LossStatsCallback`, `Trainer(callbacks=[LossStatsCallback()])`.

The training step stays as it is, `return self.criterion(z1, z2)`. On the steps that Lightning logs, the callback
asks the loss for its statistics, from the same pass, and hands the step the loss alone. Reading them waits for the
device on those steps, and warns once about rows on the debiasing floor, which teach their negatives nothing.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from ..losses.stats import Record
from ..modules import _LossModule
from .hosts import missing

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise missing("lightning", "lightning") from error


class LossStatsCallback(Callback):
    """Logs what every loss module says of its last call in a training step, as "<prefix><module's name>/<field>".

    prefix         before the name, for instance "train/"
    every_n_steps  how often; None: the trainer's log_every_n_steps
    A loss that already returns its statistics to the training step goes on doing so. Adapters of other libraries and
    functions (`fused_..._loss`) are not seen, nor SelfLabelingLoss and SoftTargetLoss, which take no return_stats.
    """

    def __init__(self, prefix: str = "", every_n_steps: int | None = None):
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be >= 1 or None; got {every_n_steps}.")
        self.prefix, self.every_n_steps = prefix, every_n_steps
        self._handles: list = []
        self._found: dict[str, Record] = {}
        self._asked: set[nn.Module] = set()  # whose statistics the training step does not expect
        self._wanted = False

    def on_fit_start(self, trainer, pl_module: nn.Module) -> None:
        """Watch the loss modules; TypeError where there are none, as nothing would ever be logged."""
        losses = {
            name: x
            for name, x in pl_module.named_modules()
            if isinstance(x, _LossModule) and "return_stats" in x.keywords
        }
        if not losses:
            raise TypeError(
                f"{type(pl_module).__name__} holds no loss module of contrastive_ext that has statistics: make the "
                "loss an attribute (self.criterion = DebiasedLoss(...)), or drop this callback."
            )
        for name, loss in losses.items():
            self._handles.append(loss.register_forward_pre_hook(self._ask, with_kwargs=True))
            self._handles.append(loss.register_forward_hook(partial(self._take, name), with_kwargs=True))

    def on_fit_end(self, trainer, pl_module: nn.Module) -> None:
        """Leave the loss modules as they were."""
        self._release()

    def on_exception(self, trainer, pl_module: nn.Module, exception: BaseException) -> None:
        """Leave the loss modules as they were."""
        self._release()

    def on_train_batch_start(self, trainer, pl_module: nn.Module, batch, batch_idx: int) -> None:
        """Whether this step is one of those."""
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps
        self._wanted = every > 0 and (trainer.global_step + 1) % every == 0

    def on_train_batch_end(self, trainer, pl_module: nn.Module, outputs, batch, batch_idx: int) -> None:
        """Log what the losses said."""
        for name, stats in self._found.items():
            values = {f"{self.prefix}{name}/{field}": value for field, value in stats.to_dict().items()}
            pl_module.log_dict(values)  # type: ignore[operator]
        self._found.clear()
        self._wanted = False

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ask(self, loss: _LossModule, args: tuple, call: dict):
        asked = call.get("return_stats", loss.options.get("return_stats", False))
        if not self._wanted or asked:
            return None
        self._asked.add(loss)
        return args, call | {"return_stats": True}

    def _take(self, name: str, loss: _LossModule, args: tuple, call: dict, output):
        if not isinstance(output, tuple):
            return None
        if self._wanted:
            self._found[name] = output[1]
        if loss not in self._asked:
            return None
        self._asked.remove(loss)
        return output[0]
