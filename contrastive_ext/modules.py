"""`nn.Module` twins of the loss functions: parameters at construction, the batch at the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from .batch.call import check_call
from .batch.columns import Columns
from .batch.distributed import AllRanks
from .batch.queue import NegativeQueue
from .batch.request import check_request
from .checks import check_keywords
from .losses import false_negative, self_labeling, sigmoid, soft_target, supcon
from .losses.bayesian import Bayesian
from .losses.debiased import Debiased
from .losses.decoupled import Decoupled
from .losses.false_negative import FalseNegativeStats, fused_false_negative_loss
from .losses.hard_negative import HardNegative
from .losses.infonce import InfoNCE
from .losses.labelled_infonce import LabelledStats, fused_labelled_infonce_loss
from .losses.overloads import method_returns_stats
from .losses.pair_loss import LossOptions, fused_row_loss
from .losses.row_loss import RowLoss, check_row_loss
from .losses.self_labeling import SelfLabelingStats, fused_self_labeling_loss
from .losses.sigmoid import SigmoidStats, fused_sigmoid_loss
from .losses.soft_target import SoftTargetStats, fused_soft_target_loss
from .losses.stats import LossStats
from .losses.supcon import SupConStats, fused_supcon_loss
from .problem.ranking import Ranks


class _LossModule(nn.Module):
    """A loss with defaults: keywords given here, which keywords given to the call override.

    function      the loss, of which `inputs` are given to the call alone
    check_values  checks the arguments it names, as far as no batch could make them right; they raise here already
    """

    queue: NegativeQueue | Any  # as given; a NegativeQueue becomes a submodule: it moves and is saved with the loss

    def __init__(self, function: Callable, check_values: Callable, inputs: Collection[str], options: dict):
        super().__init__()
        signature = inspect.signature(function)
        known = tuple(name for name in signature.parameters if name not in inputs)
        check_keywords(type(self).__name__, options, known)
        arguments = signature.bind(**dict.fromkeys(inputs), **options)
        arguments.apply_defaults()
        check_call(arguments.arguments)
        Columns.of(arguments.arguments["queue"] if "queue" in known else None)
        check_values(**{name: arguments.arguments[name] for name in inspect.signature(check_values).parameters})
        self.keywords: tuple[str, ...] = known
        self.options = {name: x for name, x in options.items() if name != "queue"}
        self.queue = options.get("queue")
        if isinstance(self.queue, Columns) and isinstance(self.queue.features, NegativeQueue):
            self.queue_features = self.queue.features

    def _arguments(self, call: dict) -> dict:
        """Keywords of a call; one that it gives replaces the default, also where it is the default's other name.

        None for a temperature or a logit_scale is none given: the module's stays.
        """
        check_keywords(type(self).__name__, call, self.keywords)
        scales = ("temperature", "logit_scale")
        call = {name: x for name, x in call.items() if x is not None or name not in scales}
        defaults = self.options | ({"queue": self.queue} if "queue" in self.keywords else {})
        if any(name in call for name in scales):
            defaults = {name: x for name, x in defaults.items() if name not in scales}
        return defaults | call

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class RowLossModule(_LossModule):
    """Any `RowLoss` as a module: `RowLossModule(MyLoss(), temperature=0.1)(z1, z2)`.

    Keywords given here are defaults, keywords given to the call override them (a queue, a learned temperature). For all
    ranks give `group=AllRanks()`: with a process group the module can neither be made before `init_process_group` nor
    be copied or pickled. Values that no batch could make right raise here already.
    """

    # keywords beside `LossOptions` that a call may give: inputs, and parameters of the loss
    of_the_call: tuple[str, ...] = ("positives",)
    parameters_of_the_call: tuple[str, ...] = ()

    def __init__(self, row_loss: RowLoss, temperature: float | None = None, **options: Unpack[LossOptions]):
        check_row_loss(row_loss)
        inputs = ("row_loss", "z1", "z2", "positives")
        super().__init__(fused_row_loss, check_request, inputs, {"temperature": temperature, **options})
        own = self.of_the_call + self.parameters_of_the_call
        self.keywords = ("temperature", *LossOptions.__annotations__, *own)
        self.row_loss = row_loss

    @method_returns_stats
    def forward(self, /, z1: Tensor, z2: Tensor, **call) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of the pairs z1, z2 [B, D]; call-time keywords as in the function."""
        arguments, row_loss = self._arguments(call), self.row_loss
        given = {name: arguments.pop(name) for name in self.parameters_of_the_call if name in arguments}
        parameters = {name: x for name, x in given.items() if x is not None}
        if parameters:
            row_loss = replace(row_loss, **parameters)  # type: ignore[type-var]
        return fused_row_loss(row_loss, z1, z2, **arguments)

    def extra_repr(self) -> str:
        options = dict(self.options)
        if options["temperature"] is None:
            del options["temperature"]
            if "logit_scale" not in options:
                options = {"temperature": self.row_loss.default_temperature, **options}
        return ", ".join([f"{self.row_loss}", *(f"{name}={value!r}" for name, value in options.items())])


class InfoNCELoss(RowLossModule):
    """Module of `fused_infonce_loss`: InfoNCE / NT-Xent, CLIP with layout="symmetric"."""

    of_the_call = ()

    def __init__(
        self,
        temperature: float | None = None,
        *,
        hardness: float = 0.0,
        hardness_on: Literal["in_batch", "own", "all"] = "in_batch",
        **options: Unpack[LossOptions],
    ):
        super().__init__(InfoNCE(hardness, hardness_on), temperature, **options)


class DecoupledLoss(RowLossModule):
    """Module of `fused_decoupled_loss`; `positive_weight` is given to the call."""

    of_the_call = ()
    parameters_of_the_call = ("positive_weight",)

    def __init__(self, temperature: float | None = None, **options: Unpack[LossOptions]):
        super().__init__(Decoupled(), temperature, **options)


class DebiasedLoss(RowLossModule):
    """Module of `fused_debiased_loss`: DCL with prior `tau_plus`; `positives`, a prior for each pair at the call."""

    parameters_of_the_call = ("tau_plus",)

    def __init__(self, temperature: float | None = None, tau_plus: float = 0.1, **options: Unpack[LossOptions]):
        super().__init__(Debiased(tau_plus), temperature, **options)


class HardNegativeLoss(RowLossModule):
    """Module of `fused_hard_negative_loss`: HCL with prior `tau_plus` and concentration `beta`."""

    parameters_of_the_call = ("tau_plus",)

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


class FalseNegativeLoss(_LossModule):
    """Module of `fused_false_negative_loss`: `FalseNegativeLoss(mode="eliminate", top_k=8)(views, support=support)`."""

    def __init__(
        self, temperature: float | None = None, queue: Tensor | NegativeQueue | Columns | None = None, **options
    ):
        options |= {"temperature": temperature, "queue": queue}
        super().__init__(fused_false_negative_loss, false_negative.check_values, ("views",), options)

    @method_returns_stats
    def forward(self, /, views: Tensor, **call) -> Tensor | tuple[Tensor, FalseNegativeStats]:
        """Loss of views [V, B, D]; call-time keywords as in the function."""
        return fused_false_negative_loss(views, **self._arguments(call))


class SupConLoss(_LossModule):
    """Module of `fused_supcon_loss`: `SupConLoss(positives="in")(features, labels)`."""

    def __init__(self, temperature: float | None = None, positives: Literal["out", "in"] = "out", **options):
        options |= {"temperature": temperature, "positives": positives}
        super().__init__(fused_supcon_loss, supcon.check_values, ("features", "labels"), options)

    @method_returns_stats
    def forward(self, /, features: Tensor, labels: Tensor, **call) -> Tensor | tuple[Tensor, SupConStats]:
        """Loss of features [N, D] or [V, B, D] with labels [N] or [B]; call-time keywords as in the function."""
        return fused_supcon_loss(features, labels, **self._arguments(call))


class LabelledInfoNCELoss(_LossModule):
    """Module of `fused_labelled_infonce_loss`: `LabelledInfoNCELoss(0.1)(features, labels)`."""

    def __init__(self, temperature: float | None = None, **options):
        options |= {"temperature": temperature}
        super().__init__(fused_labelled_infonce_loss, lambda: None, ("features", "labels"), options)

    @method_returns_stats
    def forward(self, /, features: Tensor, labels: Tensor, **call) -> Tensor | tuple[Tensor, LabelledStats]:
        """Loss of features [N, D] or [V, B, D] with labels [N] or [B]; call-time keywords as in the function."""
        return fused_labelled_infonce_loss(features, labels, **self._arguments(call))


class SigmoidLoss(_LossModule):
    """Module of `fused_sigmoid_loss`: SigLIP; a learned scale and bias are given to the call."""

    def __init__(
        self,
        logit_scale: float = sigmoid.DEFAULT_SCALE,
        logit_bias: float = sigmoid.DEFAULT_BIAS,
        **options,
    ):
        options |= {"logit_scale": logit_scale, "logit_bias": logit_bias}
        super().__init__(fused_sigmoid_loss, sigmoid.check_values, ("z1", "z2"), options)

    @method_returns_stats
    def forward(self, /, z1: Tensor, z2: Tensor, **call) -> Tensor | tuple[Tensor, SigmoidStats]:
        """Loss of the pairs z1 [B, D], z2 [M, D]; call-time keywords as in the function."""
        return fused_sigmoid_loss(z1, z2, **self._arguments(call))


class SelfLabelingLoss(_LossModule):
    """Module of `fused_self_labeling_loss`: SANE; `mu` of `mu_schedule` is given to the call."""

    def __init__(
        self,
        temperature: float = self_labeling.DEFAULT_TEMPERATURE,
        *,
        label_temperature: float = 0.8,
        mu: float = 1.0,
        lam: float = 0.5,
        queue: Tensor | NegativeQueue | Columns | None = None,
        normalize: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        backend: str = "auto",
        group: dist.ProcessGroup | AllRanks | None = None,
    ):
        options = {
            "temperature": temperature, "label_temperature": label_temperature, "mu": mu, "lam": lam,
            "normalize": normalize, "reduction": reduction, "backend": backend, "queue": queue, "group": group,
        }  # fmt: skip
        inputs = ("q", "k", "q_mix", "perm", "theta")
        super().__init__(fused_self_labeling_loss, self_labeling.check_values, inputs, options)

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
        return fused_self_labeling_loss(q, k, q_mix=q_mix, perm=perm, theta=theta, **self._arguments(call))


class SoftTargetLoss(_LossModule):
    """Module of `fused_soft_target_loss`: a student's distribution over keys against a teacher's."""

    def __init__(
        self,
        temperature: float = soft_target.DEFAULT_TEMPERATURE,
        *,
        teacher_temperature: float,
        queue: Tensor | NegativeQueue | Columns | None = None,
        normalize: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        backend: str = "auto",
        group: dist.ProcessGroup | AllRanks | None = None,
    ):
        options = {
            "temperature": temperature, "teacher_temperature": teacher_temperature, "normalize": normalize,
            "reduction": reduction, "backend": backend, "queue": queue, "group": group,
        }  # fmt: skip
        super().__init__(fused_soft_target_loss, soft_target.check_values, ("queries", "keys", "teacher"), options)

    @method_returns_stats
    def forward(
        self, /, queries: Tensor, keys: Tensor | NegativeQueue, teacher: Tensor, **call
    ) -> Tensor | tuple[Tensor, SoftTargetStats]:
        """Loss of queries [N, D] against the teacher's [N, D] over keys [M, D] and the queue."""
        return fused_soft_target_loss(queries, keys, teacher, **self._arguments(call))


class BayesianLoss(RowLossModule):
    """Module of `fused_bayesian_loss`: BCL; at the call `alpha`, for a schedule, and a prior for each pair."""

    of_the_call = ()
    parameters_of_the_call = ("alpha", "tau_plus")

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
