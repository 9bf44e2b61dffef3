"""The compiled library: where it is, whether it loads, what it was built from.

The library is `_C.abi3.so` in the folder of the package. It only registers operators with torch (LibTorch stable ABI),
so it is loaded by `torch.ops.load_library`, at the first question asked here and never by `import contrastive_ext`. A
library that is absent, does not load or is not of this version of the package (an update of the sources alone leaves
the old one behind) is a reason, not an error: dispatch and `doctor` show it, another backend is taken.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..problem import schema
from ..problem.short_road import BACKWARD_SCHEMA, FORWARD_SCHEMA

OLDEST_TORCH = "2.10"  # the stable-ABI version the library is compiled for (TORCH_TARGET_VERSION in setup.py)
# setup.py says the same. Isolation would hide the installed torch, the cache may hold a wheel without native code.
HOW_TO_BUILD = (
    "with torch>=2.10 and a C++ compiler installed, run in the source folder: "
    'pip install "setuptools>=77" && pip install --no-build-isolation --no-cache-dir .'
)

# The operators this version calls (csrc/operators.cpp), held against the loaded library.
_RANKED = "Tensor lse, Tensor axis, Tensor below"
OPERATORS = {
    "row_stats_forward_cpu": schema.row_stats(schema.NATIVE_PROBLEM),
    "row_stats_backward_cpu": schema.row_stats_backward(schema.NATIVE_PROBLEM),
    "ranked_stats_forward_cpu": schema.ranked_stats(schema.NATIVE_PROBLEM),
    "ranked_stats_backward_cpu": schema.ranked_stats_backward(schema.NATIVE_PROBLEM, _RANKED),
    "pair_sums_forward_cpu": schema.pair_sums(schema.NATIVE_PROBLEM),
    "pair_sums_backward_cpu": schema.pair_sums_backward(schema.NATIVE_PROBLEM),
    "top_columns_cpu": "(Tensor scorers, Tensor? features, int k, int num_images, Tensor? col_ids, Tensor? row_ids, "
    "Tensor? excluded, Tensor? below) -> (Tensor scores, Tensor columns)",
    "unit_rows_cpu": "(Tensor z, ScalarType operand_dtype) -> (Tensor unit, Tensor norm)",
    "unit_rows_backward_cpu": "(Tensor z, Tensor norm, Tensor grad) -> Tensor dz",
    "whole_loss_forward_cpu": FORWARD_SCHEMA,
    "whole_loss_backward_cpu": BACKWARD_SCHEMA,
    "use_bf16_products_cpu": "(str name) -> str",
}
_CUDA_PROBLEM = (
    "Tensor u, Tensor? v, Tensor? scale, float scale_value, float exponent, int num_images, int positive_offset, "
    "Tensor? row_ids, Tensor? col_ids, bool unit"
)
CUDA_OPERATORS = {
    "row_stats_forward_cuda": f"({_CUDA_PROBLEM}, bool columns, int stream) -> "
    "(Tensor lse, Tensor count, Tensor col_lse, Tensor col_count)",
    "row_stats_backward_cuda": f"({_CUDA_PROBLEM}, Tensor lse, Tensor grad_lse, Tensor? col_lse, Tensor? grad_col_lse, "
    "bool need_u, bool need_v, int stream) -> (Tensor du, Tensor dv)",
}


def library() -> Path | None:
    """Path of the compiled library, loaded now if it was not; None if there is none that loads (see `why_missing`)."""
    path, reason = _loaded()
    return path if reason is None else None


def why_missing() -> str | None:
    """None if the compiled library is loaded, otherwise one sentence saying why not and what to do."""
    return _loaded()[1]


def build_info() -> dict[str, Any]:
    """What the loaded library says about its build: compiler, instruction sets, CUDA architectures.

    Returns      the decoded JSON of `contrastive_ext::native_build_info`
    Raises       RuntimeError if the library is not loaded, with the reason of `why_missing`
    """
    reason = why_missing()
    if reason is not None:
        raise RuntimeError(reason)
    info: dict[str, Any] = json.loads(torch.ops.contrastive_ext.native_build_info())
    return info


def could_be_built() -> bool:
    """Whether this machine has what a build needs beside torch, and nobody asked for a build without native code."""
    if sys.platform == "win32" or platform.python_implementation() != "CPython":
        return False
    if "CONTRASTIVE_EXT_NATIVE=0 was set" in (why_missing() or ""):
        return False
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))))


@cache
def _loaded() -> tuple[Path | None, str | None]:
    return _load(Path(__file__).resolve().parents[1])


def _load(folder: Path) -> tuple[Path | None, str | None]:
    """The library found in `folder`, if any, and the reason why it is not loaded, if it is not."""
    path = next(iter(sorted(folder.glob("_C*.so"))), None)
    if path is None:
        note = folder / "_native_not_built.txt"  # written by setup.py when it builds without native code
        if note.is_file():
            return None, note.read_text(encoding="utf-8").strip()
        return None, f"native kernels are not built; for them: {HOW_TO_BUILD}"
    if torch.__version__ < OLDEST_TORCH:  # TorchVersion compares release numbers, not strings
        return path, f"native kernels need torch >= {OLDEST_TORCH}; this is torch {torch.__version__}."
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return path, f"native kernels failed to load ({error}); build them again against this torch: {HOW_TO_BUILD}"
    differing = _what_differs("contrastive_ext")
    if differing is not None:
        return path, f"{path.name} was not built from these sources ({differing}); build it again: {HOW_TO_BUILD}"
    return path, None


def _what_differs(namespace: str) -> str | None:
    """What of the operators registered in `namespace` is not this version's, or None."""
    operators = getattr(torch.ops, namespace)
    if not hasattr(operators, "native_build_info"):
        return "it registers none of our operators"
    info: dict[str, Any] = json.loads(operators.native_build_info())
    if info.get("version") != __version__:
        return f"it is of version {info.get('version', 'unknown')}, the package of {__version__}"
    for name, expected in (OPERATORS | (CUDA_OPERATORS if "cuda_archs" in info else {})).items():
        if not hasattr(operators, name):
            return f"it has no operator {name}"
        if getattr(operators, name).default._schema != torch._C.parse_schema(f"{namespace}::{name}{expected}"):
            return f"its operator {name} takes other arguments"
    return None
