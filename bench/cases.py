"""The one table of what is measured: which losses at which shapes, for every command of the benchmark."""

from __future__ import annotations

from dataclasses import replace

from contrastive_ext.backends import cpu

from .case import Case, short_name
from .losses import LOSSES, PAIR_LOSSES


def _case(loss: str, layout: str, n: int, m: int | None = None, dim: int = 128, **options) -> Case:
    name = f"fused_{loss}_loss"
    return Case(name, layout, n, n if m is None else m, dim, **{"temperature": LOSSES[name].temperature} | options)


def _other_losses() -> list[str]:
    return [short_name(name) for name in PAIR_LOSSES if name != "fused_infonce_loss"]


def cpu_cases(quick: bool = False) -> list[Case]:
    """The site's table: InfoNCE at growing N, then every loss and layout at one N; the costliest last.

    All of it takes less than five minutes on two cores with other work on them.
    """
    n, keys = (512, 1024) if quick else (2048, 4096)
    return [
        *(_case("infonce", "two_view", size) for size in ((256, 512, 1024) if quick else (256, 1024, 2048, 4096))),
        *(_case(loss, "two_view", n) for loss in ("debiased", "hard_negative", "decoupled")),
        *(_case(loss, layout, n) for loss, layout in (("false_negative", "views"), ("supcon", "labelled"))),
        _case("infonce", "symmetric", n),
        _case("infonce", "queue", n, keys),
        _case("soft_target", "soft_targets", n, keys),
        _case("self_labeling", "self_labels", n, keys),
        _case("bayesian", "two_view", n),
    ]


def cpu_long_cases() -> list[Case]:
    """What comes on top with --long: larger N, batches so small that the host's time counts, long queues, bfloat16."""
    return [
        _case("infonce", "two_view", 8192, compile=True),
        _case("infonce", "two_view", 16384),
        _case("infonce", "two_view", 128),
        _case("infonce", "two_view", 4096, dtype="bfloat16"),
        # products that a CPU has with AMX alone
        *([_case("infonce", "two_view", 4096, dtype=cpu.SPLIT)] if cpu.bytes_in_tile_registers(cpu.SPLIT) else []),
        # small: `torch` keeps its block and must not be slower than eager
        *(_case(loss, "two_view", 256) for loss in ("debiased", "hard_negative")),
        *(_case(loss, layout, 256) for loss, layout in (("false_negative", "views"), ("supcon", "labelled"))),
        _case("infonce", "symmetric", 256),
        _case("infonce", "queue", 256, 1024),
        _case("soft_target", "soft_targets", 256, 1024),
        _case("bayesian", "two_view", 512),  # what comparing all negatives of a row with each other can still do
        *(_case(loss, "two_view", 4096) for loss in ("debiased", "hard_negative", "decoupled")),
        *(_case(loss, layout, 4096) for loss, layout in (("false_negative", "views"), ("supcon", "labelled"))),
        *(_case(loss, layout, 4096) for loss, layout in (("labelled_infonce", "classes"), ("sigmoid", "binary"))),
        _case("infonce", "symmetric", 4096),
        _case("infonce", "queue", 1024, 16384),
        _case("self_labeling", "self_labels", 1024, 16384),
        _case("soft_target", "soft_targets", 1024, 16384),
        _case("self_labeling", "self_labels", 256, 65536),
    ]


def cuda_cases(quick: bool) -> list[Case]:
    """The shapes of the GPU protocol, the most telling first: a run cut short has measured those."""
    sizes = (1024, 4096) if quick else (16384, 65536, 4096, 1024)
    cases = [_case("infonce", "two_view", n, dtype="bfloat16", compile=True) for n in sizes]
    cases += [_case(loss, "two_view", sizes[0], dtype="bfloat16", compile=True) for loss in _other_losses()]
    if quick:
        return cases
    cases += [
        _case("infonce", "two_view", 16384, dtype=dtype, compile=True) for dtype in ("float32", "tf32", "float16")
    ]
    cases += [_case("infonce", "two_view", 16384, dim=dim, dtype="bfloat16") for dim in (256, 512, 768, 1024)]
    cases += [_case("infonce", "queue", n, 65536, dtype="bfloat16") for n in (256, 1024, 4096)]
    cases += [_case("self_labeling", "self_labels", n, 65536, dtype="bfloat16") for n in (256, 1024, 4096)]
    cases += [_case("soft_target", "soft_targets", 1024, 65536, dtype="bfloat16")]
    cases += [
        _case(loss, layout, 16384, dtype="bfloat16")
        for loss, layout in (("false_negative", "views"), ("supcon", "labelled"), ("labelled_infonce", "classes"))
    ]
    cases += [_case("sigmoid", "binary", n, dim=512, dtype="bfloat16") for n in (4096, 16384, 65536)]
    cases += [_case("infonce", "symmetric", n, dim=512, dtype="bfloat16") for n in (4096, 16384, 65536)]
    cases += [_case("infonce", "two_view", 65536, dim=dim, dtype="bfloat16") for dim in (256, 512, 768, 1024)]
    cases += [_case("infonce", "symmetric", 65536, dim=768, dtype="bfloat16")]
    cases += [_case(loss, "two_view", n, dtype="bfloat16") for loss in _other_losses() for n in (4096, 65536)]
    cases += [_case("infonce", "two_view", 16384, dtype="bfloat16", temperature=t) for t in (0.5, 0.07, 0.01)]
    # ragged: no tile size divides them
    cases += [_case("infonce", "two_view", 70, dtype="bfloat16"), _case("infonce", "symmetric", 4097, dtype="bfloat16")]
    cases += [_case("infonce", "two_view", 262144, dtype="bfloat16", fused_only=True)]
    return cases


def proof_cases() -> list[Case]:
    """What the GPU kernels have paths for, at shapes that take them: triangles, launches, widths, ragged ends.

    What no GPU has run yet comes early (docs/measurements.md, "What a GPU has to show next").
    """
    wide, large = (64, 128, 256, 512, 768, 1024), 17024
    cases = [_case("infonce", "two_view", large, dim=d, dtype=t) for d in wide for t in ("float16", "bfloat16")]
    cases += [_case("infonce", "two_view", 4096, dim=d, dtype="fp16x3") for d in (64, 128, 256)]
    cases += [
        _case("infonce", "symmetric", 4097, dtype="fp16x3"),
        _case("infonce", "queue", 1024, 65536, dtype="fp16x3"),
    ]
    cases += [_case("hard_negative", "two_view", 4096, dtype="fp16x3")]
    cases += [_case("infonce", "symmetric", 8192, dim=d, dtype="bfloat16") for d in (128, 512, 768)]
    cases += [_case("infonce", "symmetric", 4097, dim=d, dtype=t) for d, t in ((128, "float16"), (768, "bfloat16"))]
    cases += [_case("infonce", "queue", 1024, 65536, dtype=t) for t in ("float16", "bfloat16")]
    cases += [_case(loss, "two_view", large, dtype="bfloat16") for loss in ("hard_negative", "debiased", "decoupled")]
    cases += [_case("infonce", "two_view", large, dtype="bfloat16", temperature=0.01)]
    cases += [
        _case("infonce", "two_view", large, dtype=t, learned=True, temperature=0.07) for t in ("float16", "bfloat16")
    ]
    cases += [_case("infonce", "two_view", 4096, dim=d, dtype=t) for d in (128, 512) for t in ("float32", "tf32")]
    cases += [_case("bayesian", "two_view", 4096, dtype="bfloat16")]
    cases += [
        _case("false_negative", "views", 4096, dtype="bfloat16"),
        _case("supcon", "labelled", 4096, dtype="bfloat16"),
        _case("labelled_infonce", "classes", 4096, dtype="bfloat16"),
    ]
    cases += [_case("sigmoid", "binary", 8192, dim=d, dtype=t) for d, t in ((128, "float16"), (768, "bfloat16"))]
    cases += [_case("self_labeling", "self_labels", 1024, 65536, dtype="bfloat16")]
    cases += [_case("soft_target", "soft_targets", 1024, 65536, dtype="bfloat16")]
    return [
        *cases,
        _case("infonce", "two_view", 70000, dtype="bfloat16"),
        _case("infonce", "two_view", 1024, dtype="float64"),
    ]


def speed_cases() -> list[Case]:
    """The table of goals: shapes whose share of the library's rate is quoted, the most telling first."""
    large = 32768
    cases = [_case("infonce", "two_view", large, dim=d, dtype="bfloat16") for d in (128, 256, 512, 768, 1024, 64)]
    cases += [_case("infonce", "two_view", 65536, dtype="bfloat16")]
    cases += [_case("infonce", "queue", n, 65536, dtype="bfloat16") for n in (1024, 4096)]
    cases += [_case("infonce", "symmetric", large, dim=d, dtype="bfloat16") for d in (128, 512, 768)]
    cases += [_case("infonce", "two_view", n, dtype="bfloat16") for n in (1024, 4096, 16384)]
    cases += [_case(loss, "two_view", large, dtype="bfloat16") for loss in ("debiased", "hard_negative")]
    cases += [_case("infonce", "two_view", large, dtype=t) for t in ("float16", "tf32", "fp16x3")]
    return cases


def tiny(case: Case) -> Case:
    """The same case at a size for a rehearsal."""
    return replace(case, n=min(case.n, 64), m=min(case.m, 64 if case.n == case.m else 96), dim=min(case.dim, 40))


_SMOKE_SHAPES = {
    "two_view": (70, 70, 32), "views": (70, 70, 32), "labelled": (70, 70, 32), "classes": (70, 70, 32),
    "symmetric": (67, 67, 40), "binary": (67, 67, 40),
    "queue": (33, 129, 32),
}  # fmt: skip


def smoke_cases() -> list[Case]:
    """Every loss and layout at sizes that no tile divides, small enough for compute-sanitizer."""
    small = [
        _case(short_name(name), layout, n, m, dim, dtype=dtype)
        for name, row in LOSSES.items()
        for layout in row.layouts
        for n, m, dim in (_SMOKE_SHAPES.get(layout, _SMOKE_SHAPES["queue"]),)
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ]
    # what the Hopper kernels compute, over several of their tiles
    return small + [_case("infonce", "two_view", 300, dtype=dtype) for dtype in ("bfloat16", "float16")]
