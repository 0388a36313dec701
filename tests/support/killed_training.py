"""A training that writes a checkpoint after every step and goes on from the last one: what test_killed.py kills."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pysteep import SteepestDescent

DECAY = {"lr": 0.01, "weight_decay": 0.1}
MOMENTUM = {**DECAY, "betas": (0.9, 0.99), "coupled_weight_decay": 0.01}
IMPLICIT = {**DECAY, "q": 1.5, "depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.5}
STOCHASTIC = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}
COMPENSATED = {"dtype": torch.bfloat16, "rounding": "compensated"}
# What differs from one training to the next: options of SteepestDescent, and the dtype of the net.
OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": MOMENTUM,
    "normalised": {**MOMENTUM, "q": 1.5, "normalize": True},
    "bfloat16": {**MOMENTUM, "dtype": torch.bfloat16},
    "full": {**MOMENTUM, "depth": 3, "storage": "full", "init": "lambda", "scale": 0.7},
    "tied": {**MOMENTUM, "q": 1.25, "depth": 3, "init": "identity"},
    "tied bfloat16": {**MOMENTUM, "depth": 3, "init": "balanced", "dtype": torch.bfloat16},
    "implicit": IMPLICIT,
    "stochastic": {**MOMENTUM, **STOCHASTIC, "q": 1.5},
    "stochastic tied": {**MOMENTUM, **STOCHASTIC, "depth": 3, "init": "balanced"},
    "compensated": {**MOMENTUM, **COMPENSATED, "state_dtype": torch.float32},
    "compensated implicit": {**IMPLICIT, **COMPENSATED},
}


class Training:
    """A net, its optimiser and a scheduler, from the file where there is one."""

    def __init__(self, options: dict[str, Any], path: Path, width: int) -> None:
        torch.manual_seed(1)
        options = dict(options)
        self.path, self.width, self.dtype = path, width, options.pop("dtype", torch.float32)
        self.net = nn.Sequential(nn.Linear(width, 2 * width + 1), nn.Tanh(), nn.Linear(2 * width + 1, 1)).to(self.dtype)
        self.optimizer = SteepestDescent(self.net.parameters(), **options)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=10_000, cycle_momentum=False)
        self.steps = 0
        if path.exists():
            self.load()

    def step(self) -> None:
        draw = torch.Generator().manual_seed(self.steps)
        rows = torch.randn(16, self.width, generator=draw).to(self.dtype)
        loss = ((self.net(rows) - rows.sum(1, keepdim=True).tanh()) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1

    def save(self) -> None:
        """At once: a process that is killed here leaves the file of the step before."""
        parts = {name: getattr(self, name).state_dict() for name in ("net", "optimizer", "scheduler")}
        unfinished = self.path.with_suffix(".unfinished")
        torch.save({"steps": self.steps, **parts}, unfinished)
        os.replace(unfinished, self.path)  # noqa: PTH105

    def load(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        self.steps = saved["steps"]
        for name in ("net", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(saved[name])


def train(folder: str, steps: int, width: int) -> None:
    """Take turns until every training has made its `steps`."""
    torch.set_num_threads(1)
    trainings = [Training(options, Path(folder, f"{name}.pt"), width) for name, options in OPTIONS.items()]
    while unfinished := [training for training in trainings if training.steps < steps]:
        for training in unfinished:
            training.step()
            training.save()
