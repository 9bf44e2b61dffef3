"""Floating-point pieces that numpy lacks: one rounding of a multiply-add, bf16, TF32, flushed subnormals."""

from __future__ import annotations

import numpy as np


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers to zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """a b + c in float32, rounded once."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)  # exact: 48 bits
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        # to odd, so that the second rounding decides as if it were the first
        bits = total.view(np.int64)
        even = inexact & (bits & 1 == 0)
        away = (error > 0) == (total > 0)
        bits += np.where(even, np.where(away, 1, -1), 0)
    return round32(total, mode)


def round32(x: np.ndarray, mode: str) -> np.ndarray:
    """float64 to float32: to nearest (rn), down (rm), up (rp) or towards zero (rz)."""
    near = x.astype(np.float32)
    if mode == "rn":
        return near
    low, high = np.float32(-np.inf), np.float32(np.inf)
    down = np.where(near > x, np.nextafter(near, low), near)
    up = np.where(near < x, np.nextafter(near, high), near)
    return {"rm": down, "rp": up, "rz": np.where(x > 0, down, up)}[mode].astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c in float64; the low half of the product is added after the high one."""
    split = 134217729.0
    ah, bh = a * split - (a * split - a), b * split - (b * split - b)
    al, bl = a - ah, b - bh
    p = a * b
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    back = s - p
    exact = s + (((p - (s - back)) + (c - back)) + low)
    return np.where(np.isfinite(exact), exact, s)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """The bits of the nearest bf16 number, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:
        rounded = bits
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def to_tf32(x: np.ndarray, mode: str) -> np.ndarray:
    """The bits of x with 10 bits of fraction: rna to nearest, ties away; rn ties to even; rz cut off."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    add = {
        "rna": np.uint32(0x1000),
        "rn": np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)),
        "rz": np.uint32(0),
    }[mode]
    return np.where(np.isfinite(x), (bits + add) & np.uint32(0xFFFFE000), bits)


def half_pairs(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of packed 16-bit floats, as float32."""
    low, high = (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    if kind.startswith("bf16"):
        return from_bf16(low), from_bf16(high)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


def pack_halves(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """The opposite; to nearest."""
    bits = to_bf16 if kind.startswith("bf16") else lambda x: x.astype(np.float16).view(np.uint16)
    return bits(low).astype(np.uint32) | (bits(high).astype(np.uint32) << np.uint32(16))
