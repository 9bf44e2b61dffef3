"""Numbers for a case: rows of every kind, in every kind of memory, clear of what rounding alone would decide."""

from __future__ import annotations

import torch
from torch import Tensor

import contrastive_ext as ce

KINDS = ("random", "peaked", "crowded", "degenerate", "lattice")
MEMORIES = ("plain", "strided", "transposed", "offset", "shared")
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Draw:
    """Everything random about one call.

    kind       "random", "peaked" (converged), "crowded" (mean cosine .99), "degenerate" (zero, opposite, equal rows),
               "lattice" (multiples of a half: products are exact, ties are ties in every dtype)
    memory     how tensors lie: "shared" puts all of a dtype into one buffer, and all integers at its beginning
    operands   dtype that unit rows are rounded to
    identical  whether a degenerate batch may hold identical rows (their ranks are a matter of rounding)
    """

    def __init__(self, kind, memory, dtype, operands, normalize: bool, seed: int, identical: bool = True):
        self.kind, self.memory, self.dtype, self.operands, self.normalize = kind, memory, dtype, operands, normalize
        self.identical = identical
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.used: dict[torch.dtype, int] = {}
        self.noise = None
        self.center: Tensor | None = None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def number(self, low: int, high: int) -> int:
        """An integer of [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def views(self, number: int, b: int, d: int) -> Tensor:
        """[number, b, d] float64 views of b images."""
        if self.kind == "lattice":
            return torch.randint(-2, 3, (number, b, d), generator=self.generator).double() / 2
        if self.kind == "peaked":
            if self.center is None or self.center.shape != (b, d):
                self.center = torch.nn.functional.normalize(self.randn(b, d), dim=-1)
            return self.center + 0.1 * self.randn(number, b, d) / d**0.5
        if self.kind == "crowded":
            z = 1 + 0.1 * self.randn(number, b, d)
            return z if self.normalize else z / d**0.5
        z = self.randn(number, b, d) * (3 if self.normalize else 1.5 / d**0.5)
        if self.kind == "degenerate":
            z[0, ::3] = 0
            z[-1, 2::5] = -z[0, 2::5]
            if self.identical:
                z[-1, 1::4] = z[0, min(1, b - 1)].clone()
        return z

    def others(self, *shape: int) -> Tensor:
        """[..., d] float64 rows of other images, of about unit length."""
        z = self.views(1, max(1, torch.Size(shape[:-1]).numel()), shape[-1])[0] if self.kind != "peaked" else None
        z = self.randn(*shape) if z is None else z.reshape(shape)
        if self.kind in ("peaked", "random"):
            z = torch.nn.functional.normalize(z, dim=-1) * (1 + 0.1 * self.randn(*shape[:-1], 1))
        return z

    def tensor(self, z: Tensor, dtype: torch.dtype | None = None, normalized: bool | None = None) -> Tensor:
        """z in the call's dtype and memory; `normalized`: the call makes unit rows of it (None: if it normalises)."""
        z = z.to(dtype or self.dtype)
        if self.normalize if normalized is None else normalized:
            z = self.clear_of_rounding(z)
        return self.place(z)

    def clear_of_rounding(self, z: Tensor) -> Tensor:
        """Rows moved until their unit rows lie off the middle between two numbers of the operand dtype."""
        if self.operands not in SIXTEEN_BITS:
            return z
        for _ in range(200):
            unit = torch.nn.functional.normalize(z.double(), dim=-1)
            low, high = ((unit * (1 + x)).to(self.operands) for x in (-(2.0**-21), 2.0**-21))
            unclear = (low != high).any(-1)
            if not unclear.any():
                return z
            if z.shape[-1] == 1:
                return z
            # one noise for all rows: identical and opposite rows stay so
            noise = 1 + 0.02 * self.randn(z.shape[-1])
            z = torch.where(unclear[..., None], (z.double() * noise).to(z.dtype), z)
        raise AssertionError("no rows found that are clear of rounding")

    def place(self, z: Tensor) -> Tensor:
        if self.memory == "strided":
            wide = torch.full((*(2 * n for n in z.shape[-2:]),), torch.nan, dtype=z.dtype)
            wide = wide.repeat(*z.shape[:-2], 1, 1)
            view = wide[..., ::2, ::2]
        elif self.memory == "transposed":
            view = torch.empty(z.shape[::-1], dtype=z.dtype).permute(*range(z.dim())[::-1])
        elif self.memory == "offset":
            view = torch.empty(z.numel() + 1, dtype=z.dtype)[1:].view(z.shape)
        elif self.memory == "shared":
            buffer = self.buffers.setdefault(z.dtype, torch.zeros(200_000, dtype=z.dtype))
            begin = self.used.get(z.dtype, 0)
            self.used[z.dtype] = begin + z.numel()
            view = buffer[begin : begin + z.numel()].view(z.shape)
        else:
            return z.contiguous()
        return view.copy_(z)

    def integers(self, style: str, *lengths: int) -> list[Tensor]:
        """Vectors of ids; in shared memory the shorter ones are the beginnings of the longest.

        style  "few" classes; a dtype or "wide": so many that most rows of a side have ids that the other lacks
        """
        longest = max(lengths)
        classes = torch.randint(0, 5 if style == "few" else longest + 3, (longest,), generator=self.generator)
        if style == "wide":
            classes = (classes - longest // 2) * (2**62 // (longest + 3))
        elif style == "one":
            classes = torch.full_like(classes, 3)
        elif style == "distinct":
            classes = torch.randperm(longest, generator=self.generator) - 2
        elif style != "few":
            classes = classes.to(getattr(torch, style))
        if self.memory == "shared":
            return [classes[:n] for n in lengths]
        drawn = [classes[torch.randperm(longest, generator=self.generator)][:n] for n in lengths]
        if self.memory in ("strided", "transposed"):
            return [x.repeat_interleave(2)[::2] for x in drawn]
        return drawn

    def queue(self, how: str, size: int, d: int, ids: Tensor | None) -> tuple[ce.NegativeQueue, Tensor, Tensor]:
        """A NegativeQueue, which of its rows are filled, and the ids of all rows.

        how  words: "part" leaves rows unfilled, "half" stores 16 bits, otherwise it has gone round
        """
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float16 if "half" in how else torch.float32
        arguments = {"normalize": self.normalize} if "normalize" in ce.NegativeQueue.__init__.__annotations__ else {}
        queue = ce.NegativeQueue(size, d, dtype=dtype, **arguments)
        number = max(1, size // 2) if "part" in how else size + 2
        keys, of_rows = self.others(number, d).to(dtype), torch.zeros(size, dtype=torch.int64)
        given = None if ids is None else ids[torch.arange(number) % len(ids)].long()
        queue.enqueue(keys, given)
        if given is not None:
            for at in range(number):
                of_rows[at % size] = given[at]
        filled = torch.arange(size) < number
        return queue, filled, of_rows
