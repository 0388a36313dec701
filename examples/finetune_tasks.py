"""Pretrained nets with fresh heads, and what to fine-tune them on: digits by default, torchvision's models and data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from image_data import Batches, InMemory
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from training import Process, Recipe, train


@dataclass(frozen=True)
class Task:
    """`net` is not changed; `hessian` are the batches over whose mean loss its Hessian is taken."""

    net: nn.Module
    train: Batches
    validation: Batches
    test: Batches
    hessian: list[tuple[Tensor, Tensor]]


def small_net() -> nn.Sequential:
    """22 000 parameters; images [n, 1, 8, 8], logits [n, 5]."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)),
    )


def digits(seed: int, epochs: int, process: Process) -> Task:
    """Pretrained on the digits 0 to 4. Of the digits 5 to 9, 60 % are for training, 15 % for validation, 25 % for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).div(16)[:, None]
    labels = torch.as_tensor(data.target, dtype=torch.long)
    old, new = (labels < 5).nonzero()[:, 0], (labels >= 5).nonzero()[:, 0]
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))]

    def batches(part: Tensor, training: bool) -> InMemory:
        return InMemory(images[part], labels[part] % 5, 32, training, seed, process.rank, process.world)

    torch.manual_seed(seed)
    net = small_net().to(process.device)
    train(net, torch.optim.Adam(net.parameters(), lr=1e-3), batches(old, training=True), Recipe(epochs), process)
    net[-1] = nn.Linear(64, 5).to(process.device)
    ours, validation, test = new.tensor_split((int(0.6 * len(new)), int(0.75 * len(new))))
    return Task(net, batches(ours, True), batches(validation, False), batches(test, False), [(images[ours], labels[ours] % 5)])


class _Loader:
    """Batches of a torchvision dataset."""

    def __init__(self, data: Any, batch: int, training: bool, seed: int, process: Process) -> None:
        self.generator, self.seed = torch.Generator().manual_seed(seed), seed
        mine = data if training else Subset(data, range(process.rank, len(data), process.world))
        self.loader = DataLoader(mine, batch, training, generator=self.generator, num_workers=8, persistent_workers=True)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(10_000 * self.seed + epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def of_torchvision(model: str, dataset: str, root: Path, batch: int, seed: int, process: Process) -> Task:
    """ImageNet's weights of torchvision, with a fresh head for CIFAR-10 or Flowers as torchvision stores them under `root`."""
    from torchvision import datasets, models

    torch.manual_seed(seed)
    classes = {"cifar10": 10, "flowers": 102}[dataset]
    if model == "resnet18":
        weights: Any = models.ResNet18_Weights.IMAGENET1K_V1
        net: Any = models.resnet18(weights=weights)
        net.fc = nn.Linear(net.fc.in_features, classes)
    else:
        weights = models.ViT_L_16_Weights.IMAGENET1K_V1
        net = models.vit_l_16(weights=weights)
        net.heads.head = nn.Linear(net.heads.head.in_features, classes)
    transform = weights.transforms()
    if dataset == "cifar10":
        whole = datasets.CIFAR10(root, train=True, transform=transform)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
        ours, validation = Subset(whole, order[5000:]), Subset(whole, order[:5000])
        test = datasets.CIFAR10(root, train=False, transform=transform)
    else:
        ours, validation, test = (datasets.Flowers102(root, split, transform) for split in ("train", "val", "test"))
    loaders = [_Loader(part, batch, part is ours, seed, process) for part in (ours, validation, test)]
    sample = [batch for batch, _ in zip(DataLoader(ours, batch), range(8), strict=False)]
    return Task(net.to(process.device), *loaders, sample)
