"""diagonal_flow by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from torch import Tensor

from ... import _csrc
from .tensors import CODES, current, stream

LOSSES = ("mse", "exponential")


def diagonal_flow(
    first: Tensor,
    rest: Tensor,
    moments: Tensor | None,
    Z: Tensor,
    y: Tensor,
    *,
    problem: Tensor,
    depth: Tensor,
    seed: Tensor,
    q: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    coupled_weight_decay: Tensor,
    batch_size: int,
    loss: str,
    reduction: str,
    betas: tuple[float, float],
    epsilon: float,
    begin: int,
    end: int,
) -> None:
    """As kernels/reference/diagonal_flow.py."""
    tensors = (first, rest, moments, Z, y)
    of_runs = (problem, depth, seed, q, lr, weight_decay, coupled_weight_decay)
    flows = _csrc.DiagonalFlows(
        (len(first), Z.shape[1], Z.shape[2]),
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        [tensor.data_ptr() for tensor in of_runs],
        batch_size,
        LOSSES.index(loss),
        reduction == "mean",
        (*betas, epsilon),
        CODES[first.dtype],
    )
    if first.is_cuda:
        with current(first.device.index):
            _csrc.diagonal_flow_cuda(flows, begin, end, first.device.index, stream(first.device.index))
    else:
        _csrc.diagonal_flow_cpu(flows, begin, end)
