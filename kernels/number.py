"""Numbers that a kernel takes: on the host, or in memory of the device, where they are read when the kernel runs."""

from __future__ import annotations

from torch import Tensor

Number = float | Tensor  # a tensor of one element, on the device of the weights
Betas = tuple[Number, Number]
