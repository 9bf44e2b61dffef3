"""Tile sizes of the Triton kernels timed on request; without one the table of triton_kernels/configs.py holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..backends.triton import launch as triton_launch

SECONDS = 0.2  # of timing, for each tile
STAGES = (-1, 1)  # of the fastest tile and of the table's: one less may let two programs share a processor
TOLERANCE = 1e-2  # of a result's length: above the rounding of 16-bit products, below any wrong tile


@dataclass(frozen=True)
class Trial:
    """One tile for one kernel: `seconds` of the step, or why it has none."""

    kernel: str
    tile: str
    seconds: float | None
    why_not: str = ""
    kept: bool = False

    def __str__(self) -> str:
        result = self.why_not if self.seconds is None else f"{self.seconds * 1e3:10.4f} ms"
        return f"{self.kernel:<36} {self.tile:<30} {result}{'  kept' if self.kept else ''}"


def autotune(step: Callable[[], object]) -> list[Trial]:
    """Run `step` with other tile sizes for the Triton kernels it launches, and keep the fastest in this process.

        z = [z1, z2]                                    # of the size that matters, with requires_grad
        contrastive_ext.autotune(lambda: torch.autograd.grad(contrastive_ext.fused_infonce_loss(*z), z))

    step     the losses to be made fast, forward and backward; it runs hundreds of times. Tensors that it returns are
             compared with those of the table's tiles, and a tile that changes them is not taken.
    Returns  a line for every tile tried. What was kept serves every later call on this device with the same kind of
             products and number of features (in the table's groups: 64, 128, 256, more), until the process ends.
    Raises   RuntimeError if `step` launches no Triton kernel: there is nothing to tune
    Cost     eight to seventy compilations of a few seconds for each kernel

    Kernels are compiled for their tiles: tune before a CUDA graph is captured.
    """
    if triton_launch.why_missing() is not None:
        raise RuntimeError(f"autotune times Triton kernels: {triton_launch.why_missing()}")
    configs = triton_launch.kernels().configs
    configs.asked.clear()
    expected = _tensors(step())
    lines = sorted(configs.asked)
    if not lines:
        raise RuntimeError(
            "autotune found no Triton kernel in the step: its losses run on another backend (contrastive_ext.explain)."
        )
    trials = []
    for line in lines:
        trials += _tune(configs, line, step, expected)
    return trials


def _tune(configs, line, step: Callable[[], object], expected: list[Tensor]) -> list[Trial]:
    """Try tiles for one line of the table, then stages for the fastest of them and for the table's."""
    table = configs.preferred.get(line) or configs.default(line)
    tried = {config: _try(configs, line, config, step, expected) for config in (table, *configs.alternatives(line))}

    def seconds(config) -> float:
        found = tried[config]
        return float("inf") if isinstance(found, str) else found

    for tile in (min(tried, key=seconds), table):
        for more in STAGES:
            config = tile._replace(num_stages=tile.num_stages + more)
            if config.num_stages > 0 and config not in tried:
                tried[config] = _try(configs, line, config, step, expected)
    best = min(tried, key=seconds)
    configs.preferred[line] = best
    kernel = f"{line.direction} {line.products} D<={line.features} sm_{line.architecture}"
    return [
        Trial(kernel, _describe(config), None, found, config == best)
        if isinstance(found, str)
        else Trial(kernel, _describe(config), found, kept=config == best)
        for config, found in tried.items()
    ]


def _try(configs, line, config, step: Callable[[], object], expected: list[Tensor]) -> float | str:
    """Median seconds of the step with a tile, or why it cannot be taken."""
    from torch.utils.benchmark import Timer  # imports setuptools and the tools for C++ extensions

    before = configs.preferred.get(line)
    configs.preferred[line] = config
    try:
        if not _same(_tensors(step()), expected):
            return "changes the result"
        return Timer("step()", globals={"step": step}).blocked_autorange(min_run_time=SECONDS).median
    except Exception as error:  # for a tile that does not fit compiler, assembler and launcher raise what they like
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    finally:
        if before is None:
            del configs.preferred[line]
        else:
            configs.preferred[line] = before


def _describe(config) -> str:
    tile = "x".join(str(size) for size in config[:3] if size)
    return f"{tile}, {config.num_warps} warps, {config.num_stages} stages"


def _tensors(result: object) -> list[Tensor]:
    """Tensors among what a step returned, copied: a step may return what it changes (a gradient)."""
    if isinstance(result, Tensor):
        return [result.detach().clone()]
    return [x for part in result for x in _tensors(part)] if isinstance(result, (tuple, list)) else []


def _same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return len(ours) == len(expected) and all(
        a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(ours, expected, strict=True)
    )
