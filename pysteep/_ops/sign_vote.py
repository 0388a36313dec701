"""sign_vote on tensors: checks and the choice of a home. Formulas: kernels/reference/sign_vote.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._numbers import as_integer
from .dispatch import Choice, check_backend, choose
from .layout import FLOATING

MAX_VOTERS = 65535
"""How many may vote, on every backend."""


def pack_signs(gradient: Tensor, *, phase: int = 0, backend: str | None = None) -> Tensor:
    """The signs of `gradient`, 8 of them a byte.

    Bit j % 8 of byte j // 8 is 1 where element j is positive. A bit has no third state: an element that is 0 or NaN is sent as
    positive where j + phase is even, as negative where it is odd. Voters who add their rank and the step to `phase` make the
    zeros of each pair of them cancel, and those of a single one cancel from step to step.

    Args:
        gradient: dense, float16, bfloat16, float32 or float64, of n elements in any shape.
        phase: whose turn it is; an integer, of which the lowest bit counts.
        backend: a name of `pysteep.backends()`; None chooses.

    Returns:
        uint8 [ceil(n / 8)]; the bits past the end are 0.

    Raises:
        TypeError: `gradient` is not as above, or `phase` is not an integer.
        ValueError, RuntimeError: `backend` is not a backend's name, or cannot serve this tensor here.
    """
    check_values("gradient", gradient)
    turn = as_integer(phase)
    if turn is None:
        raise TypeError(f"phase must be an integer; got {phase!r}")
    check_backend(backend)
    flat = gradient.detach().resolve_neg().contiguous().view(1, -1)
    return packed_rows(flat, bytes_of(flat.shape[1]), turn, backend)[0]


def count_votes(words: Tensor, numel: int, *, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """What the voters agree on: 1, -1, or 0 where as many voted for 1 as for -1.

    Args:
        words: uint8 [voters, bytes], a row from `pack_signs` for each of 1 to 65535 voters.
        numel: of the result, no more than 8 * bytes.
        dtype: of the result: float16, bfloat16, float32 or float64.
        backend: a name of `pysteep.backends()`; None chooses.

    Returns:
        a tensor of `numel` elements on the device of `words`.

    Raises:
        TypeError, ValueError: an argument is not as above.
        RuntimeError: `backend` cannot serve this tensor here.

    Source: the majority vote of signSGD, Bernstein et al., ICML 2018 (arXiv:1802.04434) and ICLR 2019 (arXiv:1810.05291).
    """
    if not isinstance(words, Tensor) or words.dtype != torch.uint8 or words.ndim != 2:
        got = f"{words.dtype} {tuple(words.shape)}" if isinstance(words, Tensor) else repr(words)
        raise TypeError(f"words must be a uint8 tensor [voters, bytes]; got {got}")
    if not 1 <= len(words) <= MAX_VOTERS:
        raise ValueError(f"words must have rows of 1 to {MAX_VOTERS} voters; got {len(words)}")
    size = as_integer(numel)
    if size is None or not 0 <= size <= 8 * words.shape[1]:
        raise ValueError(f"numel must be an int from 0 to the {8 * words.shape[1]} bits of a row of words; got {numel!r}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}")
    check_backend(backend)
    result = torch.empty(size, dtype=dtype, device=words.device)
    counted(words.contiguous(), result, backend)
    return result


def bytes_of(numel: int) -> int:
    """That hold a bit for each element."""
    return -(-numel // 8)


def packed_rows(gradient: Tensor, row_bytes: int, phase: int, backend: Choice) -> Tensor:
    """The signs of each row of the contiguous `gradient` [rows, n]: uint8 [rows, row_bytes], bits past the end 0."""
    words = torch.empty(len(gradient), row_bytes, dtype=torch.uint8, device=gradient.device)
    if words.numel():
        choose(backend, gradient.device, "sign_vote").home("sign_vote").pack_signs(gradient, words, phase)
    return words


def counted(words: Tensor, result: Tensor, backend: Choice) -> None:
    """Write to the contiguous `result` [n] what the rows of the contiguous `words` [voters, bytes] agree on."""
    if result.numel():
        choose(backend, result.device, "sign_vote").home("sign_vote").count_votes(words, result)


def check_values(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {values!r}")
    if values.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided); got {values.layout}")
    if type(values) not in (Tensor, Parameter) and is_traceable_wrapper_subclass(values):
        raise TypeError(f"{name} must hold its own memory; got a {type(values).__name__}")
    if values.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {values.dtype}")
