"""Images with labels: scikit-learn's digits, CIFAR-10 from its own files, and folders such as ImageNet's by torchvision."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler


class Batches(Protocol):
    """Pairs (images [n, channels, size, size], labels [n]), in an order that `set_epoch` draws."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


@dataclass
class InMemory:
    """Batches of tensors, of each of which every process of `world` gets its share; for training, all of one size."""

    images: Tensor
    labels: Tensor
    batch: int
    training: bool
    seed: int = 0
    rank: int = 0
    world: int = 1
    crop: int = 0
    """Pixels of padding from which a crop of the images' size is drawn, half of them flipped; 0: images as they are."""
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch)
        return full if self.training else full + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(10_000 * self.seed + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator) if self.training else torch.arange(len(self.labels))
        for batch in order.split(self.batch)[: len(self)]:
            images = self.images[batch]
            if self.training and self.crop:
                images = self._augmented(images, generator)
            labels = self.labels[batch]
            yield images[self.rank :: self.world], labels[self.rank :: self.world]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        flipped = torch.rand(n, generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        padded = F.pad(images, [self.crop] * 4)
        corners = torch.randint(2 * self.crop + 1, (n, 2), generator=generator).tolist()
        return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)])


@dataclass(frozen=True)
class Dataset:
    """What to train on and what to test on."""

    name: str
    train: Batches
    test: Batches
    channels: int
    classes: int


def digits(batch: int, seed: int, rank: int, world: int, size: int = 16) -> Dataset:
    """1797 digits of 8 x 8 pixels, upsampled to `size`; a quarter of them, drawn by `seed`, is for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).div(16).sub(0.3)[:, None]
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.split((len(order) // 4, len(order) - len(order) // 4))
    train_set = InMemory(images[train], labels[train], batch, True, seed, rank, world)
    test_set = InMemory(images[test], labels[test], 512, False, seed, rank, world)
    return Dataset(f"digits, upsampled to {size} x {size}", train_set, test_set, 1, 10)


class _NumPyOnly(pickle.Unpickler):
    """Reads arrays and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy.core", "numpy._core"), name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"a CIFAR-10 file holds arrays only; this one asks for {module}.{name}")


def cifar10(folder: Path, batch: int, seed: int, rank: int, world: int) -> Dataset:
    """CIFAR-10 from the files of its Python version, cifar-10-batches-py: training images cropped and flipped."""

    def read(names: list[str]) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for name in names:
            with (folder / name).open("rb") as file:
                content = _NumPyOnly(file, encoding="bytes").load()
            images.append(torch.from_numpy(content[b"data"]).reshape(-1, 3, 32, 32))
            labels += content[b"labels"]
        return torch.cat(images).float().div_(255), torch.tensor(labels)

    (images, labels), (test, test_labels) = read([f"data_batch_{i}" for i in range(1, 6)]), read(["test_batch"])
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    train_set = InMemory((images - mean) / std, labels, batch, True, seed, rank, world, crop=4)
    test_set = InMemory((test - mean) / std, test_labels, 512, False, seed, rank, world)
    return Dataset("CIFAR-10", train_set, test_set, 3, 10)


class _FromFolder:
    """The same of files, read by as many processes as a GPU needs."""

    def __init__(self, folder: Path, transform: Any, batch: int, training: bool, seed: int, rank: int, world: int) -> None:
        from torchvision.datasets import ImageFolder  # only for folders of images

        images = ImageFolder(folder, transform)
        self.classes = len(images.classes)
        self.sampler = DistributedSampler(images, world, rank, seed=seed) if training else None
        self.loader = DataLoader(
            images if training else Subset(images, range(rank, len(images), world)),
            batch // world,
            sampler=self.sampler,
            num_workers=8,
            pin_memory=True,
            persistent_workers=True,
            drop_last=training,
        )

    def set_epoch(self, epoch: int) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def folders(folder: Path, batch: int, seed: int, rank: int, world: int) -> Dataset:
    """`folder`/train/<class>/... and `folder`/val/<class>/...: crops of 224 pixels, as is usual for ImageNet."""
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    train = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *last])
    test = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *last])
    train_set = _FromFolder(folder / "train", train, batch, True, seed, rank, world)
    test_set = _FromFolder(folder / "val", test, batch, False, seed, rank, world)
    return Dataset(str(folder), train_set, test_set, 3, train_set.classes)


def load(data: Path | None, batch: int, seed: int, rank: int, world: int) -> Dataset:
    """Digits where `data` is None, else what lies in that folder."""
    if data is None:
        return digits(batch, seed, rank, world)
    for folder in (data, data / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            return cifar10(folder, batch, seed, rank, world)
    if (data / "train").is_dir() and (data / "val").is_dir():
        return folders(data, batch, seed, rank, world)
    raise SystemExit(f"--data must be a folder with cifar-10-batches-py, or with train and val; {data} has neither")
