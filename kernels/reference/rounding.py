"""How weights and factors of 16 bits are rounded when they are stored: the definition. Wider ones are stored as computed.

    nearest        to the nearest, ties to even
    stochastic     up or down, with the chances that leave the expected value as it is
    compensated    to the nearest; the 16 bits that follow those of the number are kept beside it and taken up again

Let |x| be an integer in units of 2^-16 of the last place of the 16-bit format: `extended`. Rounding adds noise to it and drops
its 16 lowest bits: stochastic rounding a random number in [0, 2^16), compensated rounding 2^15, where the dropped bits, less
2^16 if they carried, are the compensation, an int16. Of float32 no bit is lost so, but below 2^-17 where the format is float16.

Element e of a whole parameter has the 16 bits (e & 7) of the block Philox4x32-7 [Salmon et al. 2011] of counter
(e >> 4, (e >> 36) | role << 16, step, stream) under the key `seed`, bits 0 to 15 of word 0 first; inverted if e & 8. So of two
neighbouring eights one tends up where the other tends down (antithetic variates): each is unbiased, their sum varies less, and
random numbers cost half. They depend on nothing else: neither on the backend nor on how a parameter is cut into shards. The
role of weights is 0, that of factor k is k - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..rounding import Rounding

SIXTEEN = (torch.float16, torch.bfloat16)
MASK = np.uint64(0xFFFFFFFF)
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
REBIAS, SMALLEST_NORMAL = (127 - 15) << 23, (127 - 14) << 23  # of a float16, as a float32


def philox(counter: Sequence[np.ndarray], seed: int, rounds: int = 7) -> list[np.ndarray]:
    """The four words of Philox4x32 for each counter of four words, uint64 arrays below 2^32.

    Ten rounds are its authors' default; seven are the fewest that pass every test of randomness there.
    """
    c = list(counter)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high = first >> np.uint64(32), second >> np.uint64(32)
        c = [high[1] ^ c[1] ^ np.uint64(key[0]), second & MASK, high[0] ^ c[3] ^ np.uint64(key[1]), first & MASK]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def noise(first: int, count: int, *, seed: int, step: int, stream: int, role: int) -> Tensor:
    """The random numbers below 2^16 of `count` elements from `first` on: int64 [count]."""
    blocks = np.arange(first >> 4, (first + count + 15) >> 4, dtype=np.uint64)
    high = (blocks >> np.uint64(32)) | np.uint64(role << 16)
    rest = [np.full_like(blocks, word & 0xFFFFFFFF) for word in (step, stream)]
    words = np.stack(philox([blocks & MASK, high, *rest], seed), -1)
    eight = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1).reshape(-1, 8).astype(np.int64)
    numbers = np.stack([eight, 0xFFFF - eight], 1).reshape(-1)
    return torch.from_numpy(numbers[first & 15 : (first & 15) + count])


def extended(x: Tensor, storage: torch.dtype) -> Tensor:
    """|x| of float32 in units of 2^-16 of the last place of `storage`: int64. Of infinity and NaN the 16 lowest bits are 0."""
    magnitude = x.view(torch.int32).long() & 0x7FFFFFFF
    if storage == torch.bfloat16:
        return torch.where(magnitude > 0x7F800000, (magnitude | 0x400000) & 0xFFFF0000, magnitude)
    result = (magnitude - REBIAS) << 3
    is_subnormal = magnitude < SMALLEST_NORMAL
    subnormal = (torch.where(is_subnormal, x.abs(), 0.0) * 2.0**40).long()
    result = torch.where(is_subnormal, subnormal, result)
    result = torch.where(magnitude >= (127 + 16) << 23, 0x7C000000, result)
    return torch.where(magnitude > 0x7F800000, 0x7E000000, result)


def contracted(extended: Tensor, storage: torch.dtype) -> Tensor:
    """The float32 that `extended` makes this of."""
    if storage == torch.bfloat16:
        return extended.int().view(torch.float32)
    is_subnormal = extended < 0x0400 << 16
    normal = ((extended >> 3) + REBIAS).int().view(torch.float32)
    return torch.where(is_subnormal, torch.where(is_subnormal, extended, 0).float() * 2.0**-40, normal)


def with_sign_of(magnitude: Tensor, x: Tensor, storage: torch.dtype) -> Tensor:
    sign = (x.view(torch.int32).long() >> 16) & 0x8000
    return (magnitude | sign).to(torch.int32).to(torch.int16).view(storage)


def round_stochastically(x: Tensor, noise: Tensor, storage: torch.dtype) -> Tensor:
    return with_sign_of((extended(x, storage) + noise) >> 16, x, storage)


def round_compensated(x: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as it is stored, and its compensation."""
    everything = extended(x, storage)
    low = (everything & 0xFFFF).to(torch.int32).to(torch.int16)
    return with_sign_of((everything + 0x8000) >> 16, x, storage), low


def widen_compensated(x: Tensor, compensation: Tensor) -> Tensor:
    """What round_compensated has split, in float32. A compensation that is left of another number does not turn the sign."""
    magnitude = x.view(torch.int16).long() & 0x7FFF
    size = contracted(((magnitude << 16) + compensation.long()).clamp(min=0), x.dtype)
    return torch.where(magnitude >= INFINITY[x.dtype], x.float(), size.copysign(x.float()))


def in_memory_order(x: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory: a flat view."""
    return x.as_strided((x.numel(),), (1,))


def of_tensor(rounding: Rounding, i: int) -> Rounding:
    """That of tensor i alone."""
    compensations = [role[i : i + 1] for role in rounding.compensations]
    one = slice(i, i + 1)
    return rounding._replace(streams=rounding.streams[one], firsts=rounding.firsts[one], compensations=compensations)


def compensation_of(rounding: Rounding, tensor: Tensor, i: int, role: int) -> Tensor | None:
    """That of tensor i of a role, if it has one."""
    return rounding.compensations[role][i] if rounding.mode == "compensated" and tensor.dtype in SIXTEEN else None


def load(tensor: Tensor, rounding: Rounding, i: int, role: int = 0) -> Tensor:
    """Tensor i of a role in the compute dtype."""
    compensation = compensation_of(rounding, tensor, i, role)
    if compensation is not None:
        return widen_compensated(tensor, compensation)
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def store(tensor: Tensor, x: Tensor, skip: Tensor, rounding: Rounding, i: int, role: int = 0) -> None:
    """Write x to tensor i of a role, unless `skip`; both are dense and share one element order."""
    compensation = compensation_of(rounding, tensor, i, role)
    if compensation is not None:
        stored, low = round_compensated(x.float(), tensor.dtype)
        tensor.copy_(torch.where(skip, tensor, stored))
        compensation.copy_(torch.where(skip, compensation, low))
    elif rounding.mode == "stochastic" and tensor.dtype in SIXTEEN:
        draws = {"seed": rounding.seed, "step": int(rounding.step), "stream": rounding.streams[i], "role": role}
        flat = in_memory_order(tensor)
        values = in_memory_order(torch.empty_like(tensor, dtype=torch.float32).copy_(x))
        random = noise(rounding.firsts[i], flat.numel(), **draws).to(x.device)
        flat.copy_(torch.where(skip, flat, round_stochastically(values, random, tensor.dtype)))
    else:
        tensor.copy_(torch.where(skip, tensor, x.to(tensor.dtype)))
