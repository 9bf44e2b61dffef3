"""The benchmark: it refuses to time what is wrong, counts what was executed, and keeps what it measured."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import contrastive_ext
from bench import baselines, digits, flops, gate, losses, plots, report, timing
from bench.__main__ import main
from bench.case import Case
from bench.device import Device
from bench.frontier import frontier
from bench.harness import Harness
from bench.memory import HostMemory
from bench.methods import CHUNKED, EAGER, Method, backends_for, methods_for
from bench.results import OK, OUT_OF_MEMORY, RED, Results, Row
from bench.smoke import smoke
from contrastive_ext.backends.torch import row_stats as torch_blocks
from contrastive_ext.backends.triton import launch as triton_launch
from contrastive_ext.problem.pairs import Pairs
from contrastive_ext.problem.problem import Problem, Upstream
from repository import ROOT

CPU = Device("cpu")
RESULTS = ROOT / "bench" / "results"
SMALL = Case("fused_infonce_loss", "two_view", 70, 70, 32)


def a_method(name, row_losses, **options):
    return Method(name, row_losses, lambda case, inputs: row_losses(case, inputs).mean(), **options)


def slightly_wrong_gradient(case, inputs):
    return baselines.eager(case, replace(inputs, z1=inputs.z1 + 1e-5 * (inputs.z1 - inputs.z1.detach())))


def not_a_number(case, inputs):
    return baselines.eager(case, inputs) * torch.nan


@pytest.mark.parametrize("row_losses", [slightly_wrong_gradient, not_a_number])
def test_red_gate_prints_no_speed(row_losses):
    wrong = a_method("wrong", row_losses, is_ours=True)
    rows = {row.backend: row for row in Harness(CPU, None, 0.0).run(SMALL, [wrong, EAGER])}

    assert rows["eager"].status == OK and rows["eager"].forward_ms > 0
    assert rows["wrong"].status == RED and rows["wrong"].gate > 1
    assert rows["wrong"].forward_ms is rows["wrong"].backward_ms is rows["wrong"].total_quartiles_ms is None
    results = Results({"available_memory_gib": 1.0}, rows=list(rows.values()))
    assert not results.is_green
    assert "red gate" in report.group(results.rows) and " ms" not in report.group(results.rows[:1])
    assert "RED, beyond the tolerance: infonce two_view" in report.closing(results, [], [])


def test_wrong_result_fails_smoke(capsys):
    wrong = a_method("wrong", slightly_wrong_gradient, is_ours=True)
    assert smoke(CPU, [SMALL], more=[wrong]) == 1
    assert "RED infonce" in capsys.readouterr().out


def test_smoke_passes_on_the_cpu(capsys):
    assert main(["smoke", "--device", "cpu"]) == 0
    assert "RED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "loss, layout", [(name, layout) for name, row in losses.LOSSES.items() for layout in row.layouts]
)
@pytest.mark.parametrize("row_losses", [baselines.eager, baselines.chunked], ids=["eager", "chunked"])
def test_baselines_compute_what_the_reference_computes(loss, layout, row_losses, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK_ELEMENTS", 300)  # several blocks, the last one ragged
    case = Case(loss, layout, 34, 34 if layout in ("two_view", "symmetric") else 50, 16, "float64", 0.3)
    inputs = losses.inputs_of(case, CPU.torch)
    got = row_losses(case, inputs)
    wanted = losses.fused(case, inputs, "reference", "none")
    upstream = torch.randn_like(wanted)
    leaves = inputs.leaves

    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
    )


def test_every_public_loss_has_a_bench_row():
    public = {n for n in contrastive_ext.__all__ if n.startswith("fused_") and n.endswith("_loss")} - {"fused_row_loss"}
    assert set(losses.LOSSES) == public


@pytest.mark.parametrize(
    ("method", "layout", "forward", "backward"),
    [
        ("eager", "two_view", 2, 4),
        ("chunked", "two_view", 2, 6),
        ("torch", "two_view", 1, 3),
        ("triton", "two_view", 1, 4),
        ("triton", "symmetric", 2, 8),
        ("cpu", "queue", 4, 0),
        ("chunked", "soft_targets", 4, 6),
        ("a library not in the table", "symmetric", 2, 4),
    ],
)
def test_flops_are_counted_as_executed(method, layout, forward, backward):
    case = Case("fused_infonce_loss", layout, 10, 10, 4)
    assert flops.executed_flops(method, case) == (forward * 400, backward * 400)


def test_two_sets_of_many_features_share_their_weights():
    case = Case("fused_infonce_loss", "symmetric", 1, 1, flops.STORED_FROM)
    assert flops.executed_flops("triton", case) == (2 * case.dim, 6 * case.dim)
    configs = pytest.importorskip("contrastive_ext.triton_kernels.configs", reason="Triton is not installed.")
    assert flops.STORED_FROM == configs.RESIDENT_FEATURES + 1


def test_flops_of_one_set_follow_its_layout(monkeypatch):
    """A batch that does not occupy the GPU is no triangle; blocks of stored weights on the diagonal are whole."""
    pytest.importorskip("triton", reason="Triton is not installed.")
    monkeypatch.setattr(triton_launch, "architecture", lambda device: 90)

    def per_element(n, dim):
        case = Case("fused_infonce_loss", "two_view", n, n, dim, "bfloat16")
        return tuple(flops / (n * n * dim) for flops in flops.executed_flops("triton", case, 132))

    assert per_element(4096, 128) == (2, 4)
    assert per_element(32768, 128) == (1, 4)
    assert per_element(32768, 768) == (1, 3 + 1 / 3)


def test_triangle_flops_are_what_the_torch_backend_multiplies(monkeypatch):
    monkeypatch.setitem(torch_blocks.TILE, "cpu", 128)
    case = Case("fused_infonce_loss", "two_view", 1024, 1024, 64)
    u = F.normalize(torch.randn(case.n, case.dim), dim=1)
    pairs = Pairs(case.n, case.n, num_images=case.n // 2)
    problem = Problem(u, None, 10.0, (1.0,), pairs, unit=True, operand_dtype=u.dtype)
    # torch does not count the in-place form by itself
    counted = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=counted) as forward:
        stats = torch_blocks.forward(problem, columns=False, means=False, diagnostics=False, maximum=False)
    with FlopCounterMode(display=False, custom_mapping=counted) as backward:
        torch_blocks.backward(problem, Upstream(stats.lse, torch.ones_like(stats.lse), None, None, True, False))

    wanted = flops.executed_flops("torch", case)
    # with 8 x 8 tiles those on the diagonal, multiplied whole, are 1/8 more in the forward
    assert forward.get_total_flops() == pytest.approx(wanted[0] * 9 / 8)
    assert backward.get_total_flops() == pytest.approx(wanted[1], rel=0.05)


def test_results_file_round_trips(tmp_path):
    row = Row(
        "fused_infonce_loss", "cpu", True, "two_view", 70, 70, 32, "float32", 0.1, ratios={"eager": [1.0, 2.0, 3.0]}
    )
    results = Results(
        {"device": "d", "torch": torch.__version__}, {"float32": 0.1}, [{"agrees": True}], [row], True, 1.5
    )
    path = tmp_path / "new" / "d.json"
    results.write(path)

    assert Results.read(path) == results
    content = json.loads(path.read_text())
    assert content["device"] == "d" and content["rows"][0]["forward_gemm_share"] is None


def test_run_writes_table_picture_and_file(tmp_path, capsys):
    assert main(["--quick", "--only", "infonce two_view 1024", "--out", str(tmp_path)]) == 0

    (path,) = tmp_path.glob("cpu-*.json")
    content = json.loads(path.read_text())
    for key in ("device", "driver", "torch", "triton", "cuda", "commit", "num_threads", "cpu", "gemm_tflops", "rows"):
        assert key in content
    rows = {row["backend"]: row for row in content["rows"]}
    ours = next(row for row in rows.values() if row["is_ours"])
    assert {"eager", "chunked"} <= set(rows) and {"eager", "chunked"} <= set(ours["ratios"])
    assert ours["gate"] <= 1 and ours["forward_gemm_share"] > 0 and content["left_out"] == []
    assert 0 < rows["eager"]["peak_extra_mib"] < 200
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "infonce two_view 1024x128" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cpu-*.json")), ids=lambda p: p.stem)
def test_names_stay_inside_the_picture(path):
    text = pytest.importorskip("matplotlib.text", reason="matplotlib is not installed.")
    figure = plots.picture(Results.read(path))
    figure.draw_without_rendering()
    titles = {axes.get_title(loc="left") for axes in figure.axes}
    names = [
        name for name in figure.findobj(text.Text) if isinstance(name, text.Annotation) or name.get_text() in titles
    ]
    names += [name for axes in figure.axes[2:] for name in axes.get_yticklabels()]
    names += [name for axes in figure.axes[:2] for name in axes.get_legend().get_texts()]
    boxes = [(name.get_text(), name.get_window_extent()) for name in names]
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name
    assert not [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_digits_training_agrees_with_the_reference():
    job = digits.train("fused_debiased_loss", 2, CPU)
    assert job["agrees"] and job["steps"] == 2
    assert set(job["of_tolerance"]) == set(contrastive_ext.available_backends()) - {"reference"}
    assert 0 < job["probe_before"][0] < 1


def test_digits_notice_a_wrong_gradient(monkeypatch):
    right = contrastive_ext.fused_infonce_loss

    def wrong(z1, z2, *args, backend="auto", **options):
        z1 = z1 if backend == "reference" else z1 + 1e-4 * (z1 - z1.detach())
        return right(z1, z2, *args, backend=backend, **options)

    row = replace(losses.LOSSES["fused_infonce_loss"], function=wrong)
    monkeypatch.setitem(losses.LOSSES, "fused_infonce_loss", row)
    assert not digits.train("fused_infonce_loss", 1, CPU)["agrees"]


def test_what_would_not_fit_is_marked_and_not_tried(monkeypatch):
    def never(case, inputs):
        raise AssertionError("a case that does not fit was run")

    monkeypatch.setattr(CPU, "available_bytes", lambda: 10_000)
    (row,) = Harness(CPU, None, 0.0).run(SMALL, [replace(EAGER, row_losses=never, mean_loss=never)])
    assert row.status == OUT_OF_MEMORY and row.forward_ms is None


def test_what_runs_out_of_memory_is_marked_and_other_errors_are_not():
    def greedy(case, inputs):
        return torch.empty(2**50)

    def broken(case, inputs):
        raise RuntimeError("shapes do not match")

    (row,) = Harness(CPU, None, 0.0).run(SMALL, [replace(EAGER, row_losses=greedy, mean_loss=greedy)])
    assert row.status == OUT_OF_MEMORY and row.forward_ms is None
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Harness(CPU, None, 0.0).run(SMALL, [replace(EAGER, row_losses=broken, mean_loss=broken)])


def test_host_memory_sees_the_matrix_and_only_that_of_the_call():
    case = replace(SMALL, n=2048, m=2048)
    matrix = 4 * 2048**2 / 2**20
    with HostMemory() as host_memory:
        first, again = (host_memory.peak_mib(EAGER, case) for _ in range(2))
    assert 2 * matrix < first < 6 * matrix
    assert again == pytest.approx(first, rel=0.3)  # memory freed by the first call does not hide the second's


def test_frontier_grows_with_the_square_where_the_matrix_is_kept_and_ends_at_a_minute():
    def row(backend, is_ours, ms):
        return Row(
            "fused_infonce_loss", backend, is_ours, "two_view", 1000, 1000, 128, "float32", 0.1,
            peak_extra_mib=1.0, total_quartiles_ms=[ms] * 3,
        )  # fmt: skip

    rows = [row("eager", False, 1.0), row("cpu", True, 1.0), row("torch", True, 60.0)]
    limits = {x.backend: (x.largest_n, x.bound) for x in frontier(rows, 100 * 2**20)}
    assert limits == {"eager": (10_000, "memory"), "cpu": (100_000, "memory"), "torch": (31_622, "a minute")}


def test_rounds_interleave_methods_and_rotate_inputs():
    order = []

    def call(name):
        def loss(inputs):
            order.append((name, id(inputs)))
            return (inputs.z1 * inputs.z2).sum()

        return loss

    inputs = timing.rotation(CPU, lambda seed: losses.inputs_of(SMALL, CPU.torch, seed), most=3)
    timings = timing.interleave(
        CPU, {"a": call("a"), "b": call("b")}, inputs, seconds=0.0, least=timing.LEAST_ROUNDS["cpu"]
    )
    assert len(timings["a"].forward) == len(timings["b"].backward) == timing.LEAST_ROUNDS["cpu"]
    names = [name for name, _ in order]
    assert names[:6] == ["b", "a", "a", "b", "b", "a"]  # the first round, uncounted, warms up
    assert len({i for _, i in order}) == 3


def test_methods_are_the_backends_and_the_baselines():
    names = [method.name for method in methods_for(SMALL, CPU)]
    assert names[: len(backends_for(SMALL, CPU))] == [
        n for n in contrastive_ext.available_backends() if n != "reference"
    ]
    assert {EAGER.name, CHUNKED.name} <= set(names)


def test_gate_is_derived_from_the_dense_formula():
    inputs = losses.inputs_of(SMALL, CPU.torch)
    truth = gate.truth_of(SMALL, inputs)
    dense_in_float32 = a_method("dense", baselines.eager, is_ours=True)
    assert (
        0 < gate.error_ratio(dense_in_float32, SMALL, inputs, truth) <= 0.6
    )  # about half: the tolerance is twice its error
