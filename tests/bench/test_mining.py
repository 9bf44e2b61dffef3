"""`python -m bench mining` at a size that takes seconds."""

from __future__ import annotations

import json

import pytest
import torch

import bench.__main__ as command
import contrastive_ext as ce
from bench import mining


def test_every_method_is_measured_and_written(tmp_path, capsys):
    assert command.main(["mining", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "mining.json").read_text())["rows"]
    names = [name for name in ("cpu", "torch") if name in ce.available_backends()]
    assert [row["method"] for row in rows] == [*names, "matmul + topk"]
    assert all(row["core_seconds"] > 0 and row["columns"] == mining.QUICK[0].columns for row in rows)
    shown = capsys.readouterr().out
    assert shown.count(" core s ") == len(rows) and max(map(len, shown.splitlines()[:-1])) <= 80


def test_blocks_of_queries_find_what_the_whole_matrix_holds(monkeypatch):
    queries, columns = torch.randn(7, 4), torch.randn(30, 4)
    expected = (queries @ columns.T).topk(mining.BEST).indices
    monkeypatch.setattr(mining, "SCORES", 90)  # three queries at a time
    assert torch.equal(mining.chunked(queries, columns), expected)
    assert torch.equal(mining.ours(queries, columns, "torch"), expected)


def test_methods_that_disagree_are_not_reported():
    with pytest.raises(RuntimeError, match=r"one finds other columns than two for 50\.00% of the queries"):
        mining._check_agreement("one", torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [3, 2]]), "two")
