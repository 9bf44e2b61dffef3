"""Launches as Triton's own launcher makes them, over a driver that writes them down; replays byte for byte."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or shutil.which(os.environ.get("CC", "cc")) is None
    or torch.cuda.is_available(),
    reason="needs Triton, a C compiler, and no driver of a GPU beside that of the test",
)
# kinds of call that are replayed, of forward and backward
REPLAYED = {
    "descriptors, a learned scale": 2,
    "two exponents, symmetric": 2,
    "pointers, float32": 2,
    "more columns": 2,
    "two sizes in turn": 4,
    "a queue and ids": 2,  # of its unit rows
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    script = Path(__file__).with_name("driver.py")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("driver"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def differs(mine: list, other: list) -> str:
    """How launches differ, addresses aside, or that one address of `mine` stands for two of the other's."""
    if [launch[:3] for launch in mine] != [launch[:3] for launch in other]:
        return f"{mine} for {other}"
    known: dict[int, int] = {}
    for (kernel, *_, addresses), (*_, others) in zip(mine, other, strict=True):
        if any(known.setdefault(a, b) != b for a, b in zip(addresses, others, strict=True)):
            return f"{kernel} has addresses {addresses} for {others}, earlier ones were {known}"
    return ""


@pytest.mark.parametrize("name", REPLAYED)
def test_every_call_launches_the_same_whether_worked_out_watched_or_replayed(calls, name):
    """Of memory: a replay holds everything to its end, each of its addresses is one of the worked out call."""
    assert calls[name]["replayed"] == REPLAYED[name]
    steps = calls[name]["steps"]
    sizes = 2 if name == "two sizes in turn" else 1
    for forward, backward in steps:
        assert forward and any(kernel == "row_stats_backward_kernel" for kernel, *_ in backward)
    for i, others in enumerate(steps):
        for mine, other in zip(steps[-sizes + i % sizes], others, strict=True):
            if name == "a queue and ids":  # what is freed between launches may be given to the next ones, or not
                assert [launch[:3] for launch in mine] == [launch[:3] for launch in other]
            else:
                assert differs(mine, other) == ""
