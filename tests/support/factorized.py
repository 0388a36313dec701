"""What the tests of factorised modules share: a small net, its batches, and ways to look at factors."""

from __future__ import annotations

import torch
from torch import nn

RULES = {
    "identity": {},
    "balanced": {},
    "lambda": {"scale": 0.3, "q": 1.5},
    "saddle": {"scale": 0.1},
    "dwf": {},
    "variance": {},
}
EXACT = ("identity", "balanced", "lambda")


def build_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    return net.to(memory_format=torch.channels_last)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(net, optimizer, steps):
    losses = []
    for seed in range(steps):
        x, y = batch(seed % 4)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def factors_of(module, attribute="weight"):
    return list(module.parametrizations[attribute].parameters())


def assert_same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
