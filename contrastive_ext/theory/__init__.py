"""Whether a batch has enough negatives, and what a contrastive loss says about the supervised loss.

    from contrastive_ext.theory import coverage_probability, false_negative_rate, num_negatives_for
    coverage_probability(256, num_classes=100)      # 1e-4: a batch of 256 images rarely shows all 100 classes
    num_negatives_for(0.99, num_classes=100)        # negatives from which on it does
    false_negative_rate(class_counts)               # the natural tau_plus of the debiased losses

`SupervisedBound` measures the bounds on an encoder; `python -m contrastive_ext negatives` prints the table.
"""

from .coupon import (
    collision_probability,
    coverage_probability,
    expected_draws,
    expected_log_collisions,
    false_negative_rate,
    num_negatives_for,
)
from .supervised_bound import BoundTerms, SupervisedBound

__all__ = [
    "BoundTerms",
    "SupervisedBound",
    "collision_probability",
    "coverage_probability",
    "expected_draws",
    "expected_log_collisions",
    "false_negative_rate",
    "num_negatives_for",
]
