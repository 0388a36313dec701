"""steepest_step by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _csrc
from .tensors import described, number

Number = float | Tensor


def steepest_step(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor] | None, **options: Any
) -> None:
    """As kernels/reference/steepest_step.py."""
    run_steepest_step(described(weights, gradients, momenta), **options)


def steepest_power_sum(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], momenta: Sequence[Tensor] | None, **options: Any
) -> Tensor:
    """As kernels/reference/steepest_step.py."""
    return run_steepest_power_sum(described(weights, gradients, momenta), **options)


def run_steepest_step(
    tensors: _csrc.Tensors,
    *,
    lr: Number,
    q: float,
    betas: tuple[float, float],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    step_scale: Number,
    grad_scale: Number,
    found_inf: Number,
) -> None:
    """`steepest_step` of tensors that are described already."""
    scalars = (number(lr), number(step_scale), number(grad_scale), number(found_inf))
    options = _csrc.SteepestOptions(q, *betas, weight_decay, coupled_weight_decay, maximize, *scalars)
    if tensors.on_cuda:
        with _current(tensors):
            _csrc.steepest_step_cuda(tensors, options, _stream(tensors))
    else:
        _csrc.steepest_step_cpu(tensors, options)


def run_steepest_power_sum(
    tensors: _csrc.Tensors,
    *,
    q: float,
    betas: tuple[float, float],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
) -> Tensor:
    """`steepest_power_sum` of tensors that are described already."""
    options = _csrc.SteepestOptions(q, *betas, 0.0, coupled_weight_decay, maximize, 0.0, 1.0, number(grad_scale), 0.0)
    if tensors.on_cuda:
        with _current(tensors):
            sums = torch.zeros(_csrc.CUDA_PARTIAL_SUMS, dtype=torch.float64, device=torch.device("cuda", tensors.device_index))
            _csrc.steepest_power_sum_cuda(tensors, options, sums.data_ptr(), _stream(tensors))
            return sums.sum()
    return torch.tensor(_csrc.steepest_power_sum_cpu(tensors, options), dtype=torch.float64)


def _current(tensors: _csrc.Tensors) -> AbstractContextManager[object]:
    """Make the tensors' GPU the current one; leave it alone if it already is."""
    index = tensors.device_index
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _stream(tensors: _csrc.Tensors) -> int:
    return torch.cuda.current_stream(tensors.device_index).cuda_stream
