"""`python -m contrastive_ext negatives` and `python -m bench negatives`: what they print, draw, write and refuse."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from bench import negatives
from bench.__main__ import main as bench
from contrastive_ext import estimate_memory
from contrastive_ext.__main__ import main
from contrastive_ext.diagnostics.memory import mebibytes
from contrastive_ext.theory import coverage_probability, expected_log_collisions, num_negatives_for


def printed_rows(text: str) -> dict[str, list[str]]:
    """Rows of the table by batch size."""
    lines = [line.split() for line in text.splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[:2] == ["B", "2"])
    return {cells[0]: cells for cells in lines[start + 1 :] if len(cells) == 8 and cells[0].replace(",", "").isdigit()}


def test_table_holds_what_the_functions_return(capsys):
    main(["negatives", "--classes", "100", "--batch-sizes", "128", "1024", "--dim", "64"])
    text = capsys.readouterr().out
    rows = printed_rows(text)
    assert list(rows) == ["128", "1,024"]
    _, negatives_, coverage, collision, log_collisions, false_negatives, dense, fused = rows["1,024"]
    assert negatives_ == "2,046" and collision == "1" and false_negatives == "20.5"
    assert float(coverage) == pytest.approx(float(coverage_probability(1024, num_classes=100)), rel=1e-3)
    assert float(log_collisions) == pytest.approx(float(expected_log_collisions(1023, torch.ones(100))), abs=1e-3)
    memory = estimate_memory(1024, 64)
    assert [dense, fused] == [mebibytes(size) for size in (memory.dense, memory.fused)]
    assert "false-negative rate 0.01:" in text and "tau_plus" in text
    assert f"50% from B = {1 + num_negatives_for(0.5, num_classes=100)}" in text


@pytest.mark.parametrize("content", ["a,6\nb,3\n\nc,1\nd,0\n", "class,count\na,6\nb,3\nc,1\nd,0", "6\n3\n1\n0\n"])
def test_counts_are_read_and_absent_classes_left_out(content, tmp_path, capsys):
    path = tmp_path / "counts.csv"
    path.write_text(content)
    main(["negatives", "--counts", str(path)])
    text = capsys.readouterr().out
    assert "3 classes, the largest 6 times the smallest" in text
    assert "1 classes without samples are left out" in text
    assert "false-negative rate 0.46:" in text
    coverage = float(coverage_probability(32, prior=[6, 3, 1]))
    assert float(printed_rows(text)["32"][2]) == pytest.approx(coverage, rel=1e-3)


def test_one_class_has_nothing_to_cover(capsys):
    main(["negatives", "--classes", "1"])
    assert "one class is always covered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,6\nb,many\n", "line 2"), ("", "no class counts"), ("a,-3\nb,2\n", "prior"), ("a,0\n", "no class counts")],
)
def test_bad_counts_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "counts.csv"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit_:
        main(["negatives", "--counts", str(path)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--classes", "0"], ["--classes", "2", "--batch-sizes", "0"], ["--counts", "no such file"]]
)
def test_bad_command_lines_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["negatives", *arguments])
    assert exit_.value.code == 2 and capsys.readouterr().out == ""


def test_picture_is_drawn_or_what_it_needs_is_said(tmp_path, monkeypatch, capsys):
    path = tmp_path / "coverage.png"
    main(["negatives", "--classes", "10", "--plot", str(path)])
    assert path.stat().st_size > 10_000 and str(path) in capsys.readouterr().out

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(SystemExit):
        main(["negatives", "--classes", "10", "--plot", str(path)])
    assert "needs matplotlib" in capsys.readouterr().err


def features_file(path, num_classes=3, seed=0, **arrays):
    """Three views of 60 points in clusters; the labels have a gap."""
    random = np.random.default_rng(seed)
    labels = np.arange(60) % num_classes * 2
    centres = 2 * random.normal(size=(2 * num_classes, 8))
    views = centres[labels] + random.normal(size=(60, 8)) + 0.5 * random.normal(size=(3, 60, 8))
    np.savez(path, **{"views": views.astype(np.float32), "labels": labels} | arrays)
    return path


def test_sweep_of_features_writes_bounds_that_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(negatives, "ANCHORS", 2048)
    path = features_file(tmp_path / "clusters.npz")
    assert bench(["negatives", "--features", str(path), "--temperature", "0.5", "--out", str(tmp_path)]) == 0

    content = json.loads((tmp_path / "negatives-clusters.json").read_text())
    assert content["data"] == "clusters" and content["num_classes"] == 3 and content["temperature"] == 0.5
    assert [row["batch"] for row in content["rows"]] == [4, 8, 16, 32]
    for row in content["rows"]:
        assert row["lower_bound"] <= row["contrastive_loss"] and row["arora_lower_bound"] <= row["contrastive_loss"]
        assert row["supervised_loss"] <= row["upper_bound"]
        standard_error = (0.25 * row["batch"] / 2048) ** 0.5  # of a share of 2048/batch batches, at most
        assert row["coverage"] == pytest.approx(row["expected_coverage"], abs=5 * standard_error)
        assert row["accuracy"] > 0.8
    assert (tmp_path / "negatives-clusters.png").stat().st_size > 10_000
    assert "infonce, B = 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"views": np.zeros((1, 60, 8))}, "V >= 2"),
        ({"views": np.zeros((3, 60, 8), dtype=np.int64)}, "floating-point"),
        ({"labels": np.zeros(59, dtype=np.int64)}, "labels"),
        ({"labels": np.zeros(60)}, "labels"),
    ],
)
def test_bad_features_are_refused(arrays, message, tmp_path, capsys):
    path = features_file(tmp_path / "bad.npz", **arrays)
    assert bench(["negatives", "--features", str(path), "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


def test_file_without_views_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "bad.npz", labels=np.zeros(4, dtype=np.int64))
    assert bench(["negatives", "--features", str(tmp_path / "bad.npz"), "--out", str(tmp_path)]) == 1
    assert "missing: views" in capsys.readouterr().out


def test_sweep_on_digits_trains_with_every_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "ANCHORS", 512)
    monkeypatch.setattr(negatives, "BATCH_SIZES", (8, 64))
    assert bench(["negatives", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "negatives-digits.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == negatives.PAIR_LOSSES and {row["batch"] for row in rows} == {64}
    assert all(row["accuracy"] > 0.2 and row["supervised_loss"] < row["upper_bound"] for row in rows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1\n" + "2" * 131_073 + "\n", "line 2: this is no CSV of class counts"),
        ("1e-320\n1\n", "at least 1e-300 of the sum"),
        ("1\n" + "x" * 1000 + "\n", "line 2: expected a class count"),
        ("1\nnan\n", "finite"),
        ("1\n-1\n", "non-negative"),
    ],
)
def test_counts_that_are_none_end_in_a_sentence(text, says, tmp_path, capsys):
    path = tmp_path / "counts.csv"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["negatives", "--counts", str(path)])
    error = capsys.readouterr().err
    assert says in error and len(error) < 1000


@pytest.mark.parametrize("options", [["--classes", str(10**30)], ["--classes", "5", "--batch-sizes", str(10**19)]])
def test_numbers_beyond_reason_end_in_a_sentence(options, capsys):
    with pytest.raises(SystemExit):
        main(["negatives", *options])
    assert "error: " in capsys.readouterr().err


def test_counts_near_the_largest_number_are_counts(tmp_path, capsys):
    path = tmp_path / "counts.csv"
    path.write_text("1e308\n1e308\n")
    main(["negatives", "--counts", str(path)])
    assert "2 classes, equally frequent; 3.0 draws" in capsys.readouterr().out
