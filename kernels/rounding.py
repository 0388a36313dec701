"""What a call says of the rounding of its 16-bit weights and factors; reference/rounding.py defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Mode = Literal["nearest", "stochastic", "compensated"]
MODES: tuple[Mode, ...] = get_args(Mode)  # in the order of csrc/include/pysteep/rounding.h


class Rounding(NamedTuple):
    """`streams` and `firsts` hold a number for each tensor of the call, if stochastic.

    `compensations`, if compensated, holds for each role (the weights, or each factor that is stored) the int16 tensors of the
    call. A tensor begins at element firsts[i] of its parameter, which has the random numbers of stream streams[i].
    """

    mode: str = "nearest"
    seed: int = 0
    step: float | Tensor = 0.0
    streams: Sequence[int] = ()
    firsts: Sequence[int] = ()
    compensations: Sequence[Sequence[Tensor]] = ()


NEAREST = Rounding()
