"""What PTX forbids is found, whatever the schedule, and what it allows is not: small programs of a few warps."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.bulk import TensorMap
from ptx.errors import PtxError
from ptx.machine import program
from ptx.memory import GlobalMemory
from ptx.schedules import Schedule, schedules

HEAD = """
    .extern .shared .align 16 .b8 data[];
    .entry test(.param .u64 out, .param .u64 source, .param .align 64 .b8 map[128]) {
    .reg .b32 t, w, l, at, to, bar, x, y, z; .reg .pred p, q, first; .reg .b64 g, s, m, lane;
    mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 l, t, 31; cvt.u64.u32 lane, t;
    mov.u32 to, data; mad.lo.u32 at, t, 4, to; add.u32 bar, to, 4096; setp.eq.u32 first, t, 0; mov.u32 x, 0;
    ld.param.u64 g, [out]; mad.lo.u64 g, lane, 4, g; ld.param.u64 s, [source]; mad.lo.u64 s, lane, 4, s;
    mov.b64 m, map; cvta.param.u64 m, m;
"""
TAIL = "\n st.global.u32 [g], x; ret; }"
THREADS = 128
INIT = "@first mbarrier.init.shared::cta.b64 [bar], 1; bar.sync 0;"
EXPECT = "@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;"
BOX = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [to], [m, {0, 0}], [bar];"
WAIT = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], 0; @!done bra again; }"
READ_NEXT = "xor.b32 z, at, 128; ld.shared.u32 x, [z];"  # what the next warp has


def run(body: str, schedule=None, threads: int = THREADS, grid: int = 1, shared: int = 8192, **more) -> np.ndarray:
    """`out` after the program; every thread stores x."""
    memory = GlobalMemory()
    out = memory.place(np.zeros(threads, np.uint32), "out")
    source = memory.place(np.arange(1024, dtype=np.uint32), "source")
    box = TensorMap(source, 4, (32, 4), (128,), (32, 4), 0)
    program(HEAD + body + TAIL).launch(
        (grid,), threads, [out, source, box], memory, shared=shared, schedule=schedule, **more
    )
    return memory.array("out")


def fails(body: str, kind: str, **options) -> str:
    """The error that every schedule meets."""
    for schedule in schedules(3):
        with pytest.raises(PtxError) as error:
            run(body, schedule, **options)
        assert error.value.kind in kind.split("|"), f"{schedule}: {error.value}"
    return str(error.value)


def passes(body: str, expected, **options) -> None:
    for schedule in schedules(3):
        np.testing.assert_array_equal(run(body, schedule, **options), expected, err_msg=str(schedule))


T = np.arange(THREADS)


# ---- lanes apart and together


def test_lanes_meet_again_after_a_branch():
    passes("""setp.lt.u32 p, l, 5; @p bra A; mov.u32 x, 1; bra B; A: mov.u32 x, 2;
              B: shfl.sync.bfly.b32 x, x, 31, 31, -1;""", np.where(T % 32 > 26, 2, 1))  # fmt: skip


def test_lanes_meet_again_after_loops_of_different_lengths():
    passes("""mov.u32 y, l; again: setp.eq.u32 p, y, 0; @p bra done; add.u32 x, x, y; sub.u32 y, y, 1; bra again;
              done: shfl.sync.idx.b32 x, x, 31, 31, -1;""", np.full(THREADS, 496))  # fmt: skip


def test_nested_branches_and_lanes_that_leave():
    passes("""setp.ge.u32 p, l, 16; @p bra out; and.b32 y, l, 1; setp.eq.u32 p, y, 0; @p bra even; mov.u32 x, 3;
              setp.eq.u32 q, l, 7; @q ret; bra out; even: mov.u32 x, 4; out: add.u32 x, x, 1;""",
           np.select([T % 32 >= 16, T % 32 == 7, T % 2 == 0], [1, 0, 5], 4))  # fmt: skip


def test_a_loop_that_one_lane_leaves_from_the_middle():
    passes(
        """again: add.u32 x, x, 1; setp.gt.u32 p, x, l; @p bra out; bra again; out: add.u32 x, x, 100;""", T % 32 + 101
    )


@pytest.mark.parametrize(
    "instruction",
    ["bar.sync 0;", "shfl.sync.bfly.b32 x, x, 1, 31, -1;", "wgmma.fence.sync.aligned;", "bar.warp.sync -1;"],
)
def test_what_a_whole_warp_executes_is_refused_to_a_part(instruction):
    said = fails(f"setp.lt.u32 p, l, 5; @p bra A; {instruction} A: mov.u32 x, 2;", "divergence")
    assert instruction.split()[0].rstrip(";") in said and "warp" in said


# ---- shared memory


def test_a_barrier_orders_what_warps_write_and_read():
    passes(f"st.shared.u32 [at], t; bar.sync 0; {READ_NEXT}", T ^ 32)


def test_no_barrier_is_a_race():
    said = fails(
        f"st.shared.u32 [at], t; setp.lt.u32 p, w, 2; @p bar.sync 1, 64; {READ_NEXT}", "race|uninitialised|divergence"
    )
    assert "thread" in said


def test_a_barrier_of_others_orders_nothing():
    """Warps 0 and 1 meet, 2 and 3 meet; all read from the next pair."""
    body = "st.shared.u32 [at], t; shr.u32 y, w, 1; add.u32 y, y, 1; bar.sync y, 64;"
    passes(body + READ_NEXT, T ^ 32)
    assert "race" in fails(body + "xor.b32 z, at, 256; ld.shared.u32 x, [z];", "race|uninitialised")


def test_overwriting_what_others_may_still_read_is_a_race():
    body = f"st.shared.u32 [at], t; bar.sync 0; {READ_NEXT}"
    fails(body + "st.shared.u32 [at], x;", "race")
    passes(body + "bar.sync 0; st.shared.u32 [at], x; ", T ^ 32)


def test_lanes_of_one_warp_have_an_order_only_by_a_warp_barrier():
    body = "st.shared.u32 [at], t; {} xor.b32 z, at, 4; ld.shared.u32 x, [z];"
    passes(body.format("bar.warp.sync -1;"), T ^ 1)
    fails(body.format(""), "race")


def test_equal_values_may_be_written_together_others_not():
    passes("st.shared.u32 [to], 7; bar.sync 0; ld.shared.u32 x, [to];", np.full(THREADS, 7))
    fails("st.shared.u32 [to], w; bar.sync 0; ld.shared.u32 x, [to];", "race")
    fails("st.shared.u32 [to], l; bar.sync 0; ld.shared.u32 x, [to];", "race")


def test_any_of_the_lanes_that_write_to_one_address_may_win():
    body = "bra A; A: st.shared.u32 [to], l; bar.warp.sync -1; ld.shared.u32 x, [to];"
    fails(body, "race", threads=32)
    won = {int(run(body, schedule, threads=32, lanes_may_differ=True)[0]) for schedule in schedules(3)}
    assert {0, 31} < won


def test_an_arrival_releases_what_its_thread_did_not_what_its_warp_did():
    """Lane 0 arrives for its warp: without a warp barrier the other lanes' reads are not covered."""
    init = "@first mbarrier.init.shared::cta.b64 [bar], 3; st.shared.u32 [at], t; bar.sync 0; setp.eq.u32 q, l, 0;"
    body = init + """ setp.eq.u32 p, w, 0; @p bra writer; xor.b32 z, at, 128; ld.shared.u32 x, [to]; TOGETHER
        @q mbarrier.arrive.shared::cta.b64 _, [bar]; bra out;
        writer: """ + WAIT + """ st.shared.u32 [to], 5; out: mov.u32 x, 1; """  # fmt: skip
    passes(body.replace("TOGETHER", "bar.warp.sync -1;"), np.ones(THREADS))
    fails(body.replace("TOGETHER", ""), "race")


def test_shared_memory_is_not_read_before_it_is_written():
    assert "nobody has written" in fails("ld.shared.u32 x, [at];", "uninitialised")


@pytest.mark.parametrize("address, kind", [("at+8192", "bounds"), ("at+2", "alignment"), ("at+-2048", "bounds")])
def test_shared_addresses_are_checked(address, kind):
    fails(f"st.shared.u32 [{address}], t;", kind)


def test_a_loop_that_waits_for_memory_is_refused(monkeypatch):
    """A warp of the machine goes on until it waits: nobody would ever write what it spins on."""
    monkeypatch.setattr("ptx.warp.MOST_ALONE", 1000)
    said = fails("st.shared.u32 [at], 0; again: ld.shared.u32 x, [at]; setp.eq.u32 p, x, 0; @p bra again;", "deadlock")
    assert "not modelled" in said


# ---- global memory


@pytest.mark.parametrize("offset, kind", [(512, "bounds"), (-4, "bounds"), (2, "alignment")])
def test_global_addresses_are_checked_and_named(offset, kind):
    said = fails(f"ld.global.u32 x, [g+{offset}];", kind)
    assert "out +" in said or "in no array" in said


def test_blocks_share_no_byte():
    assert "a block writes what another one wrote" in fails("", "race", grid=2)


COUNT = """
    .entry test(.param .u64 counts) {{ .reg .b64 g, lane; .reg .b32 t, x; .reg .pred p;
    ld.param.u64 g, [counts]; mov.u32 t, %tid.x; and.b32 x, t, 3; cvt.u64.u32 lane, x; mad.lo.u64 g, lane, 4, g;
    {} ret; }}"""


def test_blocks_may_add_to_one_byte_atomically():
    for schedule in schedules(1):
        memory = GlobalMemory()
        counts = memory.place(np.arange(4, dtype=np.uint32), "counts")
        program(COUNT.format("red.global.gpu.relaxed.add.u32 [g], t;")).launch(
            (3,), 64, [counts], memory, schedule=schedule
        )
        np.testing.assert_array_equal(memory.array("counts"), [i + 3 * sum(range(i, 64, 4)) for i in range(4)])


@pytest.mark.parametrize("other", ["ld.global.u32 x, [g];", "st.global.u32 [g], 7;"])
def test_but_not_beside_ordinary_accesses(other):
    body = "mov.u32 x, %ctaid.x; setp.eq.u32 p, x, 0; @p bra A; " + other + " ret; A: red.global.add.u32 [g], t;"
    for schedule in schedules(1):
        memory = GlobalMemory()
        counts = memory.place(np.zeros(4, np.uint32), "counts")
        with pytest.raises(PtxError, match="race"):
            program(COUNT.format(body)).launch((2,), 32, [counts], memory, schedule=schedule)


# ---- barriers


def test_a_barrier_that_nobody_completes_is_a_deadlock_that_says_who_waits():
    said = fails("setp.eq.u32 p, w, 0; @p bra out; bar.sync 0, 128; out: mov.u32 x, 1;", "deadlock")
    assert "warp 1 waits for barrier 0" in said and "bar.sync 0, 128" in said


@pytest.mark.parametrize("count", [96, 100])
def test_counts_of_numbered_barriers_are_checked(count):
    fails(
        f"setp.eq.u32 p, w, 0; @p bra A; bar.sync 1, 128; bra out; A: bar.sync 1, {count}; out: mov.u32 x, 1;",
        "barrier|deadlock",
    )


def test_arrivals_left_over_at_the_end_are_an_error():
    assert "ends with 32 threads" in fails(
        "setp.ne.u32 p, w, 0; @p bra out; bar.arrive 3, 64; out: mov.u32 x, 1;", "barrier"
    )


def test_phases_of_an_mbarrier_have_parities():
    """Two phases: whoever waits for parity 0, then 1, has seen both; a fresh barrier answers yes to parity 1."""
    passes(INIT + """ mbarrier.test_wait.parity.shared::cta.b64 p, [bar], 1; @p add.u32 x, x, 1;
        mbarrier.test_wait.parity.shared::cta.b64 p, [bar], 0; @p add.u32 x, x, 10; bar.sync 0;
        @first mbarrier.arrive.shared::cta.b64 _, [bar]; bar.sync 0;
        mbarrier.test_wait.parity.shared::cta.b64 p, [bar], 0; @p add.u32 x, x, 100;
        mbarrier.test_wait.parity.shared::cta.b64 p, [bar], 1; @p add.u32 x, x, 1000;
        """, np.full(THREADS, 101))  # fmt: skip


def test_an_mbarrier_is_used_after_its_initialisation():
    fails("@first mbarrier.init.shared::cta.b64 [bar], 128; mbarrier.arrive.shared::cta.b64 _, [bar];", "race|barrier")
    assert "there is no mbarrier" in fails("mbarrier.arrive.shared::cta.b64 _, [bar];", "barrier")


def test_too_many_arrivals():
    assert "more than 1 arrivals" in fails(INIT + EXPECT + "bar.sync 0;" + EXPECT, "barrier")


def test_a_barrier_is_no_data():
    fails(INIT + "ld.shared.u32 x, [bar];", "barrier")


# ---- bulk copies

WAITED = np.arange(128)


def test_a_bulk_copy_is_there_after_the_wait():
    passes(INIT + EXPECT + "@first " + BOX + WAIT + "ld.shared.u32 x, [at];", WAITED)


def test_a_bulk_copy_is_not_there_before():
    fails(INIT + EXPECT + "@first " + BOX + "bar.sync 0; ld.shared.u32 x, [at];" + WAIT, "race")


def test_a_bulk_copy_over_what_others_wrote_takes_a_proxy_fence():
    write = "st.shared.u32 [at], 9; {} bar.sync 0;"
    rest = INIT + EXPECT + "@first " + BOX + WAIT + "ld.shared.u32 x, [at];"
    passes(write.format("fence.proxy.async.shared::cta;") + rest, WAITED)
    fails(write.format("") + rest, "proxy")
    # the fence may stand behind the barrier as well, in the thread that goes on
    passes(write.format("") + "fence.proxy.async.shared::cta;" + rest, WAITED)


def test_expecting_more_or_fewer_bytes():
    more, fewer = EXPECT.replace("512", "528"), EXPECT.replace("512", "256")
    assert "bytes missing" in fails(INIT + more + "@first " + BOX + WAIT, "deadlock")
    fails(INIT + fewer + "@first " + BOX + WAIT, "deadlock|barrier")


def test_a_block_does_not_end_before_its_copies():
    with pytest.raises(PtxError, match="in flight: the block ends"):
        run(INIT + EXPECT + "@first " + BOX, Schedule("latest"))


def test_a_box_starts_at_a_multiple_of_128_bytes():
    fails(INIT + EXPECT + "add.u32 to, to, 64; @first " + BOX + WAIT, "alignment")


LINE = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [to], [s], 512, [bar];"


def test_a_line_of_bytes_comes_like_a_box():
    passes(INIT + EXPECT + "@first " + LINE + WAIT + "ld.shared.u32 x, [at];", T)
    fails(INIT + EXPECT + "@first " + LINE + "ld.shared.u32 x, [at];" + WAIT, "race|uninitialised")
    fails(INIT + EXPECT + "@first " + LINE.replace("512", "496") + WAIT, "deadlock")
    fails(INIT + EXPECT + "add.u32 to, to, 8; @first " + LINE + WAIT, "alignment")
    fails(INIT + EXPECT + "@first " + LINE.replace("512", "8192") + WAIT, "bounds|barrier")


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": 8}, {"strides": (120,)}, {"box": (32, 512)}, {"swizzle": 64}, {"box": (3, 4)}, {"sizes": (32,)},
        {"sizes": (0, 4)},
    ],
)  # fmt: skip
def test_tensor_maps_are_checked_as_the_driver_does(wrong):
    good = {"address": 0, "element": 4, "sizes": (32, 4), "strides": (128,), "box": (32, 4), "swizzle": 128}
    TensorMap(**good)
    with pytest.raises(PtxError, match="tensor map"):
        TensorMap(**(good | wrong))


# ---- cp.async

COPY = "cp.async.ca.shared.global [at], [s], 4, 4; cp.async.commit_group;"


def test_a_copy_is_there_after_the_wait_and_a_barrier():
    passes(COPY + "cp.async.wait_group 0; bar.sync 0;" + READ_NEXT, T ^ 32)
    passes(COPY + "cp.async.wait_group 0; ld.shared.u32 x, [at];", T)  # its own thread's needs no barrier


def test_a_copy_is_not_there_without_either():
    fails(COPY + "bar.sync 0;" + READ_NEXT + "cp.async.wait_group 0;", "race")
    fails(COPY + "ld.shared.u32 x, [at]; cp.async.wait_group 0;", "race")
    fails(COPY + "cp.async.wait_group 1; ld.shared.u32 x, [at];", "race")
    fails(COPY + "cp.async.wait_group 0;" + READ_NEXT, "race|uninitialised")


def test_a_copy_fills_with_zeros_what_it_is_not_given():
    body = "and.b32 y, t, 1; shl.b32 y, y, 2; cp.async.ca.shared.global [at], [s], 4, y; cp.async.commit_group;"
    passes(body + "cp.async.wait_group 0; ld.shared.u32 x, [at];", np.where(T % 2, T, 0))
