"""Fused contrastive losses whose negatives are reweighted: exact, in O(N D) memory, on CPU and GPU.

    from contrastive_ext import fused_debiased_loss
    loss = fused_debiased_loss(z1, z2, temperature=0.5, tau_plus=0.1)     # z1, z2: [B, D]

Losses are functions (`fused_<name>_loss`) and modules (`<Name>Loss`); `fused_row_loss` runs a formula of your own.
`available_backends`, `explain` and `python -m contrastive_ext doctor` say what computes them and why; `theory` how many
negatives are enough.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from ._version import __version__
from .backends.dispatch import available_backends
from .batch.cancellation import Guide
from .batch.columns import Columns
from .batch.distributed import AllRanks
from .batch.queue import NegativeQueue
from .diagnostics.explain import Explanation, explain
from .diagnostics.memory import MemoryEstimate, estimate_memory
from .diagnostics.tuning import Trial, autotune
from .evaluation.geometry import alignment, uniformity
from .evaluation.mining import top_columns
from .evaluation.retrieval import mean_reciprocal_rank, ranks_of_positives, recall_at_k
from .losses.bayesian import Bayesian, fused_bayesian_loss
from .losses.debiased import Debiased, fused_debiased_loss
from .losses.decoupled import Decoupled, fused_decoupled_loss
from .losses.false_negative import FalseNegativeStats, fused_false_negative_loss
from .losses.hard_negative import HardNegative, fused_hard_negative_loss
from .losses.infonce import InfoNCE, fused_infonce_loss
from .losses.labelled_infonce import LabelledStats, fused_labelled_infonce_loss
from .losses.matryoshka import Matryoshka
from .losses.pair_loss import fused_row_loss
from .losses.row_loss import RowLoss, RowStatistics
from .losses.self_labeling import SelfLabelingStats, fused_self_labeling_loss
from .losses.sigmoid import SigmoidStats, fused_sigmoid_loss
from .losses.soft_target import SoftTargetStats, fused_soft_target_loss
from .losses.stats import LossStats
from .losses.supcon import SupConStats, fused_supcon_loss
from .modules import (
    BayesianLoss,
    DebiasedLoss,
    DecoupledLoss,
    FalseNegativeLoss,
    HardNegativeLoss,
    InfoNCELoss,
    LabelledInfoNCELoss,
    RowLossModule,
    SelfLabelingLoss,
    SigmoidLoss,
    SoftTargetLoss,
    SupConLoss,
)
from .operators.row_stats import row_stats
from .operators.top_columns import TopColumns
from .problem.pairs import Gate
from .training.alpha import estimate_alpha, linear_alpha
from .training.gradient_cache import GradientCache
from .training.logit_scale import LogitScale
from .training.momentum import momentum_mixup, momentum_update, mu_schedule

if TYPE_CHECKING:
    from . import theory

__all__ = [
    "AllRanks",
    "Bayesian",
    "BayesianLoss",
    "Columns",
    "Debiased",
    "DebiasedLoss",
    "Decoupled",
    "DecoupledLoss",
    "Explanation",
    "FalseNegativeLoss",
    "FalseNegativeStats",
    "Gate",
    "GradientCache",
    "Guide",
    "HardNegative",
    "HardNegativeLoss",
    "InfoNCE",
    "InfoNCELoss",
    "LabelledInfoNCELoss",
    "LabelledStats",
    "LogitScale",
    "LossStats",
    "Matryoshka",
    "MemoryEstimate",
    "NegativeQueue",
    "RowLoss",
    "RowLossModule",
    "RowStatistics",
    "SelfLabelingLoss",
    "SelfLabelingStats",
    "SigmoidLoss",
    "SigmoidStats",
    "SoftTargetLoss",
    "SoftTargetStats",
    "SupConLoss",
    "SupConStats",
    "TopColumns",
    "Trial",
    "__version__",
    "alignment",
    "autotune",
    "available_backends",
    "estimate_alpha",
    "estimate_memory",
    "explain",
    "fused_bayesian_loss",
    "fused_debiased_loss",
    "fused_decoupled_loss",
    "fused_false_negative_loss",
    "fused_hard_negative_loss",
    "fused_infonce_loss",
    "fused_labelled_infonce_loss",
    "fused_row_loss",
    "fused_self_labeling_loss",
    "fused_sigmoid_loss",
    "fused_soft_target_loss",
    "fused_supcon_loss",
    "linear_alpha",
    "mean_reciprocal_rank",
    "momentum_mixup",
    "momentum_update",
    "mu_schedule",
    "ranks_of_positives",
    "recall_at_k",
    "row_stats",
    "theory",
    "top_columns",
    "uniformity",
]


class _CallableModule(ModuleType):
    """What `import contrastive_ext.fused_debiased_loss` finds: a module that is the function of its name."""

    def __call__(self, *args, **kwargs):
        return globals()[self.__name__.rpartition(".")[2]](*args, **kwargs)


for _name in __all__:
    if _name.startswith("fused_"):
        sys.modules[f"{__name__}.{_name}"] = _CallableModule(f"{__name__}.{_name}", globals()[_name].__doc__)
del _name


if not TYPE_CHECKING:  # a type checker that sees `__getattr__` takes every misspelt name for an attribute

    def __getattr__(name: str):
        """`theory` is for a study before the training, which need not wait for it."""
        if name == "theory":
            return importlib.import_module(".theory", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
