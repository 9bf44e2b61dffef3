"""Covering arrays: few cases in which every two levels of every two factors meet at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence

Level = Hashable
Case = dict[str, Level]
Allowed = Callable[[Mapping[str, Level]], bool]  # of a partial case: False where its factors contradict one another


def pairs_of(case: Mapping[str, Level]) -> set[tuple]:
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def possible_pairs(factors: Mapping[str, Sequence[Level]], allowed: Allowed) -> set[tuple]:
    """Every two levels of different factors that may meet."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(sorted(factors), 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    }


def covering_array(
    factors: Mapping[str, Sequence[Level]], allowed: Allowed, seed: int = 0, tries: int = 6
) -> list[Case]:
    """Greedy: the case that holds most of the missing pairs, of a few that are built around one of them."""
    rng = random.Random(seed)
    missing = dict.fromkeys(sorted(possible_pairs(factors, allowed), key=repr))
    cases: list[Case] = []
    while missing:
        wanted = next(iter(missing))
        grown: list[Case] = []
        for _ in range(20 * tries):  # a case may grow into a dead end
            case = _grow(dict(wanted), factors, allowed, missing, rng)
            if case is not None:
                grown.append(case)
            if len(grown) == tries:
                break
        if not grown:
            raise ValueError(f"no case holds {wanted}: a rule about these two is missing.")
        best = max(grown, key=lambda case: sum(pair in missing for pair in pairs_of(case)))
        for pair in pairs_of(best):
            missing.pop(pair, None)
        cases.append(best)
    return cases


def random_case(factors: Mapping[str, Sequence[Level]], allowed: Allowed, rng: random.Random) -> Case:
    while True:
        case = _grow({}, factors, allowed, {}, rng)
        if case is not None:
            return case


def _grow(case: Case, factors, allowed: Allowed, missing: Mapping, rng: random.Random) -> Case | None:
    """Complete a case one factor after another, each at the allowed level that meets most missing pairs.

    The first factor, on which the others depend, is decided first.
    """
    if not allowed(case):
        return None
    first, *others = factors
    rng.shuffle(others)
    for name in [first, *others]:
        if name in case:
            continue
        levels = [x for x in factors[name] if allowed({**case, name: x})]
        if not levels:
            return None
        rng.shuffle(levels)

        def gain(level, name=name, case=case):
            return sum(tuple(sorted([(name, level), other])) in missing for other in case.items())

        case = {**case, name: max(levels, key=gain) if missing else levels[0]}
    return case
