"""The compiled library: where it is, whether it loads, what it was built from.

The library is `_C.abi3.so` beside this file. It only registers operators with torch (LibTorch stable ABI), so it is
loaded by `torch.ops.load_library`, at the first question asked here and never by `import contrastive_ext`. A library
that is absent or does not load is a reason, not an error: dispatch and `doctor` show it, another backend is taken.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = "2.10"  # the stable-ABI version the library is compiled for (TORCH_TARGET_VERSION in setup.py)
HOW_TO_BUILD = "install torch>=2.10 and a C++ compiler, then run: pip install --no-build-isolation ."


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


@cache
def _loaded() -> tuple[Path | None, str | None]:
    return _load(Path(__file__).resolve().parent)


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
    return path, None
