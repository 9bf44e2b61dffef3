"""The CUDA backward on the machine: launched as csrc/cuda/row_stats_backward.cu does."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from . import kernels
from .kernels import TILE, Forward
from .machine import program
from .memory import GlobalMemory
from .report import Report
from .schedules import Schedule

THREADS = 384
HEAD, VECTORS = 4, 2  # floats of the workspace before the columns' terms, numbers of a column
ROUNDING = {False: 2.0**-11, True: 2.0**-8}  # of a weight in fp16, in bf16


def columns_of_tile(features: int) -> int:
    return 64 if features > 128 else 128


class Backward(NamedTuple):
    """A sweep of row_stats_backward over the pairs of `call`: the gradient by u, or with the roles swapped by v.

    row_grad, row_lse  [n] dL/d lse of the rows as anchors and their lse; None: rows have no term
    col_grad, col_lse  [m] the same of the columns as anchors; one set: those of the rows
    """

    call: Forward
    row_grad: np.ndarray | None = None
    row_lse: np.ndarray | None = None
    col_grad: np.ndarray | None = None
    col_lse: np.ndarray | None = None
    by_columns: bool = False

    @property
    def terms(self) -> int:
        """The enumerator of the kernel."""
        has_rows, has_columns = self.row_grad is not None, self.col_grad is not None
        return 2 if has_rows and has_columns else int(has_columns != self.by_columns)

    def sweep(self, schedule: Schedule, ptx: str = "", shared_base: int = 1024) -> tuple[np.ndarray, Report]:
        """The gradient after all launches, NaN where nothing is written, and what the sweep did."""
        call, memory = self.call, GlobalMemory()
        features = call.u.shape[1]
        sides = [
            (call.u, call.row_ids, self.row_lse, self.row_grad),
            (call.u, call.row_ids, self.row_lse, self.row_grad) if call.v is None
            else (call.v, call.col_ids, self.col_lse, self.col_grad),
        ]  # fmt: skip
        rows, columns = reversed(sides) if self.by_columns else sides
        n, m, width = len(rows[0]), len(columns[0]), columns_of_tile(features)
        tiles = -(-m // width)
        begin = HEAD + tiles * VECTORS * width
        partials = call.splits * n * features if call.splits > 1 else 0
        nan = np.float32(np.nan)

        def place(array, name):
            return 0 if array is None else memory.place(array, name)

        at = (
            [place(x, f"row {k}") for k, x in enumerate(rows)],
            [place(x, f"column {k}") for k, x in enumerate(columns)],
        )
        workspace = memory.place(np.full(begin + partials, nan), "workspace")
        gradient = memory.place(np.full((n, features), nan), "gradient")
        scale = memory.place(np.array(call.scale, np.float32), "scale") if call.scale_on_device else 0
        offset = (0, call.positive_offset) if self.by_columns else (call.positive_offset, 0)
        arguments = struct.pack(
            "<qqqqQQqqffQ?7xQQQQQQ", len(call.u), call.num_images, *offset, at[0][1], at[1][1], n, m, call.beta,
            -1.0 if call.scale_on_device else call.scale, scale, call.unit, *at[0][2:], *at[1][2:], workspace, gradient,
        )  # fmt: skip
        text = kernels.ptx_of("row_stats_backward")
        if columns[3] is not None:
            for kernel, blocks, threads in (("largest_kernel", 2, 512), ("column_terms_kernel", tiles, width)):
                made = program(kernels.only_entry(text, kernel))
                made.launch((blocks,), threads, [arguments], memory, schedule=schedule)
        maps = [kernels.matrix_map(at[0][0], n, features, TILE), kernels.matrix_map(at[1][0], m, features, width)]
        entry = entry_of(features, call.bfloat16, self.terms)
        sweep = program(ptx or kernels.only_entry(text, entry), entry)
        report = sweep.launch(
            (-(-n // TILE), call.splits), THREADS, [arguments, *maps], memory,
            shared=kernels.shared_bytes(features, width, VECTORS if self.terms else 0), schedule=schedule,
            shared_base=shared_base, counts_banks=True,
        )  # fmt: skip
        if call.splits > 1:
            size = n * features // 4
            add = program(kernels.only_entry(text, "add_splits_kernel"))
            sums = [workspace + 4 * begin, size, call.splits, gradient]
            add.launch((-(-size // 256),), 256, sums, memory, schedule=schedule)
        return memory.array("gradient"), report

    # ---- what is right

    def weights(self, whole: bool = False) -> np.ndarray:
        """[n, m] in float64; `whole`: logits and lse are whole numbers of scales, of which each is a factor of 2."""
        call = self.call
        u, v = call.operands()
        logits = (u @ v.T) * call.beta * call.scale
        total = np.zeros(call.shape)
        for grad, lse, reverse in ((self.row_grad, self.row_lse, False), (self.col_grad, self.col_lse, True)):
            if grad is not None:
                grad, lse = (x.astype(np.float64)[(None,) if reverse else (slice(None), None)] for x in (grad, lse))
                x = logits - np.where(np.isneginf(lse), np.inf, lse)
                weight = np.exp2(np.rint(x / call.scale)) if whole else np.exp(np.minimum(x, 700))
                total += np.where(call.negatives(reverse), grad * weight, 0)
        return total * call.beta

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """(gradient in float64, its largest error): weights are rounded to 16 bits, exponents to float32."""
        call = self.call
        weights, (u, v) = self.weights(), call.operands()
        if self.by_columns:
            weights, u, v = weights.T, v, u
        exponents = np.abs(call.logits()[call.negatives()]).max(initial=1.0)
        relative = ROUNDING[call.bfloat16] + 4 * 2.0**-23 * (exponents + 16)
        # the smallest weight of fp16 is 2^-24 of those that are brought to 2^14 in their row
        floor = 0.0 if call.bfloat16 else 2.0**-25 * 2.0**-13 * self._bound()[:, None]
        error = (np.abs(weights) * relative + floor) @ np.abs(v)
        return call.scale * weights @ v, call.scale * error

    def _bound(self) -> np.ndarray:
        """The largest weight that a row of the sweep might have."""
        n, m = self.call.shape
        row_grad = np.zeros(n) if self.row_grad is None else np.abs(self.row_grad)
        col_grad = np.zeros(m) if self.col_grad is None else np.abs(self.col_grad)
        rows, columns = (col_grad, row_grad) if self.by_columns else (row_grad, col_grad)
        return self.call.beta * (rows + columns.max())

    def exact(self) -> np.ndarray:
        """Every bit, where all weights and their sums are whole numbers times a power of two: split after split."""
        weights, (u, v) = self.weights(whole=True), self.call.operands()
        if self.by_columns:
            weights, v = weights.T, u
        width, splits = columns_of_tile(v.shape[1]), self.call.splits
        tiles = -(-len(v) // width)
        total = None
        for split in range(splits):
            span = slice(tiles * split // splits * width, tiles * (split + 1) // splits * width)
            part = ((weights[:, span] @ v[span]) * np.float64(np.float32(self.call.scale))).astype(np.float32)
            total = part if total is None else total + part
        return total


def entry_of(features: int, bfloat16: bool, terms: int) -> str:
    """A pattern of the sweep's name."""
    return f"row_stats_backward_kernel.*OperandE{int(bfloat16)}ELi{features}E.*TermsE{terms}E"
