"""Benchmark of contrastive_ext against plain PyTorch: correctness first, then time and memory. `python -m bench`.

The files from the ground up; each imports only what stands above it in this list (a test holds them to it):

    case.py         one problem as plain data, the tensors of a call
    device.py       CPU or GPU: a clock, the memory that is left, the library's rate
    environment.py  what a results file says of the machine
    formulas.py     the losses over pairs as dense formulas
    own_losses.py   the others: inputs, call and dense form of each
    losses.py       the table of losses: public function and dense formula side by side
    baselines.py    what people run today: eager, chunked, torch.compile, other libraries
    flops.py        what each method multiplies
    floors.py       what bounds it beside that: exponentials, memory
    cases.py        the table of what is measured
    methods.py      every way to compute a case: our backends and the baselines
    gate.py         nothing is timed before it is right
    timing.py       interleaved rounds
    hosts.py        other libraries' losses beside their adapters
    memory.py       peaks
    results.py      the file
    harness.py      one case from inputs to rows
    frontier.py     the largest N a machine allows
    report.py       what the terminal shows
    plots.py        the picture
    digits.py       training on handwritten digits, every step against the reference
    run.py          the benchmark itself
    batches.py, mining.py, negatives.py, smoke.py, proof.py, speed.py, tune.py    commands of their own
    __main__.py     the command line
"""

import os

# Before torch is imported. OpenMP threads that wait by spinning stop each other when a machine is shared: the same job
# took 31 s so, and 4.5 s with threads that sleep. All methods run under it; the results file notes it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
