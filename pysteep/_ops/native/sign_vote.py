"""sign_vote by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from torch import Tensor

from ... import _csrc
from .tensors import CODES, current, stream


def pack_signs(gradient: Tensor, words: Tensor, phase: int) -> None:
    """As kernels/reference/sign_vote.py."""
    rows, row_bytes = words.shape
    _run("pack_signs", (rows, gradient.shape[1], row_bytes), gradient, words, phase)


def count_votes(words: Tensor, result: Tensor) -> None:
    """As kernels/reference/sign_vote.py."""
    voters, row_bytes = words.shape
    _run("count_votes", (voters, result.numel(), row_bytes), result, words)


def _run(op: str, sizes: tuple[int, int, int], values: Tensor, words: Tensor, *phase: int) -> None:
    votes = _csrc.Votes(*sizes, values.data_ptr(), words.data_ptr(), CODES[values.dtype])
    if values.is_cuda:
        with current(values.device.index):
            getattr(_csrc, op + "_cuda")(votes, *phase, values.device.index, stream(values.device.index))
    else:
        getattr(_csrc, op + "_cpu")(votes, *phase)
