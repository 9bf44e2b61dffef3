"""A call across ranks as torch.compile meets it: never traced.

A file of its own, imported by the first such call, because this imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="contrastive_ext: a loss with group= exchanges candidates between processes and runs outside graphs; "
    "compile without fullgraph=True, it is one graph break."
)
def outside_graphs(function: Callable, *args) -> Any:
    """function(*args), by eager PyTorch."""
    return function(*args)
