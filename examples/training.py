"""Training with a cosine schedule, mixed precision, several processes by torchrun, and checkpoints to go on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from image_data import Batches
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Process:
    """Which of the processes that torchrun started this is; the only one without torchrun."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


def start() -> Process:
    """Join the other processes, each with a GPU of its own where there are GPUs."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group()
    return Process(int(os.environ.get("RANK", "0")), world, device)


def finish(process: Process) -> None:
    """Leave the other processes once all have come here: one that ends while another still talks to it breaks it."""
    if process.world > 1:
        dist.barrier()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Recipe:
    """How long to train, in what precision, and where to keep what has been reached."""

    epochs: int
    amp: torch.dtype | None = None
    checkpoint: Path | None = None
    """File that is written after each epoch; training goes on from it, or is done at once if it had ended."""
    what: str = ""
    """What else a checkpoint must have been made with for training to go on from it."""


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    recipe: Recipe,
    process: Process,
    record: Callable[[nn.Module], dict[str, float]] = lambda _: {},
    advance: Callable[[], object] = lambda: None,
) -> list[dict[str, float]]:
    """Train `net` by cross-entropy; returns what `record` says of it before training and after each epoch."""
    device = process.device
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(batches))
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp is torch.float16)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    records: list[dict[str, float]] = []
    made_with = f"{recipe.what}, {recipe.epochs} epochs, {recipe.amp or torch.float32}"
    if recipe.checkpoint and recipe.checkpoint.exists():
        saved = torch.load(recipe.checkpoint, map_location=device, weights_only=True)
        if saved["made_with"] != made_with:
            raise SystemExit(f"{recipe.checkpoint} was made with {saved['made_with']}; this run has {made_with}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        records = saved["records"]
    else:
        records.append(record(net))
    model = DistributedDataParallel(net, [device] if device.type == "cuda" else None) if process.world > 1 else net
    for epoch in range(len(records) - 1, recipe.epochs):
        batches.set_epoch(epoch)
        net.train()
        for images, labels in batches:
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast(device.type, recipe.amp, enabled=recipe.amp is not None):
                loss = nn.functional.cross_entropy(model(images), labels.to(device, non_blocking=True))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            advance()
        records.append(record(net))
        if recipe.checkpoint and process.first:
            states = {name: part.state_dict() for name, part in parts.items()}
            save({**states, "records": records, "made_with": made_with}, recipe.checkpoint)
    return records


def save(content: dict[str, Any], path: Path) -> None:
    """Write beside `path`, then rename: a killed run leaves the last whole checkpoint."""
    temporary = path.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(path)


@torch.no_grad()
def accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], process: Process) -> float:
    """Share of right answers over all processes, in percent."""
    training = net.training
    net.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=process.device)
    for images, labels in batches:
        right = net(images.to(process.device)).argmax(1) == labels.to(process.device)
        counts += torch.stack([right.sum(), torch.tensor(len(right), device=process.device)])
    net.train(training)
    right_ones, all_of_them = process.sum(counts).tolist()
    return float(100 * right_ones / all_of_them)
