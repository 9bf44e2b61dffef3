"""Which backend runs, why, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.backends import dispatch
from contrastive_ext.numerics import SPLIT_PRODUCTS
from repository import ROOT

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture
def table(monkeypatch):
    """A made-up table: a `cuda` and a `triton` entry before the real ones, pretending the CPU is their device."""
    plain = dispatch.BACKENDS[-1]
    fast = replace(plain, name="cuda", needs_proof=True)
    portable = replace(plain, name="triton", needs_proof=True)
    monkeypatch.setattr(dispatch, "BACKENDS", (fast, portable, plain))
    monkeypatch.setattr(dispatch, "VERIFIED", {})
    return dispatch


def test_verified_kernels_come_first(table, monkeypatch):
    monkeypatch.setitem(table.VERIFIED, ("cuda", "cpu", F32), "x.json")
    assert table.select("auto", CPU, F32, F32, 8).name == "cuda"


def test_unproven_cuda_is_never_automatic(table, recwarn):
    table.VERIFIED[("triton", "cpu", F32)] = "x.json"
    assert table.select("auto", CPU, F32, F32, 8).name == "triton"
    assert table.select("cuda", CPU, F32, F32, 8).name == "cuda"  # by name it runs
    assert not recwarn.list


def test_unproven_triton_is_taken_before_plain_pytorch_and_says_so_once(table):
    """Also where unproven CUDA kernels stand before it."""
    with pytest.warns(UserWarning, match="triton kernels have not been verified on cpu"):
        assert table.select("auto", CPU, F32, F32, 8).name == "triton"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.select("auto", CPU, F32, F32, 8)


def test_named_backend_raises_with_its_reason(monkeypatch):
    broken = replace(dispatch.BACKENDS[-1], name="cuda", why_not=lambda *_: "no such device.")
    monkeypatch.setattr(dispatch, "BACKENDS", (broken, *dispatch.BACKENDS))
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="'cuda' cannot run this call: no such device"):
        ce.fused_infonce_loss(z, z, backend="cuda")
    assert ce.fused_infonce_loss(z, z).isfinite()


def test_unknown_backend_lists_the_known_ones():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"auto, .*torch, reference"):
        ce.fused_infonce_loss(z, z, backend="gpu")


def test_explain_names_the_choice_and_every_reason():
    explanation = ce.explain(torch.randn(4, 3), torch.randn(4, 3))
    assert explanation.chosen in ce.available_backends()
    assert list(explanation.reasons) == dispatch.backend_names()[1:]
    assert explanation.reasons[explanation.chosen] is None
    assert f"takes {explanation.chosen!r}" in str(explanation)
    with pytest.raises(TypeError, match="share dtype"):
        ce.explain(torch.randn(4, 3), torch.randn(4, 3).double())
    with pytest.raises(TypeError, match="int64"):
        ce.explain(torch.ones(4, 3, dtype=torch.int64))


def test_available_backends_run():
    z = torch.randn(5, 3)
    values = [ce.fused_debiased_loss(z, z.flip(0), backend=name) for name in ce.available_backends()]
    assert ce.available_backends()[-1] == "reference"
    for value in values:
        torch.testing.assert_close(value, values[-1])


def test_verified_entries_name_files_that_exist():
    for (backend, architecture, dtype), file in dispatch.VERIFIED.items():
        assert backend in dispatch.backend_names()
        assert architecture.startswith(("sm_", "gfx", "cpu"))
        assert isinstance(dtype, torch.dtype) or dtype in SPLIT_PRODUCTS
        assert (ROOT / "bench" / "results" / file).is_file(), file


def test_a_backend_that_lacks_calls_is_not_automatic():
    """`auto` asks why_not alone: what raises later must not be listed as verified."""
    from contrastive_ext.backends import cuda

    assert cuda.IS_COMPLETE or not any(backend == cuda.NAME for backend, _, _ in dispatch.VERIFIED)


def test_doctor_reports():
    done = subprocess.run(
        [sys.executable, "-m", "contrastive_ext", "doctor"], capture_output=True, text=True, check=True
    )
    for word in ("contrastive_ext", "torch", "native library", "backend='auto' takes", "verified on hardware"):
        assert word in done.stdout


def test_import_of_a_function_as_a_module():
    program = (
        "import torch, contrastive_ext.fused_debiased_loss\n"
        "z = torch.randn(4, 3)\n"
        "print(contrastive_ext.fused_debiased_loss(z, z).item())\n"
        "import contrastive_ext.fused_infonce_loss as loss\n"
        "print(loss(z, z).item())\n"
        "from contrastive_ext import fused_hard_negative_loss\n"
        "import contrastive_ext.losses.debiased"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 2


def test_importing_a_name_that_is_no_loss_still_fails():
    with pytest.raises(ModuleNotFoundError):
        __import__("contrastive_ext.fused_nothing_loss")


@pytest.mark.parametrize("name", ["auto", "cpu", "torch"])
def test_products_of_split_operands_are_asked_of_who_has_them(name):
    z = torch.randn(4, 300)  # more features than Triton takes, in the interpreter too
    reason = (
        "no backend has operand_dtype='fp16x3'.*torch: it has no" if name == "auto" else "it has no 'fp16x3' products"
    )
    with pytest.raises(RuntimeError, match=reason if name in (*ce.available_backends(), "auto") else name):
        ce.fused_infonce_loss(z, z, backend=name, operand_dtype="fp16x3")
    exact = ce.fused_infonce_loss(z, z, backend="reference", operand_dtype="fp16x3")
    assert torch.equal(exact, ce.fused_infonce_loss(z, z, backend="reference"))


def test_what_is_advised_can_run_the_call(monkeypatch):
    plain = dispatch.BACKENDS[-1]
    broken = replace(plain, name="cuda", why_not=lambda *_: "no such device.")
    monkeypatch.setattr(dispatch, "BACKENDS", (broken, plain))
    for operands, advice in (
        (F32, "'auto' or 'torch' or 'reference'"), *((name, "'reference'") for name in SPLIT_PRODUCTS),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"no such device. Use backend={advice}.$"):
            dispatch.select("cuda", CPU, F32, operands, 8)
