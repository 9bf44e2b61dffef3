"""Faults put into programs that are right, each of which has to be noticed.

`caught` says by what, under the earliest, the latest and random schedules: the kind of a PtxError, or "result" where
only the numbers are wrong. A fault that one schedule finds by one rule another may find by the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

Edit = Callable[[str], str]
WAIT = r"mbarrier\.try_wait\.parity\S* (\w+), (\[[^\]]+\]), (%r\d+);"
PRODUCT = r"(wgmma\.mma_async[^;]*?, )(%rd\d+)(, %rd\d+[^;]*;)"  # both operands in shared memory
PRODUCT_BY_ROWS = r"(wgmma\.mma_async[^;]*\}, )(%rd\d+)(, [^;]*, 1, 1, 1;)"  # b MN-major


class Mutation(NamedTuple):
    """An edit of a program's text."""

    program: str  # ring, sm_80, sm_90, sm_90 TMA, forward, columns, backward
    fault: str
    edit: Edit
    caught: str | tuple[str, str, str]

    def expected(self, schedule: str) -> str:
        """Kinds that may notice it, separated by |."""
        if isinstance(self.caught, str):
            return self.caught
        return self.caught[("earliest", "latest", "random").index(schedule)]


def replaced(pattern: str, by: str | Callable, *places: int) -> Edit:
    """The matches at those places (all where none is given) become `by`."""

    def edit(text: str) -> str:
        matches = list(re.finditer(pattern, text, re.DOTALL))
        chosen = [matches[p] for p in places] if places else matches
        assert chosen, f"nothing matches {pattern}"
        for m in reversed(chosen):
            text = text[: m.start()] + (by(m) if callable(by) else m.expand(by)) + text[m.end() :]
        return text

    return edit


def dropped(pattern: str, *places: int) -> Edit:
    return replaced(pattern, "", *places)


def moved_behind(pattern: str, anchor: str, *places: int) -> Edit:
    """What matches goes behind the next match of the anchor."""
    return replaced(f"({pattern})(.*?{anchor})", r"\2\n\1", *places)


def not_waited(*places: int) -> Edit:
    """A wait for an mbarrier that answers yes at once."""
    return replaced(WAIT, r"setp.eq.b32 \1, 0, 0;", *places)


def flipped(*places: int) -> Edit:
    """The other parity is waited for."""
    wait = r"mbarrier.try_wait.parity.shared::cta.b64 \1, \2, other;"
    return replaced(WAIT, rf"{{ .reg .b32 other; xor.b32 other, \3, 1; {wait} }}", *places)


def descriptor(pattern: str, change: int, *places: int) -> Edit:
    """Bits of a matrix descriptor change."""
    new = r"{ .reg .b64 other; xor.b64 other, \2, " + str(change) + r"; \1other\3 }"
    return replaced(pattern, new, *places)


def read_early(text: str) -> str:
    """An accumulator is read before the wait for its product."""
    accumulator = re.search(r"wgmma\.mma_async[^{]*\{(%r\d+)", text)
    assert accumulator
    return replaced(GROUP_WAIT, rf"{{ .reg .f32 seen; abs.f32 seen, {accumulator.group(1)}; }} \g<0>")(text)


ARRIVE = r"(@%p\d+ )?mbarrier\.arrive\.(release\.cta\.)?shared[^;]*;"
EXPECT = r"(mbarrier\.arrive\.expect_tx[^;]*), (\d+|%r\d+);"
GROUP_WAIT = r"wgmma\.wait_group[^;]*;"
LINE = r"cp\.async\.bulk\.shared::cluster\.global[^;]*;"
LINE_TO = r"(cp\.async\.bulk\.shared::cluster\.global\S* \[%r\d+)(\][^;]*;)"
PACK = r"(cvt\.rn\.f16x2\.f32\s+%r\d+, )(%f\d+), (%f\d+);"
LEFT = r"(st\.shared\.v4\.f32\s+\[%r\d+)\]"  # a lane's sums for the columns
TURN = r"(mad\.lo\.s32\s+%r\d+, )%r\d+, 12288"  # where they lie: bytes of a buffer
LAST_WAIT = r"wgmma\.wait_group\.sync\.aligned 0;"  # of the CUDA kernels, which wait for all but one group before
FIRST_STAGE = 2  # of the forward's mbarriers: rows, then full and empty of each stage

MUTATIONS = [
    # ---- the Gluon ring
    Mutation("ring", "products are not waited for", dropped(GROUP_WAIT), "race"),
    Mutation("ring", "products are not committed", dropped(r"wgmma\.commit_group[^;]*;"), "race"),
    Mutation("ring", "no wgmma.fence", dropped(r"wgmma\.fence[^;]*;"), "in flight"),
    Mutation("ring", "an accumulator is read early", read_early, "in flight"),
    Mutation("ring", "the consumer flips its parity", flipped(0), "deadlock|race|uninitialised"),
    Mutation("ring", "the producer flips its parity", flipped(1), "deadlock"),
    Mutation("ring", "the consumer does not wait", not_waited(0), ("race", "uninitialised", "race|uninitialised")),
    Mutation("ring", "the producer does not wait", not_waited(1), "race|barrier"),
    Mutation("ring", "the consumer does not arrive", dropped(ARRIVE), "deadlock"),
    Mutation("ring", "the consumer arrives twice", replaced(ARRIVE, r"\g<0>\n\g<0>"), "deadlock"),
    Mutation("ring", "the producer arrives twice", replaced(EXPECT, r"\g<0>\n\g<0>"), "deadlock|barrier"),
    Mutation("ring", "the consumer arrives before its warps have met", dropped(r"bar\.sync\s+0, 128;", 0), "race"),
    Mutation("ring", "half the bytes are expected", replaced(EXPECT, r"\1, 8192;"), "barrier|race"),
    Mutation("ring", "more bytes are expected than come", replaced(EXPECT, r"\1, 16400;"), "deadlock"),
    Mutation("ring", "a full barrier counts two", replaced(r"(mbarrier\.init[^;]*), 1;", r"\1, 2;", 0), "deadlock"),
    Mutation("ring", "an empty barrier counts two", replaced(r"(mbarrier\.init[^;]*), 1;", r"\1, 2;", 1), "deadlock"),
    Mutation(
        "ring",
        "a barrier is initialised again",
        replaced(r"@%p\d+ mbarrier\.init[^;]*;", r"\g<0>\n\g<0>", 0),
        "barrier",
    ),
    Mutation(
        "ring",
        "a numbered barrier counts 160 threads",
        replaced(r"bar\.sync\s+0, 128;", "bar.sync 0, 160;", 0),
        "deadlock",
    ),
    Mutation(
        "ring",
        "a numbered barrier counts 96 threads",
        replaced(r"bar\.sync\s+0, 128;", "bar.sync 0, 96;", 0),
        "race|deadlock|barrier",
    ),
    Mutation("ring", "no proxy fence before the bulk store", dropped(r"fence\.proxy\.async[^;]*;", -1), "proxy"),
    Mutation("ring", "no barrier before the bulk store", dropped(r"bar\.sync\s+0, 128;", 1), "race|uninitialised"),
    Mutation("ring", "the bulk store is not waited for", dropped(r"cp\.async\.bulk\.wait_group[^;]*;"), "in flight"),
    Mutation("ring", "another swizzle in the descriptors", descriptor(PRODUCT, 3 << 62), "result"),
    Mutation("ring", "half the stride offset", descriptor(PRODUCT, 0x60 << 32), "result"),
    Mutation("ring", "a start 16 bytes further", descriptor(PRODUCT, 1), "race"),
    Mutation(
        "ring", "a box lands in its neighbour's", replaced(r"(add\.s32\s+%r\d+, %r15), 16384;", r"\1, 8192;"), "race"
    ),
    Mutation(
        "ring",
        "a box lands beyond shared memory",
        replaced(r"(add\.s32\s+%r\d+, %r15), 16384;", r"\1, 40960;"),
        "bounds",
    ),
    # ---- Triton, sm_80
    Mutation("sm_80", "copies are not waited for", dropped(r"cp\.async\.wait_group\s+1;"), "race"),
    Mutation("sm_80", "one group too few is waited for", replaced(r"(cp\.async\.wait_group\s+)1;", r"\g<1>2;"), "race"),
    Mutation(
        "sm_80",
        "no barrier after the wait",
        replaced(r"(cp\.async\.wait_group[^;]*;[^;]*)bar\.sync\s+0;", r"\1", 0),
        "race|uninitialised",
    ),
    Mutation(
        "sm_80",
        "no barrier before a stage is filled again",
        dropped(r"bar\.sync\s+0;(?=((?!bar\.sync).)*cp\.async\.cg)", -1),
        "race",
    ),
    Mutation("sm_80", "matrices are not transposed", replaced(r"\.x4\.trans", ".x4"), "result"),
    Mutation(
        "sm_80", "an address 16 bytes further", replaced(r"(ldmatrix[^;]*\[%r\d+)\+128\]", r"\1+144]", 0), "result"
    ),
    Mutation(
        "sm_80", "an address 8 bytes further", replaced(r"(ldmatrix[^;]*\[%r\d+)\+128\]", r"\1+136]", 0), "alignment"
    ),
    Mutation(
        "sm_80", "a store behind the matrix", replaced(r"(st\.global\S* \[ %rd\d+ \+) 0 \]", r"\1 32768 ]", 0), "bounds"
    ),
    Mutation(
        "sm_80",
        "a store into another block's rows",
        replaced(r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;"),
        "race",
    ),
    # ---- Triton, sm_90 by cp.async
    Mutation("sm_90", "no proxy fence between copies and products", dropped(r"fence\.proxy\.async[^;]*;"), "proxy"),
    Mutation("sm_90", "the leading offset of an MN-major operand", descriptor(PRODUCT_BY_ROWS, 0x0300 << 16), "result"),
    Mutation("sm_90", "the stride offset of an MN-major operand", descriptor(PRODUCT_BY_ROWS, 0x60 << 32), "result"),
    Mutation(
        "sm_90",
        "an MN-major operand read as K-major",
        replaced(r"(wgmma\.mma_async[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;"),
        "result|uninitialised|race",
    ),
    Mutation("sm_90", "weights are read early", dropped(GROUP_WAIT, 0), "in flight"),
    # ---- Triton, sm_90 by TMA
    Mutation("sm_90 TMA", "a tile is not waited for", not_waited(-1), "race|uninitialised"),
    Mutation(
        "sm_90 TMA",
        "a stage is filled while products read it",
        replaced(GROUP_WAIT, "wgmma.wait_group.sync.aligned 2;", 0),
        "in flight",
    ),
    Mutation("sm_90 TMA", "no proxy fence before the bulk store", dropped(r"fence\.proxy\.async[^;]*;", -1), "proxy"),
    # ---- the CUDA forward
    Mutation("forward", "the consumers do not wait for columns", not_waited(5, 6), "race|uninitialised"),
    Mutation("forward", "the consumers flip their parity", flipped(5, 6), "race|uninitialised|deadlock"),
    Mutation("forward", "the producer does not wait for an empty stage", not_waited(0), "race|barrier"),
    Mutation("forward", "the producer flips its parity", flipped(0), "deadlock"),
    Mutation("forward", "the consumers do not arrive", dropped(ARRIVE), "deadlock"),
    Mutation(
        "forward",
        "they arrive before their products are over",
        moved_behind(LAST_WAIT, r"mbarrier\.arrive\.release[^;]*;.*?\n\$L\w+:"),
        "race",
    ),
    Mutation(
        "forward",
        "an empty barrier counts seven warps",
        replaced(r"(mbarrier\.init[^;]*), %r\d+;", r"\1, 7;", FIRST_STAGE),
        "race|barrier",
    ),
    Mutation(
        "forward",
        "an empty barrier counts nine warps",
        replaced(r"(mbarrier\.init[^;]*), %r\d+;", r"\1, 9;", FIRST_STAGE),
        "deadlock",
    ),
    Mutation("forward", "no turn is given", dropped(r"bar\.arrive[^;]*;"), "deadlock"),
    Mutation(
        "forward", "a turn takes 288 threads", replaced(r"(bar\.sync\s+[12]), 256;", r"\1, 288;"), "barrier|deadlock"
    ),
    Mutation("forward", "turns are given twice", replaced(r"bar\.arrive[^;]*;", r"\g<0>\n\g<0>"), "deadlock"),
    Mutation("forward", "products are not waited for", dropped(LAST_WAIT), "in flight"),
    Mutation(
        "forward",
        "the last products are not waited for",
        replaced(LAST_WAIT, "wgmma.wait_group.sync.aligned 1;"),
        "in flight",
    ),
    Mutation("forward", "half the bytes of a tile are expected", replaced(EXPECT, r"\1, 16384;", -1), "barrier|race"),
    Mutation("forward", "a box is never asked for", dropped(r"cp\.async\.bulk\.tensor[^;]*;", -1), "deadlock"),
    Mutation("forward", "a descriptor without swizzle", descriptor(PRODUCT, 1 << 62), "result|uninitialised|race"),
    # ---- the CUDA forward with columns
    Mutation("columns", "sums are not waited for", dropped(r"bar\.sync\s+[34], 256;"), "race|uninitialised"),
    Mutation("columns", "no sums are left", dropped(r"bar\.arrive\s+[34], 256;"), "deadlock"),
    Mutation("columns", "sums of two tiles in one buffer", replaced(TURN, r"\g<1>0, 12288"), "race"),
    Mutation("columns", "a warp's sums lie 16 bytes further", replaced(LEFT, r"\1+16 ]"), "uninitialised|race"),
    Mutation("columns", "lanes share with the wrong half", replaced(r"(mov\.u32\s+%r\d+, )16;", r"\g<1>8;"), "result"),
    # ---- the CUDA backward
    Mutation("backward", "the consumers do not wait for columns", not_waited(2, 3), "race|uninitialised"),
    Mutation("backward", "the consumers flip their parity", flipped(2, 3), "race|uninitialised|deadlock"),
    Mutation("backward", "the producer does not wait for an empty stage", not_waited(0), "race|barrier"),
    Mutation("backward", "the consumers do not arrive", dropped(ARRIVE), "deadlock"),
    Mutation("backward", "they arrive twice", replaced(ARRIVE, r"\g<0>\n\g<0>"), "race|barrier|deadlock"),
    Mutation(
        "backward",
        "they arrive for the first tile before its weights are multiplied",
        replaced(r"or\.pred\s+(%p\d+), (%p\d+), %p\d+;(?=\s*@\1 bra[^;]*;[^@]*?mbarrier\.arrive)", r"mov.pred \1, \2;"),
        "race|deadlock",
    ),
    Mutation("backward", "no turn is given", dropped(r"bar\.arrive[^;]*;"), "deadlock"),
    Mutation("backward", "products are not waited for", dropped(LAST_WAIT, 0), "in flight"),
    Mutation("backward", "the last product is not waited for", dropped(LAST_WAIT, 1), "in flight"),
    Mutation("backward", "no wgmma.fence behind the weights", dropped(r"wgmma\.fence[^;]*;"), "in flight"),
    Mutation(
        "backward",
        "the bytes of the columns' terms are not expected",
        replaced(EXPECT, r"\1, 32768;", -1),
        "barrier|race|deadlock",
    ),
    Mutation("backward", "the columns' terms are never asked for", dropped(LINE), "deadlock"),
    Mutation("backward", "the columns' terms go 16 bytes further", replaced(LINE_TO, r"\1+16\2"), "barrier"),
    Mutation("backward", "the leading offset of the tile by rows", descriptor(PRODUCT_BY_ROWS, 0x0600 << 16), "result"),
    Mutation("backward", "the tile by rows begins 16 rows further", descriptor(PRODUCT_BY_ROWS, 128, 0), "result"),
    Mutation(
        "backward",
        "the tile by rows is read by features",
        replaced(r"(wgmma\.mma_async[^;]*), 1, 1, 1;", r"\1, 1, 1, 0;"),
        "result|race|bounds|uninitialised",
    ),
    Mutation("backward", "weights of two columns are exchanged", replaced(PACK, r"\1\3, \2;"), "result"),
]
