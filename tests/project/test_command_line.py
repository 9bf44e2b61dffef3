"""What `python -m contrastive_ext` shows in a terminal of 80 and of 120 columns, held to captures in tests/captures.

A change that is meant: `CAPTURE=1 pytest tests/project/test_command_line.py` writes them again; look at them first.
"""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch

import contrastive_ext
from contrastive_ext import __main__ as command
from contrastive_ext.backends import native
from contrastive_ext.diagnostics.explain import Explanation
from contrastive_ext.theory import report
from repository import ROOT

CAPTURES = ROOT / "tests" / "captures"
COMMANDS = {
    "help": [],
    "negatives": ["negatives", "--classes", "1000"],
    "doctor": ["doctor"],
}


@pytest.fixture
def machine(monkeypatch):
    """A machine without a GPU and without the native library; versions that never change."""
    missing = f"native kernels are not built; for them: {native.HOW_TO_BUILD}"
    reasons = {
        "cuda": "it computes on NVIDIA Hopper GPUs and the tensors are on cpu.",
        "triton": "it computes on GPUs and the tensors are on cpu (TRITON_INTERPRET is not 1).",
        "cpu": missing,
        "torch": None,
        "reference": None,
    }
    monkeypatch.setattr(command.native, "library", lambda: None)
    monkeypatch.setattr(command.native, "why_missing", lambda: missing)
    monkeypatch.setattr(command.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(command, "_version", lambda package: "9.9.9")
    monkeypatch.setattr(command, "explain_for", lambda *call: Explanation("torch", reasons))
    monkeypatch.setattr(command.platform, "python_version", lambda: "9.9.9")
    monkeypatch.setattr(command, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "estimate_memory", partial(contrastive_ext.estimate_memory, backend="torch"))


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_terminal_shows(name, columns, machine, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    command.main(COMMANDS[name])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    file = CAPTURES / f"{name}-{columns}.txt"
    if os.environ.get("CAPTURE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown)
    assert shown == file.read_text()


def test_of_this_machine_every_line_fits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    command.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines), "only a path may be longer"


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"contrastive_ext {contrastive_ext.__version__}\n"


def test_a_command_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["negative"])
    assert end.value.code == 2 and "doctor" in capsys.readouterr().err


def test_doctor_as_json_says_the_same(machine, capsys):
    command.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == "9.9.9" and found["gpu"] is None and found["native_build"] is None
    assert found["native_missing"].startswith("native kernels are not built")
    explanation = found["backends"]["cpu, float32"]
    assert explanation["chosen"] == "torch" and explanation["reasons"]["torch"] is None
    assert any(file.endswith("nvidia-h200-proof.jsonl") for file in found["verified"].values())


def test_doctor_as_json_of_this_machine(capsys):
    command.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["native_build"] is None) == (found["native_missing"] is not None)
    assert found["contrastive_ext"] == contrastive_ext.__version__
