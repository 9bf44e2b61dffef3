"""The protocol of csrc/cpu/sweep.h, every schedule of it: threads take blocks from a counter and column tiles in turns.

A model of its atomic steps, walked exhaustively: whichever thread moves next, no two threads add to the same columns at
a time, every column is added to in block order, nobody waits for ever, and a thread that fails ends the others too.
That a thread also sees what the one before it wrote follows from order: the value `block` of a turn is stored once,
with release, by the thread that has added block - 1, and read with acquire before block is added. Mutations show that
the walk finds what it looks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

FAILS = -1  # where a thread throws


@dataclass(frozen=True)
class Grid:
    """Rows and columns in units that divide blocks and tiles."""

    blocks: int
    block_rows: int
    tiles: int
    tile_cols: int
    triangle: bool

    def first(self, block: int) -> int:
        return block * self.block_rows // self.tile_cols if self.triangle else 0

    def columns(self, block: int, tile: int) -> range:
        begin = tile * self.tile_cols
        return range(max(begin, block * self.block_rows) if self.triangle else begin, begin + self.tile_cols)


@dataclass(frozen=True)
class Thread:
    at: str = "take"  # take, wait, add, pass, end, done: what it does next
    block: int = 0
    tile: int = 0


@dataclass(frozen=True)
class State:
    threads: tuple[Thread, ...]
    next_block: int
    turns: tuple[int, ...]
    added: tuple[tuple[int, ...], ...]  # the blocks that have added to every column
    ended: frozenset[int] = frozenset()
    failed: bool = False


class Protocol:
    """What each step does; a mutation overrides one."""

    def __init__(self, grid: Grid, fails: tuple[int, int] | None = None) -> None:
        self.grid, self.fails = grid, fails

    def may_add(self, state: State, thread: Thread) -> bool:
        return state.turns[thread.tile] == thread.block

    def take(self, state: State) -> tuple[int, int]:
        """The block a thread gets, and the counter after it."""
        return state.next_block, state.next_block + 1

    def step(self, state: State, i: int) -> State | None:
        """The state after thread i has moved, None where it has to wait."""
        t, grid = state.threads[i], self.grid
        if t.at == "take":
            block, counter = self.take(state)
            state = replace(state, next_block=counter)
            if not 0 <= block < grid.blocks:
                return self.moved(state, i, Thread("done"))
            return self.computed(state, i, block, grid.first(block))
        if t.at == "wait":
            if self.may_add(state, t):
                return self.moved(state, i, replace(t, at="add"))
            return self.moved(state, i, Thread("done")) if state.failed else None
        if t.at == "add":
            added = list(state.added)
            for column in grid.columns(t.block, t.tile):
                added[column] = (*added[column], t.block)
            return self.moved(replace(state, added=tuple(added)), i, replace(t, at="pass"))
        if t.at == "pass":
            turns = (*state.turns[: t.tile], t.block + 1, *state.turns[t.tile + 1 :])
            state = replace(state, turns=turns)
            if t.tile + 1 < grid.tiles:
                return self.computed(state, i, t.block, t.tile + 1)
            return self.moved(state, i, replace(t, at="end"))
        assert t.at == "end"
        return self.moved(replace(state, ended=state.ended | {t.block}), i, Thread())

    def computed(self, state: State, i: int, block: int, tile: int) -> State:
        if (block, tile) == self.fails:  # throws: its turns will never come
            return self.moved(replace(state, failed=True), i, Thread("done"))
        return self.moved(state, i, Thread("wait", block, tile))

    @staticmethod
    def moved(state: State, i: int, thread: Thread) -> State:
        return replace(state, threads=(*state.threads[:i], thread, *state.threads[i + 1 :]))


def walk(protocol: Protocol, threads: int) -> int:
    """Every reachable state, checked; how many there are."""
    grid = protocol.grid
    start = State((Thread(),) * threads, 0, (0,) * grid.tiles, ((),) * (grid.tiles * grid.tile_cols))
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        check(grid, state)
        after = [s for i, t in enumerate(state.threads) if t.at != "done" and (s := protocol.step(state, i))]
        assert after or all(t.at == "done" for t in state.threads), f"all wait: {state}"
        if not after and not state.failed:
            assert state.ended == set(range(grid.blocks)), f"blocks are missing: {state}"
            visitors = [[b for b in range(grid.blocks) if reaches(grid, b, c)] for c in range(len(state.added))]
            assert list(map(list, state.added)) == visitors, f"columns are missing: {state}"
        todo += [s for s in after if s not in seen]
        seen.update(after)
    return len(seen)


def reaches(grid: Grid, block: int, column: int) -> bool:
    tile = column // grid.tile_cols
    return tile >= grid.first(block) and column in grid.columns(block, tile)


def check(grid: Grid, state: State) -> None:
    def rows(block: int) -> set[int]:
        """A block's own, which as columns others add to; add_columns() of a triangle may change them as well."""
        return set(range(block * grid.block_rows, (block + 1) * grid.block_rows)) if grid.triangle else set()

    busy = [set(grid.columns(t.block, t.tile)) | rows(t.block) for t in state.threads if t.at in ("add", "pass")]
    busy += [rows(t.block) for t in state.threads if t.at == "end"]
    assert sum(map(len, busy)) == len(set().union(*busy)), f"two add to one column at a time: {state}"
    for blocks in state.added:
        assert list(blocks) == sorted(set(blocks)), f"out of order: {state}"
    if grid.triangle:  # nobody comes after the block itself
        for block in state.ended:
            for column in range(block * grid.block_rows, (block + 1) * grid.block_rows):
                assert state.added[column][-1] == block, f"added to after its end: {state}"


GRIDS = [
    Grid(blocks=4, block_rows=1, tiles=2, tile_cols=1, triangle=False),
    Grid(blocks=3, block_rows=1, tiles=3, tile_cols=1, triangle=True),
    Grid(blocks=4, block_rows=1, tiles=2, tile_cols=2, triangle=True),  # two blocks of rows in a tile of columns
    Grid(blocks=5, block_rows=1, tiles=3, tile_cols=2, triangle=True),  # the last tile is wider than what is left
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.blocks}x{g.tiles}{'-triangle' * g.triangle}")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_schedule_adds_in_order_and_ends(grid: Grid, threads: int) -> None:
    assert walk(Protocol(grid), threads) > 10


@pytest.mark.parametrize("grid", GRIDS[:3], ids=lambda g: f"{g.blocks}x{g.tiles}{'-triangle' * g.triangle}")
def test_a_thread_that_fails_anywhere_ends_the_others(grid: Grid) -> None:
    for block in range(grid.blocks):
        for tile in range(grid.first(block), grid.tiles):
            walk(Protocol(grid, fails=(block, tile)), 3)


class NoTurns(Protocol):
    def may_add(self, state, thread):
        return True


class AnyEarlierTurn(Protocol):
    def may_add(self, state, thread):
        return state.turns[thread.tile] <= thread.block


class FromTheEnd(Protocol):
    def take(self, state):
        return self.grid.blocks - 1 - state.next_block, state.next_block + 1


class LaterTurn(Protocol):
    def may_add(self, state, thread):
        return state.turns[thread.tile] > thread.block


@pytest.mark.parametrize(
    "mutation, found",
    [
        (NoTurns, "at a time|order"),
        (AnyEarlierTurn, "at a time|order"),
        (FromTheEnd, "all wait"),
        (LaterTurn, "all wait"),
    ],
)
def test_the_walk_notices(mutation: type[Protocol], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        walk(mutation(GRIDS[2]), 2)


def test_the_walk_notices_that_a_failure_is_not_told() -> None:
    class Silent(Protocol):
        def computed(self, state, i, block, tile):
            return replace(super().computed(state, i, block, tile), failed=False)

    with pytest.raises(AssertionError, match=r"all wait|missing"):
        walk(Silent(GRIDS[0], fails=(1, 0)), 2)
