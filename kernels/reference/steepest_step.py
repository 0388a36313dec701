"""Steepest descent in L_p, 1/p + 1/q = 1, with coupled and decoupled decay: the definition [Eq. 3, Eq. 5, Alg. 2].

    g <- g / grad_scale;  g <- -g if maximize;  g <- g + coupled_weight_decay w
    c <- beta1 m + (1 - beta1) g                    without momentum: c = g
    u <- sign(c) |c|^(q-1)
    w <- w (1 - lr weight_decay) - lr step_scale u
    m <- beta2 m + (1 - beta2) g

One torch operation per arithmetic operation, so each is rounded on its own: in float32 for 16- and 32-bit tensors, in float64
for 64-bit ones. Numbers such as 1 - lr weight_decay are formed in float64 and rounded once. Weights are stored as rounding.py
says, momenta to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from .rounding import load, store
from .signed_power import signed_power

CHUNK, BLOCK = 16384, 512  # elements: the order of the power sum


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """float64 computes in float64; float32, float16 and bfloat16 compute in float32."""
    return torch.float64 if storage == torch.float64 else torch.float32


def rounded(number: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor of `dtype` on `device`, formed in float64 and rounded once; a tensor is not read by the host."""
    return torch.as_tensor(number, dtype=torch.float64, device=device).reshape(()).to(dtype)


def double(number: Number) -> Number:
    return number.double() if isinstance(number, Tensor) else float(number)


def share_and_rest(beta: Number, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """beta and 1 - beta."""
    return rounded(beta, dtype, device), rounded(1 - double(beta), dtype, device)


def directions(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    betas: tuple[Number, Number],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    rounding: Rounding,
    role: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each tensor (w, g, c) in the compute dtype: weight, the gradient that momentum sees, the vector to follow."""
    for i, weight in enumerate(weights):
        dtype, device = compute_dtype(weight.dtype), weight.device
        w, g = load(weight, rounding, i, role), gradients[i].to(dtype)
        g = g * rounded(1.0 / double(grad_scale), dtype, device)
        if maximize:
            g = -g
        if coupled_weight_decay != 0:
            g = g + rounded(coupled_weight_decay, dtype, device) * w
        c = g
        if momenta is not None:
            beta1, rest = share_and_rest(betas[0], dtype, device)
            c = beta1 * momenta[i].to(dtype) + rest * g
        yield w, g, c


@torch.no_grad()
def steepest_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    lr: Number,
    q: float,
    betas: tuple[Number, Number],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    step_scale: Number,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
    role: int = 0,
) -> None:
    """Update `weights` and `momenta` in place; where `found_inf` is not 0 they keep their values.

    `role`: of the weights, in rounding.py.
    """
    rate = double(lr)
    options: dict[str, Any] = {"coupled_weight_decay": coupled_weight_decay, "maximize": maximize, "grad_scale": grad_scale}
    options |= {"betas": betas, "rounding": rounding, "role": role}
    for i, (w, g, c) in enumerate(directions(weights, gradients, momenta, **options)):
        dtype, device = w.dtype, w.device
        decay = rounded(1.0 - rate * weight_decay, dtype, device)
        step = rounded(rate * double(step_scale), dtype, device)
        skip = rounded(found_inf, dtype, device) != 0
        new = w * decay - step * signed_power(c, q)
        store(weights[i], new, skip, rounding, i, role)
        if momenta is not None:
            m = momenta[i].to(dtype)
            beta2, rest = share_and_rest(betas[1], dtype, device)
            momenta[i].copy_(torch.where(skip, m, beta2 * m + rest * g))


@torch.no_grad()
def steepest_power_sum(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    q: float,
    betas: tuple[Number, Number],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """sum |c|^q over all elements of all tensors: a 0-dim float64 tensor. ||c||_q^(2-q) is its power (2-q)/q.

    Added up in one order on every CPU: in a chunk the blocks, element by element; the sums of a block's places in halves; the
    sums of all chunks in halves.
    """
    options: dict[str, Any] = {"coupled_weight_decay": coupled_weight_decay, "maximize": maximize, "grad_scale": grad_scale}
    chunks = [torch.zeros(1, dtype=torch.float64, device=weights[0].device)]
    for _, _, c in directions(weights, gradients, momenta, betas=betas, rounding=rounding, **options):
        chunks.append(chunk_sums((c.double() * signed_power(c, q).double()).flatten()))
    return sum_in_halves(torch.cat(chunks[1:] or chunks))


def chunk_sums(powers: Tensor) -> Tensor:
    """The sum of each chunk of the powers of one tensor; zeros behind its last element change no bit."""
    size = CHUNK if powers.numel() > CHUNK else BLOCK
    powers = torch.nn.functional.pad(powers, (0, -powers.numel() % size))
    blocks = powers.view(-1, CHUNK // BLOCK if size == CHUNK else powers.numel() // BLOCK or 1, BLOCK)
    sums = blocks[:, 0]
    for i in range(1, blocks.shape[1]):
        sums = sums + blocks[:, i]
    return sum_in_halves(sums)


def sum_in_halves(numbers: Tensor) -> Tensor:
    """Along the last dimension: the i-th number and that half the length further on, until one is left. Zeros fill up."""
    count = numbers.shape[-1]
    numbers = torch.nn.functional.pad(numbers, (0, 2 ** max(count - 1, 0).bit_length() - count))
    while numbers.shape[-1] > 1:
        half = numbers.shape[-1] // 2
        numbers = numbers[..., :half] + numbers[..., half:]
    return numbers[..., 0]
