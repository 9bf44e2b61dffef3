"""Random calls of every loss against the truth: `make fuzz SECONDS=600`, or one of them again: `make fuzz SEED=123`.

A seed is a case and its numbers: everything a call can say at random, on every backend that runs here. Failures are
printed with their seed; the exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings

import torch
import torch.distributed as dist

import contrastive_ext as ce
from cases import PAIRS, RANKED, Family
from cases_of_sets import BINARY, KEYS, LABELS, POSITIVES, TARGETS, VIEWS
from contrastive_ext.numerics import SPLIT_PRODUCTS
from covering import Case, random_case
from truth_check import Call, Result, compare, ours, truths

FAMILIES = (PAIRS, RANKED, VIEWS, LABELS, POSITIVES, BINARY, KEYS, TARGETS)
SPLIT_BY = {"fp16x3": "triton", "bf16x3": "cpu"}  # the backend that has these products
DRAWS = 40  # until no decision of a case is within rounding


class Unclear(Exception):
    """Every draw left a decision to rounding."""


def drawn(family: Family, case: Case, seed: int) -> tuple[Call, Result, Result, torch.Tensor]:
    """A call of the case whose decisions (cancelled, detected, ranked, on the floor) are clear, and its truth."""
    for attempt in range(DRAWS):
        call = family.call(case, seed + 1_000_003 * attempt)
        truth, dense, upstream = truths(call, seed)
        if truth.how.clearance >= 1:
            return call, truth, dense, upstream
    raise Unclear(case)


def backends(case: Case) -> list[str]:
    """All that run here and take the case; Triton's interpreter knows no bfloat16."""
    names = [name for name in ce.available_backends() if name != "cuda"]
    if case.get("loss") == "bayesian" and case.get("tau_plus") in ("pairs", "rows"):
        names = [name for name in names if name in ("torch", "reference")]
    if case.get("operand_dtype") in SPLIT_PRODUCTS:
        names = [name for name in names if name in (SPLIT_BY[case["operand_dtype"]], "reference")]
    sixteen = "bfloat16" in (case["dtype"], str(case.get("operand_dtype")).removeprefix("torch."))
    return [name for name in names if not (name == "triton" and sixteen)]


def one_rank() -> None:
    """A process group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def wild(family: Family, rng: random.Random) -> Case:
    """A case at random, with a shape of its own."""
    case = random_case(family.levels, family.allowed, rng)
    b, d = case["shape"]
    if rng.random() < 0.7:
        case["shape"] = (max(1 if b == 1 else 2, int(2 ** rng.uniform(1, 6))), d if d < 5 else rng.randint(5, 140))
    return case


def from_seed(seed: int, only: str) -> tuple[Family, Case]:
    rng = random.Random(seed)
    families = [f for f in FAMILIES if only in ("", f.name)]
    family = rng.choices(families, weights=[4 if f is PAIRS else 2 if f is RANKED else 1 for f in families])[0]
    return family, wild(family, rng)


def spoken(family: Family, case: Case) -> str:
    """What of a case differs from the defaults."""
    return ", ".join(f"{name}={x}" for name, x in case.items() if x != family.levels[name][0] or name == "shape")


def run(seed: int, only: str, names: list[str]) -> list[str]:
    family, case = from_seed(seed, only)
    try:
        call, truth, dense, upstream = drawn(family, case, seed)
    except Unclear:
        return []
    failures = []
    for name in [x for x in backends(case) if not names or x in names]:
        try:
            compare(call, name, ours(call, name, upstream), dense, truth)
        except Exception as error:
            said = " ".join(str(error).split())
            failures.append(
                f"seed {seed} {name}: {type(error).__name__}: {said:.400}\n    {family.name}: {spoken(family, case)}"
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--first", type=int, help="first seed; default: from the clock")
    parser.add_argument("--family", default="", choices=["", *(f.name for f in FAMILIES)])
    parser.add_argument("--backends", nargs="*", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    one_rank()
    seed = arguments.seed if arguments.seed is not None else arguments.first
    seed = int(time.time()) % 10**8 * 100 if seed is None else seed
    print(f"seeds from {seed}; one again: make fuzz SEED=<seed>", flush=True)
    end, tried, failed = time.monotonic() + arguments.seconds, 0, 0
    while True:
        failures = run(seed, arguments.family, arguments.backends)
        print(*failures, sep="\n", end="\n" if failures else "", flush=True)
        tried, failed, seed = tried + 1, failed + bool(failures), seed + 1
        if arguments.seed is not None or time.monotonic() > end:
            break
    print(f"{tried} cases, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
