"""What the tests of training in several processes share: a net of odd sizes, batches, options, comparisons."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.cases import same_bits
from tests.support.tolerances import PEER_RTOL

DEPTHS: list[dict[str, Any]] = [
    {},
    {"betas": (0.9, 0.99), "coupled_weight_decay": 0.05},
    {"depth": 3, "betas": (0.9, 0.99), "coupled_weight_decay": 0.05},
    {"depth": 3, "storage": "full"},
    {"depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.4},
    {"depth": 10, "init": "balanced"},
    {"depth": 10, "storage": "full", "init": "lambda", "scale": 0.9, "betas": (0.5, 0.9)},
    {"depth": 10, "storage": "implicit", "init": "balanced"},
]
"""Depth 1 without and with momentum, and larger depths in every storage."""

Batch = tuple[Tensor, Tensor]


def build() -> nn.Sequential:
    """Layers of 13 and 5 rows, and one of a single row."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1))


def sharded(net: nn.Module, dtype: torch.dtype | None = None, **policy: Any) -> nn.Module:
    """A copy whose layers are sharded over all ranks."""
    net, mesh = copy.deepcopy(plain(net)).to(dtype), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **policy)
    fully_shard(net, mesh=mesh, **policy)
    return net


def plain(net: nn.Module) -> nn.Module:
    """The net itself, or a new one that holds all of a sharded one's weights."""
    weights = [whole(param) for param in net.parameters()]
    if not isinstance(next(net.parameters()), DTensor):
        return net
    new = build()
    with torch.no_grad():
        for param, weight in zip(new.parameters(), weights, strict=True):
            param.copy_(weight)
    return new


def options(**changes: Any) -> dict[str, Any]:
    """Decay on."""
    return {"lr": 0.01, "q": 1.5, "weight_decay": 0.1, **changes}


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(count)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> list[float]:
    """The losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_bits(net: nn.Module, other: nn.Module) -> None:
    for (name, param), twin in zip(net.named_parameters(), other.parameters(), strict=True):
        assert same_bits(whole(param), whole(twin)), name


def assert_close(net: nn.Module, other: nn.Module) -> None:
    """To PEER_RTOL of the largest weight."""
    pairs = [(whole(param), whole(twin)) for param, twin in zip(net.parameters(), other.parameters(), strict=True)]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= PEER_RTOL * largest
