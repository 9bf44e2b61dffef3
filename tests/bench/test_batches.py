"""`python -m bench batches` at sizes that take seconds."""

from __future__ import annotations

import json

import pytest

import bench.__main__ as command
from bench import batches


def test_every_method_is_measured_and_written(tmp_path, capsys):
    assert command.main(["batches", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "batches.json").read_text())["rows"]
    expected = [("gradient cache", method, 1) for method in ("plain", "cached")]
    expected += [("ring", method, ranks) for ranks in batches.QUICK.ranks for method in ("gather", "ring")]
    assert [(row["name"], row["method"], row["ranks"]) for row in rows] == expected
    assert all(row["milliseconds"] > 0 and row["loss"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert shown.count(" ms ") == len(rows) and max(map(len, shown.splitlines()[:-1])) <= 80


def _disagreeing(sizes, rank):
    return {"one": lambda: 1.0, "other": lambda: 1.1}


def test_methods_that_disagree_are_not_reported():
    with pytest.raises(RuntimeError, match=r"ring, other on 1 ranks: loss 1\.1, one 1\.0"):
        batches._compared("ring", _disagreeing, batches.QUICK, 1)
