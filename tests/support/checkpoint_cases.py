"""What tests of compare_checkpoints share: its definition in float64, numbers to compare, files to hold them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pysteep.diagnostics import CheckpointComparison

Q, K = "layers.{}.q_proj.weight", "layers.{}.k_proj.weight"


def flips(before: Tensor, after: Tensor) -> int:
    return int((before.double().sign() * after.double().sign() < 0).sum())


def delta(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], q: int) -> float:
    before, after = (
        ((a.double().abs() ** q).sum() - (b.double().abs() ** q).sum()).abs() for a, b in zip(query, key, strict=True)
    )
    return float(after - before)


def assert_is_defined(
    result: CheckpointComparison, before: dict[str, Tensor], after: dict[str, Tensor], pairs: list[tuple[Tensor, ...]]
) -> None:
    """Every number of `result`; `pairs` are (query before, query after, key before, key after)."""
    names = [name for name in before if name in after and before[name].shape == after[name].shape]
    assert result.flips == sum(flips(before[name], after[name]) for name in names)
    assert result.weights == sum(before[name].numel() for name in names)
    assert result.total_percent == pytest.approx(100 * result.flips / result.weights)
    assert result.tensors == len(names)
    assert len(result.layers) == len(pairs)
    assert result.query_flips.tolist() == [flips(*pair[:2]) for pair in pairs]
    assert result.key_flips.tolist() == [flips(*pair[2:]) for pair in pairs]
    assert result.query_weights.tolist() == [pair[0].numel() for pair in pairs]
    assert result.key_weights.tolist() == [pair[2].numel() for pair in pairs]
    for q, found in ((1, result.delta_l1), (2, result.delta_l2)):
        expected = [delta(pair[:2], pair[2:], q) for pair in pairs]
        scale = max((float((tensor.double().abs() ** q).sum()) for pair in pairs for tensor in pair), default=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * scale)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
    """Random numbers with zeros of both signs, subnormals, and NaN and infinities of both signs if asked for."""
    numbers = torch.randn(shape).to(dtype)
    special = [0.0, -0.0, torch.finfo(dtype).smallest_normal / 4, -torch.finfo(dtype).smallest_normal / 4]
    special += [] if finite else [math.nan, -math.nan, math.inf, -math.inf]
    for value in special:
        numbers[torch.rand(shape) < 0.05] = value
    return numbers


def saved(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path
