"""autotune: tiles are tried one line of the table at a time, checked, timed, and the fastest is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import contrastive_ext as ce
from contrastive_ext.backends.triton import row_stats as triton
from contrastive_ext.diagnostics import tuning
from rows import random_pairs

REASON = triton.why_not(torch.device("cpu"), torch.float32, torch.float32, 8)
pytest.importorskip("triton", reason="Triton is not installed.")
from contrastive_ext.triton_kernels import configs  # noqa: E402

TABLE = configs.Config(32, 32, 0, 1, 1)
WIDE, TALL, STAGED = (
    TABLE._replace(block_m=64),
    TABLE._replace(block_n=16),
    TABLE._replace(block_m=64, num_stages=2),
)


@pytest.fixture
def few(monkeypatch):
    """Two other tiles instead of a dozen, and what was kept forgotten afterwards."""
    monkeypatch.setattr(configs, "preferred", {})
    monkeypatch.setattr(configs, "alternatives", lambda line: [WIDE, TALL])


def _clock(monkeypatch, seconds):
    """A clock that reads a tile's time from a table; a tile that has none fails as a compiler would."""

    def timer(statement, **_):
        (config,) = configs.preferred.values()
        if config not in seconds:
            raise RuntimeError("out of resource: shared memory\nand more")
        return SimpleNamespace(blocked_autorange=lambda **_: SimpleNamespace(median=seconds[config]))

    monkeypatch.setattr("torch.utils.benchmark.Timer", timer)


def _step(change=lambda config: 0.0):
    """Looks a tile up, as a launch does; its result depends on the tile as `change` says."""
    config = configs.choose("forward", "16-bit", 100, 0)
    return [torch.ones(3) + change(config)]


def test_the_fastest_tile_is_kept_and_its_stages_are_tried(few, monkeypatch):
    _clock(monkeypatch, {TABLE: 3.0, WIDE: 2.0, STAGED: 1.0})
    trials = ce.autotune(_step)
    assert configs.choose("forward", "16-bit", 100, 0) == STAGED
    assert configs.choose("backward", "16-bit", 100, 0) == TABLE
    assert [t.tile for t in trials if t.kept] == ["64x32, 1 warps, 2 stages"]
    failed = next(t for t in trials if t.tile.startswith("32x16"))
    assert failed.seconds is None
    assert "shared memory" in failed.why_not


def test_a_tile_that_changes_the_result_is_not_taken(few, monkeypatch):
    _clock(monkeypatch, dict.fromkeys((TABLE, WIDE, TALL, STAGED), 1.0) | {WIDE: 0.1})
    trials = ce.autotune(lambda: _step(lambda config: 1.0 if config == WIDE else 0.0))
    assert configs.choose("forward", "16-bit", 100, 0) != WIDE
    assert next(t for t in trials if t.tile.startswith("64x32, 1 warps, 1")).why_not == "changes the result"


def test_a_step_without_triton_kernels_is_refused(few):
    z1, z2 = random_pairs(4, 3)
    with pytest.raises(RuntimeError, match="another backend"):
        ce.autotune(lambda: ce.fused_infonce_loss(z1, z2, backend="torch"))
    assert not configs.preferred


@pytest.mark.parametrize("products, features", [("16-bit", 128), ("tf32", 1024), ("fp64", 64)])
def test_alternatives_differ_from_the_table_and_suit_a_triangle(products, features):
    for architecture in configs.ARCHITECTURES:
        line = configs.Line("forward", products, features, architecture)
        found = configs.alternatives(line)
        assert len(set(found)) == len(found) > 2
        assert configs.default(line) not in found
        assert all(c.block_m % c.block_n == 0 for c in [*found, configs.default(line)])


@pytest.mark.interpreter
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_real_kernels_are_tuned(few, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(configs, "alternatives", lambda line: [TALL])
    z = [x.requires_grad_() for x in random_pairs(20, 8)]

    def step():
        loss = ce.fused_infonce_loss(*z, backend="triton")
        return [loss, *torch.autograd.grad(loss, z)]

    trials = ce.autotune(step)
    assert {line.direction for line in configs.preferred} == {"forward", "backward"}
    assert all(t.seconds is not None for t in trials)
