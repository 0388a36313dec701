"""What a step on the DTensors of FSDP2 may cost the host beside one on plain tensors: `python -m bench bars sharded`.

161 tensors of 8 elements, so that there is nothing but overhead, sharded over the one rank of a gloo group.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pysteep import SteepestDescent

from ..measure.reporting import Bar, Suite
from ..measure.timing import Step, medians

ROUNDS = 51
TENSORS, ELEMENTS = 161, 8  # the number of ResNet-50's
SETTINGS: dict[str, dict[str, Any]] = {
    "depth 1": {},
    "depth 1, momentum": {"betas": (0.9, 0.99)},
    "depth 3, tied": {"depth": 3},
    "depth 3, tied, momentum": {"depth": 3, "betas": (0.9, 0.99)},
    "depth 3, full": {"depth": 3, "storage": "full"},
    "depth 3, implicit": {"depth": 3, "storage": "implicit", "init": "balanced"},
    "bfloat16": {},
    "bfloat16, stochastic": {"rounding": "stochastic"},
}


class Products(nn.Module):
    """The inner product of its input with every parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([weight @ x for weight in self.weights]).sum()


def dtype_of(setting: str) -> torch.dtype:
    return torch.bfloat16 if setting.startswith("bfloat16") else torch.float32


def steps() -> dict[tuple[str, str], Step]:
    """The step of each setting on plain tensors and on those that FSDP2 made, with the gradients that it made."""
    found: dict[tuple[str, str], Step] = {}
    for setting, options in SETTINGS.items():
        for kind in ("plain", "sharded"):
            net = Products().to(dtype_of(setting))
            if kind == "sharded":
                fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
            net(torch.randn(ELEMENTS, dtype=dtype_of(setting))).backward()
            found[setting, kind] = SteepestDescent(net.parameters(), lr=1e-6, weight_decay=0.1, **options).step
    return found


def measure(rounds: int) -> Suite:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        times = medians(steps(), rounds)
        dist.destroy_process_group()
    lines = [f"| step, {TENSORS} tensors of {ELEMENTS} elements | plain, µs | sharded, µs | ratio |", "|---|---|---|---|"]
    bars = []
    for setting in SETTINGS:
        plain, sharded = times[setting, "plain"], times[setting, "sharded"]
        lines.append(f"| {setting} | {plain * 1e6:.0f} | {sharded * 1e6:.0f} | {sharded / plain:.2f} |")
        bars.append(Bar(f"{setting}: sharded / plain", sharded / plain, "<=", 1.5))
    nearest, stochastic = (times[setting, "sharded"] for setting in ("bfloat16", "bfloat16, stochastic"))
    bars.append(Bar("bfloat16, sharded: stochastic / nearest", stochastic / nearest, "<=", 1.5))
    return Suite(bars, ["\n".join(lines)], f"medians of {rounds} rounds taken in turn")
