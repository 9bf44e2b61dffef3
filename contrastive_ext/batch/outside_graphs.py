"""A call across ranks as torch.compile meets it: never traced.

A file of its own, imported where such a call is being compiled, because this imports the compiler. An eager call leaves
that alone: torch.distributed.nn.functional, a part of it, keeps the group that exists when it is imported for good, and
then `destroy_process_group` does not end the group's threads.
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
