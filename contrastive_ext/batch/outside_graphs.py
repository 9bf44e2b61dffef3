"""A call across ranks as torch.compile meets it: never traced.

A file of its own, because this imports the compiler: 40 % of the package's import time, for calls across ranks alone.
"""

from __future__ import annotations

import torch

from .distributed import make_together

together = torch.compiler.disable(
    make_together,
    reason="contrastive_ext: a loss with group= exchanges candidates between processes and runs outside graphs; "
    "compile without fullgraph=True, it is one graph break.",
)
