"""What the contrastive loss of an encoder says about its supervised loss, measured batch by batch.

The supervised loss is that of the mean classifier, the cross-entropy of <z, mu_c>/t over the class means mu_c. Nozawa &
Sato (NeurIPS 2021, arXiv:2102.06866) bound it through the probability that a batch covers every class, Arora et al.
(ICML 2019, arXiv:1902.09229) through the probability 1 - tau_K that no negative shares the anchor's class, which
vanishes for large batches and takes the bound with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.infonce import fused_infonce_loss


@dataclass(frozen=True)
class BoundTerms:
    """Means over all anchors, in nats; the terms of a bound are weighted by their probability already.

    Anchor z_i of class y is the first view of one of B = K + 1 images, n_y of them of its class; the batch is complete
    if it shows all C classes. l_i(S) = ln sum_{c in S} e^{<z_i, mu_c - mu_y>/t} over the class means of the classes S.

    contrastive_loss   InfoNCE against the second views, B - 1 negatives             L_Info
    two_view_loss      SimCLR's loss with 2 B - 2 negatives, for reference
    supervised_loss    l_i(all classes), whatever the batch shows                    L_sup
    accuracy           [mu_y has the largest inner product with z_i]
    coverage           [complete]                                                    ups
    collision          [n_y > 1]                                                     tau_K
    supervised_term    [complete] l_i(all classes)                                   ups L_sup
    partial_term       [not complete] l_i(classes of the batch)                      (1 - ups) L_sub
    collision_term     ln n_y                                                        E ln(Col + 1)
    gap                min(0, <z_i, mu_y - m_i>)/t, m_i the augmentation mean        d(f), <= 0
    unique_coverage    [complete] [n_y = 1]
    unique_supervised  [complete] [n_y = 1] l_i(all classes)
    unique_partial     [not complete] [n_y = 1] l_i(classes of the batch)            both: (1 - tau_K) L_sub
    """

    contrastive_loss: float
    two_view_loss: float
    supervised_loss: float
    accuracy: float
    coverage: float
    collision: float
    supervised_term: float
    partial_term: float
    collision_term: float
    gap: float
    unique_coverage: float
    unique_supervised: float
    unique_partial: float

    @property
    def lower_bound(self) -> float:
        """Of contrastive_loss, Nozawa & Sato: 1/2 [ups L_sup + (1 - ups) L_sub + E ln(Col + 1)] + d(f)."""
        return 0.5 * (self.supervised_term + self.partial_term + self.collision_term) + self.gap

    @property
    def arora_lower_bound(self) -> float:
        """Of contrastive_loss, Arora et al.: (1 - tau_K) L_sub + E ln(Col + 1) + d(f)."""
        return self.unique_supervised + self.unique_partial + self.collision_term + self.gap

    @property
    def upper_bound(self) -> float:
        """Of the supervised loss, Nozawa & Sato: [2 (L_Info - d(f)) - (1 - ups) L_sub - E ln(Col + 1)]/ups.

        `lower_bound` <= L_Info, solved for L_sup; inf if no batch was complete. (The notebook released with the paper
        subtracts half of (1 - ups) L_sub.)
        """
        rest = 2 * (self.contrastive_loss - self.gap) - self.partial_term - self.collision_term
        return rest / self.coverage if self.coverage else math.inf

    @property
    def arora_upper_bound(self) -> float:
        """Of the supervised loss, Arora et al.: [L_Info - d(f) - unique_partial - E ln(Col + 1)]/unique_coverage.

        `arora_lower_bound` <= L_Info, solved for the supervised loss of the anchors it contains, those without a
        collision in a complete batch; inf if there were none. (The notebook released with the paper divides by
        1 - tau_K, which bounds less than the supervised loss where batches are incomplete.)
        """
        rest = self.contrastive_loss - self.gap - self.unique_partial - self.collision_term
        return rest / self.unique_coverage if self.unique_coverage else math.inf


class SupervisedBound:
    """Both lower bounds of the contrastive loss and both upper bounds of the supervised loss, batch by batch.

        bound = SupervisedBound(num_classes=10, temperature=0.5)
        for z1, z2, labels, means in batches:
            bound.update(z1, z2, labels, class_means=class_means, augmentation_means=means)
        bound.compute().upper_bound

    num_classes   C >= 1
    temperature   t > 0 of the contrastive loss and of the mean classifier
    Memory        O(B (D + C)) for a batch, 13 numbers between batches; float64
    Paper         Nozawa & Sato, NeurIPS 2021, arXiv:2102.06866
    """

    def __init__(self, num_classes: int, temperature: float):
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1; got {num_classes!r}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature}.")
        self.num_classes, self.temperature = num_classes, float(temperature)
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self._sums: dict[str, Tensor] = {}
        self._anchors = 0

    @torch.no_grad()
    def update(
        self, z1: Tensor, z2: Tensor, labels: Tensor, *, class_means: Tensor, augmentation_means: Tensor
    ) -> None:
        """Add a batch of B images drawn independently; its size sets K + 1 = B.

        z1, z2              [B, D] two views, scaled to unit length here
        labels              [B] integers in [0, num_classes)
        class_means         [C, D] mean over a class's images and augmentations of unit vectors, used as given: not unit
                            vectors themselves
        augmentation_means  [B, D] mean over augmentations of the unit vectors of each image, used as given
        Raises              ValueError, TypeError on shapes, dtypes and labels out of range
        """
        self._check(z1, z2, labels, class_means, augmentation_means)
        z1, z2, mu, means = (z.detach().double() for z in (z1, z2, class_means, augmentation_means))
        t = self.temperature
        contrastive = fused_infonce_loss(z1, z2, t, layout="one_way", reduction="none")
        two_view = fused_infonce_loss(z1, z2, t, reduction="none")
        assert isinstance(contrastive, Tensor) and isinstance(two_view, Tensor)
        z = F.normalize(z1, dim=1)
        logits = z @ mu.T / t
        same_class = torch.zeros(self.num_classes, dtype=torch.float64, device=z.device)
        same_class.index_add_(0, labels, torch.ones_like(z[:, 0]))
        absent = same_class == 0
        partial = F.cross_entropy(logits.masked_fill(absent, -torch.inf), labels, reduction="none")
        complete = (~absent).all().double()
        same = same_class[labels]
        unique = (same == 1).double()
        gap = (z * (mu[labels] - means)).sum(1).clamp(max=0) / t
        sums = {
            "contrastive_loss": contrastive.sum(),
            "two_view_loss": two_view.sum() / 2,
            "supervised_loss": F.cross_entropy(logits, labels, reduction="sum"),
            "accuracy": (logits.argmax(1) == labels).double().sum(),
            "coverage": complete * len(labels),
            "collision": (1 - unique).sum(),
            "supervised_term": complete * partial.sum(),
            "partial_term": (1 - complete) * partial.sum(),
            "collision_term": same.log().sum(),
            "gap": gap.sum(),
            "unique_coverage": complete * unique.sum(),
            "unique_supervised": complete * (unique * partial).sum(),
            "unique_partial": (1 - complete) * (unique * partial).sum(),
        }
        self._sums = {name: self._sums[name] + value if self._sums else value for name, value in sums.items()}
        self._anchors += len(labels)

    def compute(self) -> BoundTerms:
        """The averages so far; RuntimeError before the first batch."""
        if not self._sums:
            raise RuntimeError("no batch was seen; call update first.")
        return BoundTerms(**{name: float(value) / self._anchors for name, value in self._sums.items()})

    def _check(self, z1: Tensor, z2: Tensor, labels: Tensor, class_means: Tensor, augmentation_means: Tensor) -> None:
        if z1.dim() != 2 or len(z1) == 0 or z2.shape != z1.shape or augmentation_means.shape != z1.shape:
            raise ValueError(
                "z1, z2 and augmentation_means must have the same shape [B, D], B >= 1; got "
                f"{list(z1.shape)}, {list(z2.shape)} and {list(augmentation_means.shape)}."
            )
        if class_means.shape != (self.num_classes, z1.shape[1]):
            raise ValueError(f"class_means must be [{self.num_classes}, {z1.shape[1]}]; got {list(class_means.shape)}.")
        if labels.shape != z1.shape[:1] or labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64 [{len(z1)}]; got {labels.dtype} {list(labels.shape)}.")
        if bool((labels < 0).any()) or bool((labels >= self.num_classes).any()):
            raise ValueError(
                f"labels must be in [0, {self.num_classes}); got {int(labels.min())} to {int(labels.max())}."
            )
