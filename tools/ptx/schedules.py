"""In which order things happen that PTX leaves open: warps, and when asynchronous operations take place."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Schedule:
    """One order of events.

    earliest  copies and products happen when they are asked for; the first warp that can go on does
    latest    they happen when somebody waits for them and nothing else can go on; the last warp goes first
    random    any time between, warps and the sides of branches in any order, as the seed says
    """

    name: str = "earliest"
    seed: int = 0
    dice: random.Random = field(init=False)

    def __post_init__(self):
        if self.name not in ("earliest", "latest", "random"):
            raise ValueError(f"schedule must be earliest, latest or random; got {self.name!r}")
        self.dice = random.Random(self.seed)

    def __str__(self) -> str:
        return f"random, seed {self.seed}" if self.name == "random" else self.name

    @property
    def at_once(self) -> bool:
        """Whether an asynchronous operation happens when it is issued."""
        return self.name == "earliest"

    def happens_now(self) -> bool:
        """Whether a pending operation happens before the next step of a warp."""
        return self.name == "random" and self.dice.random() < 0.2

    def pick(self, choices: list):
        """Which of several warps goes on, or operations happens."""
        if self.name == "random":
            return self.dice.choice(choices)
        return choices[0] if self.name == "earliest" else choices[-1]

    def stays(self) -> bool:
        """Whether a warp goes on after an instruction that others can see."""
        return self.name != "random" or self.dice.random() < 0.7

    def taken_first(self) -> bool:
        """Whether the lanes that branch go before those that do not."""
        return self.dice.random() < 0.5 if self.name == "random" else self.name == "latest"

    def lanes(self, count: int) -> list[int]:
        """An order in which lanes write where they write to one address: the last one wins."""
        if self.name == "random":
            return self.dice.sample(range(count), count)
        return list(range(count))[:: 1 if self.name == "latest" else -1]

    def blocks(self, blocks: list) -> list:
        """The order of a launch's blocks."""
        if self.name == "random":
            return self.dice.sample(blocks, len(blocks))
        return blocks if self.name == "earliest" else blocks[::-1]


def schedules(seeds: int = 1) -> list[Schedule]:
    """All kinds, and so many random ones."""
    return [Schedule("earliest"), Schedule("latest"), *(Schedule("random", s) for s in range(seeds))]
