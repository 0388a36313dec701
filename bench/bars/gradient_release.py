"""What pysteep.gradient_release must save of a training step's memory: `python -m bench bars gradient_release`, on Linux.

Each contender trains in a process of its own, in which the kernel's record of the peak is started anew before the step that is
measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysteep import SteepestDescent, gradient_release

from ..measure.reporting import Bar, Suite

ROUNDS = 1
MB = 1e6
TOKENS = 64
LAYERS = 24

OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {},
    "depth 3, momentum": {"depth": 3, "betas": (0.9, 0.99)},
}


def mlp() -> tuple[nn.Module, Tensor]:
    """24 layers of 1024 x 1024."""
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*layers), torch.randn(TOKENS, 1024)


def transformer() -> tuple[nn.Module, Tensor]:
    """24 layers of width 304."""
    layers = [nn.TransformerEncoderLayer(304, 8, 4 * 304, dropout=0.0, batch_first=True) for _ in range(LAYERS)]
    return nn.Sequential(*layers), torch.randn(TOKENS // 16, 16, 304)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"MLP": mlp, "transformer": transformer}


def memory(key: str) -> int:
    """Of this process, in bytes, as the kernel counts it: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return 1024 * int(line.split()[1])


def measured(model: str, options: str, release: bool) -> tuple[int, int, int]:
    """Bytes of all parameters, and how far the third step goes beyond what lies there between two: forward, and in all."""
    torch.manual_seed(0)
    net, x = MODELS[model]()
    optimizer = SteepestDescent(net.parameters(), lr=1e-4, weight_decay=0.1, **OPTIONS[options])
    if release:
        gradient_release(net, optimizer)
    before = forward = 0
    for _ in range(3):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now: proc(5)
        loss = net(x).square().mean()
        forward = memory("VmHWM")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(param.nbytes for param in net.parameters()), forward - before, memory("VmHWM") - before


def in_own_process(*contender: str) -> tuple[int, int, int]:
    """`measured` where large blocks go back to the kernel as soon as they are freed."""
    run = [sys.executable, "-m", "bench.bars.gradient_release", *contender]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout
    size, forward, peak = map(int, output.split())
    return size, forward, peak


def measure(_: int) -> Suite:
    lines = [
        f"| {LAYERS} layers | options | all gradients, MB | forward pass | a step | a step with gradient_release | saved |",
        "|---" * 7 + "|",
    ]
    bars = []
    for model in MODELS:
        for options in OPTIONS:
            size, _, without = in_own_process(model, options, "without")
            _, forward, released = in_own_process(model, options, "release")
            sizes = (size, forward, without, released, without - released)
            lines.append(f"| {model} | {options} | {' | '.join(f'{number / MB:.1f}' for number in sizes)} |")
            bars.append(
                Bar(f"{model}, {options}: beyond the forward pass / all gradients", (released - forward) / size, "<=", 0.1)
            )
            bars.append(Bar(f"{model}, {options}: saved / all gradients", (without - released) / size, ">=", 0.7))
    return Suite(bars, ["\n".join(lines)], f"{TOKENS} tokens, peak resident memory of a step beyond that before it")


if __name__ == "__main__":
    print(*measured(sys.argv[1], sys.argv[2], sys.argv[3] == "release"))
