"""What is asked, as a table of runs: one line per curve or bar of a picture.

Every run of a question has the same encoder, initial weights, augmentations, batch and number of steps for a seed; they
differ in the loss alone. Where losses are compared with one another (`losses`, `pairs`) each takes its best temperature
of the same three, chosen on other labels than those it is judged on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DIGITS, HEADS, WHOLE = "digits", "docstrings", "whole model"
BATCH, STEPS = 256, 300
TEMPERATURES = {DIGITS: (0.1, 0.2, 0.5), HEADS: (0.02, 0.05, 0.1)}
TAU = 0.1  # of digits: ten balanced classes


@dataclass(frozen=True)
class Run:
    """One training.

    question     whose picture it is in
    label        of its bar or curve
    x            its place on the axis, for curves
    data         DIGITS, HEADS or WHOLE
    loss         a name of `digits.LOSSES` or `docstrings.LOSSES`
    keywords     of the loss
    """

    question: str
    label: str
    loss: str
    temperature: float
    seed: int
    x: float | None = None
    data: str = DIGITS
    batch: int = BATCH
    steps: int = STEPS
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        """Runs that differ in the seed alone share it."""
        return self.question, self.label, self.x, self.temperature


def runs(seeds: int, steps: int = STEPS) -> list[Run]:
    """All of them, the cheapest first."""
    found = []
    for seed in range(seeds):
        for question in (_losses, _batch, _beta, _alpha, _found, _soft, _coverage, _pairs):
            found += question(seed, steps)
    for seed in range(min(seeds, 3)):
        found += _whole(seed, max(1, steps // 6))
    return found


def _losses(seed: int, steps: int) -> list[Run]:
    named: list[tuple[str, str, dict[str, Any]]] = [
        ("InfoNCE", "infonce", {}),
        ("decoupled", "decoupled", {}),
        ("debiased", "debiased", {"tau_plus": TAU}),
        ("hard negatives, beta 0.5", "hard_negative", {"tau_plus": TAU, "beta": 0.5}),
        ("Bayesian", "bayesian", {"tau_plus": TAU}),
        ("FNC, eliminated", "fnc", {"mode": "eliminate", "top_k": 8, "threshold": 0.7}),
        ("FNC, attracted", "fnc", {"mode": "attract", "top_k": 4, "threshold": 0.7}),
        ("SupCon (all labels)", "supcon", {}),
    ]
    return [
        Run("losses", label, loss, t, seed, steps=steps, keywords=keywords)
        for label, loss, keywords in named
        for t in TEMPERATURES[DIGITS]
    ]


def _batch(seed: int, steps: int) -> list[Run]:
    return [
        Run("batch", f"{label}, t {t}", loss, t, seed, x=batch, batch=batch, steps=steps, keywords=keywords)
        for label, loss, keywords in (("InfoNCE", "infonce", {}), ("debiased", "debiased", {"tau_plus": TAU}))
        for t in (0.2, 0.5)
        for batch in (16, 64, 256, 1024)
    ]


def _beta(seed: int, steps: int) -> list[Run]:
    return [
        Run("beta", f"tau_plus {tau}", "hard_negative", 0.5, seed, beta, steps=steps,
            keywords={"tau_plus": tau, "beta": beta})
        for tau in (0.0, TAU)
        for beta in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    ]  # fmt: skip


def _alpha(seed: int, steps: int) -> list[Run]:
    constant = [
        Run("alpha", "constant", "bayesian", 0.5, seed, alpha, steps=steps, keywords={"tau_plus": TAU, "alpha": alpha})
        for alpha in (0.5, 0.7, 0.8, 0.9, 0.99)
    ]
    ways = [
        Run("alpha", way, "bayesian", 0.5, seed, steps=steps, keywords={"tau_plus": TAU, "alpha": way})
        for way in ("schedule", "estimated")
    ]
    return [*constant, *ways, Run("alpha", "InfoNCE", "infonce", 0.5, seed, steps=steps)]


def _found(seed: int, steps: int) -> list[Run]:
    named: list[tuple[str, str, dict[str, Any]]] = [
        ("InfoNCE", "infonce", {}),
        ("ids of a fifth", "ids", {"known": 0.2}),
        ("ids of all", "ids", {"known": 1.0}),
        ("guide: raw pixels", "guide", {"margin": 0.1}),
        ("FNC, eliminated, top 8", "fnc", {"mode": "eliminate", "top_k": 8, "threshold": 0.7}),
        ("FNC, attracted, top 4", "fnc", {"mode": "attract", "top_k": 4, "threshold": 0.7}),
        ("FNC, attracted, > 0.8 alone", "fnc", {"mode": "attract", "top_k": None, "threshold": 0.8}),
    ]
    return [Run("found", label, loss, 0.2, seed, steps=steps, keywords=k) for label, loss, k in named]


def _soft(seed: int, steps: int) -> list[Run]:
    named: tuple[tuple[str, float | str | None], ...] = (
        ("MoCo", None),
        ("MoCo + mixup, one-hot", 0.0),
        ("MoCo + mixup, soft (SANE)", "schedule"),
    )
    return [Run("soft", label, "moco", 0.2, seed, steps=steps, batch=128, keywords={"mu": mu}) for label, mu in named]


def _coverage(seed: int, steps: int) -> list[Run]:
    return [
        Run("coverage", "InfoNCE", "infonce", 0.2, seed, x=batch, batch=batch, steps=steps)
        for batch in (4, 8, 16, 32, 64, 128, 256, 512)
    ]


def _pairs(seed: int, steps: int) -> list[Run]:
    named: list[tuple[str, str, dict[str, Any]]] = [
        ("frozen MiniLM alone", "none", {}),
        ("InfoNCE", "infonce", {}),
        ("equal docstrings cancelled", "ids", {}),
        ("debiased, tau_plus 0.001", "debiased", {"tau_plus": 0.001}),
        ("hard negatives, beta 0.5", "hard_negative", {"tau_plus": 0.0, "beta": 0.5}),
        ("Bayesian", "bayesian", {"tau_plus": 0.001}),
        ("FNC, eliminated", "fnc", {"mode": "eliminate", "top_k": 4, "threshold": 0.9}),
        ("FNC, attracted", "fnc", {"mode": "attract", "top_k": 4, "threshold": 0.9}),
    ]
    return [
        Run("pairs", label, loss, t, seed, data=HEADS, batch=512, steps=steps, keywords=keywords)
        for label, loss, keywords in named
        for t in TEMPERATURES[HEADS]
    ]


def _whole(seed: int, steps: int) -> list[Run]:
    return [
        Run("whole", label, loss, 0.05, seed, data=WHOLE, batch=64, steps=steps)
        for label, loss in (("InfoNCE", "infonce"), ("equal docstrings cancelled", "ids"))
    ]
