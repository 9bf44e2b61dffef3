"""What measurements are held against: an older results file, floors, baselines of the same precision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import floors, methods, report
from bench.__main__ import main
from bench.case import Case
from bench.device import Device
from bench.results import Results, Row

CPU = Device("cpu")
CASE = Case("fused_infonce_loss", "two_view", 1000, 1000, 64, "bfloat16")


def _row(backend: str, ms: float | None, is_ours: bool = True, n: int = 64) -> Row:
    quartiles = None if ms is None else [ms, ms, ms]
    return Row(
        "fused_infonce_loss", backend, is_ours, "two_view", n, n, 8, "float32", 0.1, total_quartiles_ms=quartiles
    )


def test_a_comparison_says_what_became_faster_and_slower(tmp_path, capsys):
    before = Results(
        {"commit": "abc", "device": "here"}, rows=[_row("cpu", 3.0), _row("torch", 4.0), _row("cpu", 1.0, n=8)]
    )
    now = Results(
        {}, rows=[_row("cpu", 2.0), _row("torch", 40.0), _row("eager", 1.0, is_ours=False), _row("cpu", None, n=8)]
    )
    head, *lines = report.comparison(now, before).splitlines()
    assert "abc on here" in head
    assert [line.split(", ")[1:] for line in lines] == [
        ["torch: 4 -> 40 ms", "0.10x"], ["cpu: 3 -> 2 ms", "1.50x"]
    ]  # fmt: skip
    assert "Nothing" in report.comparison(Results({}), before)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    before.write(old)
    now.write(new)
    with pytest.raises(SystemExit):
        main(["show", str(new), "--against", str(tmp_path / "none.json")])
    assert "--against" in capsys.readouterr().err


def test_results_of_before_floors_are_still_read(tmp_path):
    path = tmp_path / "old.json"
    Results({}, rows=[_row("cpu", 1.0)]).write(path)
    text = path.read_text()
    for name in ("exp_floor_ms", "memory_floor_ms"):
        text = text.replace(f'"{name}": null', '"ratios": {}')
    path.write_text(text)
    assert Results.read(path).rows[0].memory_floor_ms is None


@pytest.mark.parametrize(
    "loss, layout, dim, method, forward, backward",
    [
        ("infonce", "two_view", 64, "triton", 0.5, 1.0),  # a triangle, then all rows
        ("infonce", "two_view", 512, "triton", 0.5, 0.5),  # weights of one set serve both sides
        ("infonce", "symmetric", 64, "triton", 1.0, 2.0),  # a sweep for each side
        ("infonce", "symmetric", 512, "triton", 1.0, 1.0),
        ("hard_negative", "two_view", 64, "triton", 0.5, 1.0),  # beta = 1: the second is the first one's square
        ("infonce", "two_view", 64, "cuda", 1.0, 1.0),
    ],
)
def test_exponentials_are_counted_as_executed(loss, layout, dim, method, forward, backward):
    case = replace(CASE, loss=f"fused_{loss}_loss", layout=layout, dim=dim)
    assert floors.exponentials(method, case) == pytest.approx((forward * 1e6, backward * 1e6))


def test_floors_of_this_machine():
    exponentials, memory = floors.floors("cpu", CASE, CPU)
    assert exponentials is None and 0 < memory < 10
    assert floors.exponentials("cpu", replace(CASE, loss="fused_bayesian_loss")) is None


def test_sixteen_bits_are_compared_with_sixteen_bits():
    gpu = Device("cuda")
    assert methods.compiled_for(CASE, gpu) == [methods.COMPILED, methods.COMPILED_AUTOCAST]
    assert methods.compiled_for(replace(CASE, dtype="float32"), gpu) == [methods.COMPILED]


def test_a_peer_that_needs_a_gpu_is_left_out_without_one(monkeypatch):
    monkeypatch.setattr(methods.baselines.importlib.util, "find_spec", lambda name: object())  # everything is installed
    case = Case("fused_sigmoid_loss", "binary", 64, 64, 8, "float32", peers=True)
    assert "siglip-kernel" not in [method.name for method in methods.methods_for(case, CPU)]
    assert methods.baselines.THIRD_PARTIES["siglip-kernel"].computes(case, on_gpu=True)
