"""Python on the site and in the README: the code blocks of every page, and what a reader's script has before them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repository import ROOT

# what the pages suppose: encoders, two views, their embeddings, and what a training loop counts
PRELUDE = """
from typing import Any

import torch
from torch import Tensor, nn

encoder: nn.Module = nn.Linear(16, 32)
average: nn.Module = nn.Linear(16, 32)
logger: Any = None
x1, x2 = torch.randn(2, 8, 16)
z1, z2, image, text, a, b, q, k, g1, g2, features = (torch.randn(8, 32, requires_grad=True) for _ in range(11))
views = torch.randn(2, 8, 32)
labels = torch.arange(8) // 2
step, epoch, total_steps = 3, 1, 10
"""


def pages() -> list[Path]:
    """Those that show Python to users; contributors' pages quote formulas and fragments."""
    contributors = {"design.md", "math.md", "measurements.md"}
    found = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name not in contributors)
    return [ROOT / "README.md", *(path for path in found if "compiled" not in path.parts)]


def blocks(page: Path) -> list[str]:
    """The ```python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def scope() -> dict[str, Any]:
    """The prelude's names, with a logger that takes numbers."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, names)

    class Logger:
        def log(self, numbers: dict[str, float]) -> None:
            assert all(isinstance(x, float) for x in numbers.values())

    names["logger"] = Logger()
    assert isinstance(names["encoder"], nn.Module) and isinstance(names["x1"], torch.Tensor)
    return names
