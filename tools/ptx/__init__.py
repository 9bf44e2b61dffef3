"""An interpreter of PTX for sm_80 and sm_90, for programs that no machine at hand can run.

It computes what a program computes, under every order of events that PTX leaves open, and stops at what PTX forbids:
races, missing fences, registers of products in flight, deadlocks, accesses out of bounds. docs/design.md says what that
proves. In reading order:

    parser.py       text to instructions
    flow.py         where lanes that went apart meet
    registers.py    registers and numbers as rows of 32 lanes
    floats.py       roundings that numpy lacks
    arithmetic.py, bitwise.py, conversions.py    instructions on registers
    lanes.py        instructions between lanes, mma.sync
    memory.py       global and shared memory
    transfers.py    loads, stores, ldmatrix, stmatrix
    races.py        clocks: who may rely on what
    barriers.py     mbarrier, bar, fences
    products.py     wgmma
    bulk.py         TMA, cp.async
    schedules.py    orders of events
    warp.py, block.py, machine.py    the machine
    report.py       counts
    kernels.py, backward.py          this project's CUDA kernels on it
    triton_kernels.py, calls.py      what Triton compiles, and whole losses by its launches
    sample_*.py, mutations.py, checks.py    programs known to be right, faults in them, what is run
    counts.py       what a tile costs
"""
