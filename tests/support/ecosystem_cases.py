"""What tests of training libraries share: a model, data, options, and a loop by hand that they must do as well as."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pysteep import SteepestDescent, param_groups
from tests.support.cases import same_bits

STEPS, BATCH = 6, 4

OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {"q": 1.5, "betas": (0.9, 0.99)},
    "depth 3, full": {"depth": 3, "q": 1.5, "storage": "full", "betas": (0.9, 0.99)},
    "depth 3, implicit": {"depth": 3, "q": 1.5, "storage": "implicit", "init": "balanced"},
}


class Classifier(nn.Module):
    """What Trainer asks of a model: a forward pass that returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(23, 7)
        self.hidden = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.head = nn.Linear(13, 5)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.norm(torch.tanh(self.hidden(self.embedding(tokens).mean(-2))))
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 23, (STEPS * BATCH * 2, 9), generator=generator)
        self.labels = torch.randint(0, 5, (STEPS * BATCH * 2,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[i], "labels": self.labels[i]}


def batches(accumulated: int, epoch: int = STEPS) -> list[list[dict[str, Tensor]]]:
    """Of each step, those whose gradients add up, in the order of the data, which begin anew after `epoch` steps."""
    texts, size = Texts(), BATCH // accumulated
    parts = [{"tokens": texts.tokens[i : i + size], "labels": texts.labels[i : i + size]} for i in range(0, len(texts), size)]
    return [parts[i % epoch * accumulated : (i % epoch + 1) * accumulated] for i in range(STEPS)]


def by_hand(
    options: dict[str, Any],
    accumulated: int = 1,
    clip: float = math.inf,
    epoch: int = STEPS,
    in_order_of: Callable[[nn.Module, SteepestDescent], Iterable[Tensor]] = lambda net, _: net.parameters(),
) -> list[Tensor]:
    """The parameters after STEPS steps, without any library; the norm that is clipped is summed in a library's order."""
    net = Classifier()
    optimizer, scheduler = optimizer_of(net, options)
    for step in batches(accumulated, epoch):
        for part in step:
            (net(**part)["loss"] / accumulated).backward()
        nn.utils.clip_grad_norm_(in_order_of(net, optimizer), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return parameters(net)


def optimizer_of(net: nn.Module, options: dict[str, Any]) -> tuple[SteepestDescent, Any]:
    groups = param_groups(net, depth=options.get("depth", 1))
    optimizer = SteepestDescent(groups, lr=0.02, weight_decay=0.1, **{k: v for k, v in options.items() if k != "depth"})
    return optimizer, CosineAnnealingLR(optimizer, T_max=2 * STEPS)


def parameters(net: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in net.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))
