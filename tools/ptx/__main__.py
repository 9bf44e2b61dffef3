"""Runs programs on the machine: what is known to be right, faults in it, the CUDA kernels, whole losses by Triton.

    make ptx                                a part of everything, about a minute
    make ptx ARGS=--all                     every fault, call and problem under every schedule: many minutes
    make ptx ARGS="--only '^calls .*ids'"   lines that match
    make ptx ARGS=--counts                  the table of docs/measurements.md

A line is green if the machine found nothing and the numbers are right; of a fault, if it was noticed by what the table
of mutations.py says. Needs nvcc for the CUDA kernels, Triton for the rest.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator

from . import checks, machine
from .mutations import MUTATIONS
from .schedules import Schedule, schedules


def lines(everything: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(name, program that it takes, function that raises), in the order of trust: samples first."""
    seeds = 4 if everything else 1
    for program in checks.SAMPLES:
        for schedule in schedules(seeds):
            yield f"samples {program}, {schedule}", program, lambda p=program, s=schedule: _sample(p, s)
    for name, call in checks.forwards().items():
        for schedule in schedules(seeds) if everything or name == "256 x 384" else schedules(0)[1:]:
            yield f"forward {name}, {schedule}", "forward", lambda c=call, s=schedule: checks.check_forward(c, s)
    for turn, (name, sweep) in enumerate(checks.backwards().items()):
        for schedule in schedules(seeds) if everything else [schedules(1)[turn % 3]]:
            yield f"backward {name}, {schedule}", "backward", lambda b=sweep, s=schedule: checks.check_backward(b, s)
    for turn, mutation in enumerate(MUTATIONS):
        for schedule in schedules(seeds) if everything else [schedules(1)[turn % 3]]:
            name = f"faults {mutation.program}: {mutation.fault}, {schedule}"
            yield name, mutation.program, lambda m=mutation, s=schedule: _fault(m, s)
    from . import calls

    if everything:
        import gate

        for case in gate.cases():
            if case.architecture in (80, 90):
                yield f"opcodes {case}", "", lambda c=case: machine.program(gate.compile_case(c).asm["ptx"])
    for call in calls.calls(everything):
        yield f"calls {call}", "", lambda c=call: calls.run(c)


def _sample(program: str, schedule: Schedule) -> None:
    text, run = checks.runner(program)
    assert run(text, schedule), "the numbers are wrong"


def _fault(mutation, schedule: Schedule) -> None:
    kind, words = checks.outcome(mutation, schedule)
    assert kind in mutation.expected(schedule.name).split("|"), f"noticed by {kind}: {words}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="everything, not a part")
    parser.add_argument("--only", default="", metavar="REGEX", help="lines that match")
    parser.add_argument("--counts", action="store_true", help="count what tiles cost, in place of the checks")
    options = parser.parse_args()
    if options.counts:
        from . import counts

        print(counts.table())
        return 0
    ran, red = 0, []
    for name, program, function in lines(options.all):
        if not re.search(options.only, name):
            continue
        if reason := checks.why_not(program):
            print("--  ", name, reason)
            continue
        began = time.monotonic()
        try:
            function()
            said = "ok  "
        except Exception as error:
            said = "RED "
            red.append(f"{name}\n{type(error).__name__}: {error}")
        ran += 1
        print(said, name, f"{time.monotonic() - began:.1f} s", flush=True)
    print(f"{ran} lines", *(red or ["the machine is green" if ran else "nothing matches"]), sep="\n")
    return 1 if red or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
