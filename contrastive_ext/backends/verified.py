"""What hardware has shown to be right: (backend, architecture, operand dtype) -> the file in bench/results.

Each file holds a line for every case of `python -m bench proof`: losses and gradients at real shapes against float64,
and whether a second run has the same bits. tools/gpu_results.py writes the entries.
"""

from __future__ import annotations

import torch

VERIFIED: dict[tuple[str, str, torch.dtype | str], str] = {
    ("triton", "sm_90", torch.bfloat16): "nvidia-h200-proof.jsonl",
    ("triton", "sm_90", torch.float16): "nvidia-h200-proof.jsonl",
    ("triton", "sm_90", torch.float32): "nvidia-h200-proof.jsonl",
    ("triton", "sm_90", torch.float64): "nvidia-h200-proof.jsonl",
}
