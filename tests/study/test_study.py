"""The study at tiny size: every loss trains, equal seeds are compared, tables and pictures go to the site's marks."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from repository import ROOT
from study import docstrings, one, questions, results, views
from study.__main__ import main

FEW = 1  # steps


def one_of_each(data: str) -> dict[str, questions.Run]:
    """A run of every loss and way of alpha."""
    found = {}
    for run in questions.runs(1, FEW):
        if run.data == data:
            found.setdefault(f"{run.loss} {run.keywords.get('alpha')} {run.keywords.get('mode')}", run)
    return {name: dataclasses.replace(run, batch=16) for name, run in found.items()}


@pytest.mark.parametrize("name", one_of_each(questions.DIGITS))
def test_every_loss_trains_on_digits(name):
    _, metrics, seconds = one.train(one_of_each(questions.DIGITS)[name])
    assert all(10 < metrics[x] < 100 for x in ("score", "five_shot", "choice")) and seconds > 0


@pytest.fixture
def few_pairs(monkeypatch):
    """60 pairs, one docstring in ten twice, and made-up features."""
    texts = [f"text {i}" for i in range(60)]
    ids = torch.arange(60) % 54
    corpus = docstrings.Corpus(texts, texts, ids)
    common = torch.randn(60, 8)
    features = tuple(common + 0.1 * torch.randn(60, 8) for _ in range(2))
    monkeypatch.setattr(docstrings, "mined", lambda: corpus)
    monkeypatch.setattr(docstrings, "frozen_features", lambda: features)


@pytest.mark.usefixtures("few_pairs")
@pytest.mark.parametrize("name", one_of_each(questions.HEADS))
def test_every_loss_trains_heads(name):
    _, metrics, _ = one.train(one_of_each(questions.HEADS)[name])
    assert all(0 < metrics[x] <= 100 for x in ("score", "choice"))


def test_docstrings_of_the_standard_library_have_false_negatives():
    corpus = docstrings.mined()
    copies = torch.bincount(corpus.ids)[corpus.ids]
    assert len(corpus.ids) > 3000 and 0.03 < float((copies > 1).double().mean()) < 0.3
    assert len(corpus.docstrings) == len(corpus.codes) == len(corpus.ids)


def test_every_run_of_a_question_has_the_same_budget():
    for question in views.QUESTIONS:
        runs = [run for run in questions.runs(2) if run.question == question]
        assert runs and len({run.steps for run in runs}) == 1
        by_x = {}
        for run in runs:
            by_x.setdefault(run.x if question in ("batch", "coverage") else None, set()).add(run.batch)
        assert all(len(batches) == 1 for batches in by_x.values())
        seeds = {run.key: {other.seed for other in runs if other.key == run.key} for run in runs}
        assert len(set(map(frozenset, seeds.values()))) == 1
    assert {run.question for run in questions.runs(1)} == set(views.QUESTIONS)


def row(label: str, seed: int, score: float, temperature: float = 0.1, choice: float = 50.0) -> dict:
    """A record of the results file."""
    run = questions.Run("losses", label, "infonce", temperature, seed)
    return dataclasses.asdict(run) | {"score": score, "five_shot": score, "choice": choice, "seconds": 1.0}


def test_temperatures_are_chosen_on_other_labels_and_differences_paired():
    rows = [row("InfoNCE", seed, 60 + 10 * seed) for seed in range(3)]
    rows += [row("InfoNCE", seed, 99, temperature=0.5, choice=40) for seed in range(3)]  # better, and not chosen
    rows += [row("debiased", seed, 62 + 10 * seed + 0.1 * seed) for seed in range(3)]
    rows += [row("decoupled", seed, 60 + 10 * seed + (-1) ** seed) for seed in range(3)]
    found = results.Results({}, rows).of("losses")
    assert results.mean(found["InfoNCE", None]) == results.Mean(70, 10, 3)
    by, error = results.difference(found["debiased", None], found["InfoNCE", None])
    assert by == pytest.approx(2.1) and error == pytest.approx(0.1 / 3**0.5)
    assert results.verdict(found["debiased", None], found["InfoNCE", None]) == "+2.1 ± 0.1"
    assert results.verdict(found["decoupled", None], found["InfoNCE", None]).startswith("no difference")


def test_a_rerun_outside_the_spread_is_named():
    old = results.Results({}, [row("InfoNCE", seed, 60 + seed) for seed in range(4)])
    near = results.Results({}, [row("InfoNCE", seed, 60.5 + seed) for seed in range(4)])
    far = results.Results({}, [row("InfoNCE", seed, 70 + seed) for seed in range(4)])
    assert results.departures(near, old) == []
    assert len(results.departures(far, old)) == 1


def test_a_run_from_the_command_line_fills_the_site(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", pytest.importorskip("matplotlib"))
    site, out = tmp_path / "docs", tmp_path / "study.json"
    site.mkdir()
    (site / "study.md").write_text("a\n<!-- study soft -->\nold\n<!-- end of study soft -->\nb\n")
    arguments = ["--seeds", "2", "--steps", "1", "--only", "soft", "--jobs", "1", "--out", str(out)]
    assert main([*arguments, "--site", str(site)]) == 0
    assert "6 runs in" in capsys.readouterr().out
    page = (site / "study.md").read_text()
    assert page.startswith("a\n<!--") and page.endswith("-->\nb\n") and "old" not in page
    assert page.count("| MoCo") == 3 and " ± " in page and "(pictures/study-soft.png)" in page
    assert (site / "pictures" / "study-soft.png").stat().st_size > 5_000
    read = results.Results.read(out)
    assert len(read.rows) == 6 and read.facts["seeds"] == 2
    assert main(["show", str(out), "--site", str(site)]) == 0

    kept = [*read.rows[:2], read.rows[3] | {"seed": 7}]  # as an interrupted run left them, and one of another seed
    results.Results(read.facts, kept).write(out)
    assert main([*arguments, "--resume"]) == 0
    assert "[6/6, " in capsys.readouterr().out
    again = results.Results.read(out).rows
    assert again[:3] == kept and len(again) == 7
    of_a_seed = {(row["label"], row["seed"]): row["score"] for row in again}
    assert all(of_a_seed[row["label"], row["seed"]] == row["score"] for row in read.rows)


def test_the_page_has_a_place_for_every_question():
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for question in views.QUESTIONS:
        assert f"<!-- study {question} -->\n" in page and f"<!-- end of study {question} -->" in page
