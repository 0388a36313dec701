"""Storage types and their compute types: 16- and 32-bit floats compute in float32, 64-bit ones in float64.

Rounding to 16 bits is to nearest, ties to even; subnormals, infinities and NaN are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STORAGES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

# Triton's interpreter truncates where it should round to bfloat16, and loses subnormals of it.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x, REAL: tl.constexpr):
    """A loaded element in the compute type."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(REAL)


@triton.jit
def narrow(x, STORAGE: tl.constexpr):
    """x as it is stored. From float64 to 16 bits it goes through float32, as in torch."""
    if x.dtype == tl.float64 and STORAGE != tl.float64:
        x = x.to(tl.float32)
    if INTERPRETED and STORAGE == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(STORAGE)


@triton.jit
def number(value, address=None):
    """An option in float64: what `address` points to unless it is None, otherwise `value`."""
    if address is None:
        return tl.full((), value, tl.float64)
    else:
        return tl.load(address).to(tl.float64)
