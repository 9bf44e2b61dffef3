"""`nn.Module` twins of the loss functions: parameters at construction, the batch at the call; and a learnable scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .batch.arrangement import resolve_scale
from .batch.queue import NegativeQueue
from .checks import check_keywords, check_number, check_tensor
from .losses import false_negative, self_labeling, soft_target, supcon
from .losses import pair_loss as base
from .losses.bayesian import Bayesian
from .losses.debiased import Debiased
from .losses.decoupled import Decoupled, fused_decoupled_loss
from .losses.false_negative import FalseNegativeStats, fused_false_negative_loss
from .losses.hard_negative import HardNegative
from .losses.infonce import InfoNCE
from .losses.overloads import method_returns_stats
from .losses.pair_loss import LossOptions, RowLoss, check_row_loss, fused_row_loss
from .losses.self_labeling import DEFAULT_TEMPERATURE as SELF_LABELING_TEMPERATURE
from .losses.self_labeling import SelfLabelingStats, fused_self_labeling_loss
from .losses.soft_target import DEFAULT_TEMPERATURE as SOFT_TARGET_TEMPERATURE
from .losses.soft_target import SoftTargetStats, fused_soft_target_loss
from .losses.stats import LossStats
from .losses.supcon import SupConStats, fused_supcon_loss
from .problem.ranking import Ranks


def _with_defaults(defaults: dict, call: dict) -> dict:
    """Keywords of a call; one that a call gives replaces the default, also where it is the default's other name.

    None for either of the two is none given: the module's stays.
    """
    scales = ("temperature", "logit_scale")
    call = {name: x for name, x in call.items() if x is not None or name not in scales}
    if any(name in call for name in scales):
        defaults = {name: x for name, x in defaults.items() if name not in scales}
    return {**defaults, **call}


def _check_at_construction(check_values: Callable, arguments: dict) -> None:
    """What a call would refuse whatever its batch; `check_values` names the arguments that it looks at."""
    check_values(**{name: arguments[name] for name in inspect.signature(check_values).parameters})
    temperature, logit_scale = arguments.get("temperature"), arguments.get("logit_scale")
    given = temperature if logit_scale is None else logit_scale
    like = given if isinstance(given, Tensor) else torch.empty((), dtype=torch.float64)  # the batch's dtype may be any
    resolve_scale(temperature, logit_scale, 1.0, like)
    queue = arguments.get("queue")
    if queue is not None and not isinstance(queue, NegativeQueue):
        check_tensor("queue", queue)


class RowLossModule(nn.Module):
    """Any `RowLoss` as a module: `RowLossModule(MyLoss(), temperature=0.1)(z1, z2)`.

    Keywords given here are defaults, keywords given to the call override them (a queue, a learned temperature). For all
    ranks give `group=AllRanks()`: with a process group the module can neither be made before `init_process_group` nor
    be copied or pickled. Values that no batch could make right raise here already.
    """

    of_the_call: tuple[str, ...] = ("positives",)  # keywords beside `LossOptions` that a call may give
    queue: NegativeQueue | Any  # as given; a NegativeQueue becomes a submodule: it moves and is saved with the loss

    def __init__(self, row_loss: RowLoss, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__()
        check_row_loss(row_loss)
        check_keywords(type(self).__name__, options, ("temperature", *LossOptions.__annotations__))
        defaults = {name: p.default for name, p in inspect.signature(fused_row_loss).parameters.items()}
        _check_at_construction(base.check_values, {**defaults, **options, "temperature": temperature})
        self.row_loss = row_loss
        self.temperature = temperature
        self.queue = options.pop("queue", None)
        self.options = options

    @method_returns_stats
    def forward(self, /, z1: Tensor, z2: Tensor, **call) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of the pairs z1, z2 [B, D]; call-time keywords as in the function."""
        check_keywords(type(self).__name__, call, ("temperature", *LossOptions.__annotations__, *self.of_the_call))
        arguments = _with_defaults({**self.options, "temperature": self.temperature, "queue": self.queue}, call)
        return self._loss(z1, z2, **arguments)

    def _loss(self, z1: Tensor, z2: Tensor, **arguments) -> Tensor | tuple[Tensor, LossStats]:
        return fused_row_loss(self.row_loss, z1, z2, **arguments)

    def extra_repr(self) -> str:
        options = dict(self.options)
        if "logit_scale" not in options or self.temperature is not None:
            default = self.row_loss.default_temperature
            options = {"temperature": default if self.temperature is None else self.temperature, **options}
        return ", ".join([f"{self.row_loss}", *(f"{name}={value!r}" for name, value in options.items())])


class InfoNCELoss(RowLossModule):
    """Module of `fused_infonce_loss`: InfoNCE / NT-Xent, CLIP with layout="symmetric"."""

    of_the_call = ()

    def __init__(self, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__(InfoNCE(), temperature, **options)


class DecoupledLoss(RowLossModule):
    """Module of `fused_decoupled_loss`; `positive_weight` is given to the call."""

    of_the_call = ("positive_weight",)

    def __init__(self, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__(Decoupled(), temperature, **options)

    def _loss(self, z1: Tensor, z2: Tensor, **arguments) -> Tensor | tuple[Tensor, LossStats]:
        return fused_decoupled_loss(z1, z2, **arguments)


class DebiasedLoss(RowLossModule):
    """Module of `fused_debiased_loss`: DCL with prior `tau_plus`; `positives` is given to the call."""

    def __init__(self, temperature: float | None = None, tau_plus: float = 0.1, **options: Unpack[LossOptions]):
        super().__init__(Debiased(tau_plus), temperature, **options)


class HardNegativeLoss(RowLossModule):
    """Module of `fused_hard_negative_loss`: HCL with prior `tau_plus` and concentration `beta`."""

    def __init__(
        self,
        temperature: float | None = None,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        *,
        detach_weights: bool = False,
        **options: Unpack[LossOptions],
    ):
        super().__init__(HardNegative(tau_plus, beta, detach_weights), temperature, **options)


class _LossModule(nn.Module):
    """A loss with a signature of its own: keywords given here are defaults, those given to the call override them."""

    queue: NegativeQueue | Any  # as in RowLossModule

    def __init__(self, function: Callable, check_values: Callable, *inputs: str, **options):
        super().__init__()
        signature = inspect.signature(function)
        self.keywords = tuple(name for name in signature.parameters if name not in inputs)
        check_keywords(type(self).__name__, options, self.keywords)
        arguments = signature.bind(**dict.fromkeys(inputs), **options)
        arguments.apply_defaults()
        _check_at_construction(check_values, arguments.arguments)
        if "queue" in options:
            self.queue = options.pop("queue")
        self.options = options

    def _with_defaults(self, call: dict) -> dict:
        check_keywords(type(self).__name__, call, self.keywords)
        queue = {"queue": self.queue} if hasattr(self, "queue") else {}
        return _with_defaults({**self.options, **queue}, call)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FalseNegativeLoss(_LossModule):
    """Module of `fused_false_negative_loss`: `FalseNegativeLoss(mode="eliminate", top_k=8)(views, support=support)`."""

    def __init__(self, temperature: float | None = None, queue: Tensor | NegativeQueue | None = None, **options):
        super().__init__(
            fused_false_negative_loss, false_negative.check_values, "views", temperature=temperature, queue=queue,
            **options,
        )  # fmt: skip

    @method_returns_stats
    def forward(self, /, views: Tensor, **call) -> Tensor | tuple[Tensor, FalseNegativeStats]:
        """Loss of views [V, B, D]; call-time keywords as in the function."""
        return fused_false_negative_loss(views, **self._with_defaults(call))


class SupConLoss(_LossModule):
    """Module of `fused_supcon_loss`: `SupConLoss(positives="in")(features, labels)`."""

    def __init__(self, temperature: float | None = None, positives: Literal["out", "in"] = "out", **options):
        super().__init__(
            fused_supcon_loss, supcon.check_values, "features", "labels", temperature=temperature,
            positives=positives, **options,
        )  # fmt: skip

    @method_returns_stats
    def forward(self, /, features: Tensor, labels: Tensor, **call) -> Tensor | tuple[Tensor, SupConStats]:
        """Loss of features [N, D] or [V, B, D] with labels [N] or [B]; call-time keywords as in the function."""
        return fused_supcon_loss(features, labels, **self._with_defaults(call))


class SelfLabelingLoss(_LossModule):
    """Module of `fused_self_labeling_loss`: SANE; `mu` of `mu_schedule` is given to the call."""

    def __init__(
        self,
        temperature: float = SELF_LABELING_TEMPERATURE,
        *,
        label_temperature: float = 0.8,
        mu: float = 1.0,
        lam: float = 0.5,
        queue: Tensor | NegativeQueue | None = None,
        normalize: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        backend: str = "auto",
    ):
        super().__init__(
            fused_self_labeling_loss, self_labeling.check_values, "q", "k", queue=queue, temperature=temperature,
            label_temperature=label_temperature, mu=mu, lam=lam, normalize=normalize, reduction=reduction,
            backend=backend,
        )  # fmt: skip

    @method_returns_stats
    def forward(
        self,
        /,
        q: Tensor,
        k: Tensor,
        q_mix: Tensor | None = None,
        perm: Tensor | None = None,
        theta: Tensor | float | None = None,
        **call,
    ) -> Tensor | tuple[Tensor, SelfLabelingStats]:
        """Loss of q, k [s, D] and of q_mix [s, D], mixed by `momentum_mixup`; call-time keywords as in the function."""
        return fused_self_labeling_loss(q, k, q_mix=q_mix, perm=perm, theta=theta, **self._with_defaults(call))


class SoftTargetLoss(_LossModule):
    """Module of `fused_soft_target_loss`: a student's distribution over keys against a teacher's."""

    def __init__(
        self,
        temperature: float = SOFT_TARGET_TEMPERATURE,
        *,
        teacher_temperature: float,
        queue: Tensor | NegativeQueue | None = None,
        normalize: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        backend: str = "auto",
    ):
        super().__init__(
            fused_soft_target_loss, soft_target.check_values, "queries", "keys", "teacher", queue=queue,
            temperature=temperature, teacher_temperature=teacher_temperature, normalize=normalize,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    @method_returns_stats
    def forward(
        self, /, queries: Tensor, keys: Tensor | NegativeQueue, teacher: Tensor, **call
    ) -> Tensor | tuple[Tensor, SoftTargetStats]:
        """Loss of queries [N, D] against the teacher's [N, D] over keys [M, D] and the queue."""
        return fused_soft_target_loss(queries, keys, teacher, **self._with_defaults(call))


class BayesianLoss(RowLossModule):
    """Module of `fused_bayesian_loss`: BCL; `alpha` may be given to the call, for a schedule."""

    of_the_call = ("alpha",)

    def __init__(
        self,
        temperature: float | None = None,
        tau_plus: float = 0.1,
        alpha: float = 0.9,
        beta: float = 0.9,
        *,
        ranks: Ranks = "auto",
        bins: int = 256,
        eps: float = 1e-3,
        **options: Unpack[LossOptions],
    ):
        super().__init__(Bayesian(tau_plus, alpha, beta, ranks, bins, eps), temperature, **options)

    def _loss(self, z1: Tensor, z2: Tensor, *, alpha: float | None = None, **arguments):
        assert isinstance(self.row_loss, Bayesian)
        row_loss = self.row_loss if alpha is None else replace(self.row_loss, alpha=alpha)
        return fused_row_loss(row_loss, z1, z2, **arguments)


class LogitScale(nn.Module):
    """A learnable 1/temperature, kept as its logarithm: `loss(z1, z2, logit_scale=scale())`.

    temperature       the initial temperature, at most 2: what is larger looks like a scale
    max_scale         upper bound of 1/temperature (CLIP: 100), held by clamping the parameter itself, so that it can
                      come down again; a clamp in the graph would stop its gradient for good
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0):
        super().__init__()
        check_number("temperature", temperature)
        if temperature > 2:
            raise ValueError(f"{temperature} looks like a scale, give its temperature: LogitScale(1 / {temperature}).")
        if not temperature > 0 or not 1 / temperature <= max_scale:
            raise ValueError(f"need 0 < 1/temperature <= max_scale; got {temperature=} and {max_scale=}.")
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self) -> Tensor:
        """0-d tensor 1/temperature."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}"
