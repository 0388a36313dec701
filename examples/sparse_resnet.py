"""Tables 6 and 7, Figures 5b and 11 to 15: coupled against decoupled decay on a residual net of products of L factors.

Adam and AdamW on factors that are parameters (`pysteep.factorize`), and sign descent with either decay on factors that are the
optimiser's state (`SteepestDescent(depth=L)`). By default a ResNet-20 on scikit-learn's digits, upsampled, in minutes; with
--data DIR on CIFAR-10 or folders of images, by torchrun on several GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from image_data import load
from matplotlib.figure import Figure
from paper import argument_parser, mean_and_interval, settings_of
from resnet import MODELS
from torch import nn
from tqdm import tqdm
from training import Process, Recipe, accuracy, finish, start, train

import pysteep

COLOURS = {2: "#c1442d", 4: "#d99a2b", 10: "#2f5d8a"}


@dataclass(frozen=True)
class Method:
    """A family of rows: how the factors are kept, and which optimiser takes the steps with which decay."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    option: str
    """The optimiser's name for this decay."""
    in_optimizer: bool
    """Whether depth is the optimiser's option, or factors are parameters."""


METHODS = (
    Method("Adam, coupled", torch.optim.Adam, "weight_decay", False),
    Method("AdamW, decoupled", torch.optim.AdamW, "weight_decay", False),
    Method("sign descent, coupled", pysteep.SteepestDescent, "coupled_weight_decay", True),
    Method("sign descent, decoupled", pysteep.SteepestDescent, "weight_decay", True),
)

# (method, depth, decay) -> accuracy of ResNet-20 on CIFAR-10 [Table 6] and of ResNet-50 on ImageNet [Table 7].
PAPER = {
    ("Adam, coupled", 2, 1e-1): ("64.36 ± 2.70", "1.95 ± 0.48"),
    ("Adam, coupled", 2, 1e-4): ("88.27 ± 0.08", "73.35 ± 0.05"),
    ("Adam, coupled", 4, 1e-1): ("58.23 ± 4.98", "–"),
    ("Adam, coupled", 4, 1e-4): ("86.55 ± 0.25", "–"),
    ("Adam, coupled", 10, 1e-1): ("43.13 ± 3.73", "0.58 ± 0.06"),
    ("Adam, coupled", 10, 1e-4): ("81.99 ± 0.05", "9.78 ± 0.94"),
    ("AdamW, decoupled", 2, 1e-1): ("89.75 ± 0.20", "76.23 ± 0.07"),
    ("AdamW, decoupled", 2, 1e-4): ("89.29 ± 0.28", "73.32 ± 0.11"),
    ("AdamW, decoupled", 4, 1e-1): ("89.73 ± 0.18", "–"),
    ("AdamW, decoupled", 4, 1e-4): ("89.38 ± 0.35", "–"),
    ("AdamW, decoupled", 10, 1e-1): ("89.33 ± 0.23", "62.20 ± 0.25"),
    ("AdamW, decoupled", 10, 1e-4): ("89.49 ± 0.06", "73.19 ± 0.04"),
}


@dataclass(frozen=True)
class Work:
    """One training run."""

    method: Method
    depth: int
    decay: float
    seed: int

    @property
    def name(self) -> str:
        """For a file."""
        return f"{self.method.name.replace(', ', '-').replace(' ', '-')}-{self.depth}-{self.decay:g}-{self.seed}"

    def build(self, net: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The weights of linear maps get depth and decay; biases and norms neither."""
        weights, others = ([param for _, param in group["params"]] for group in pysteep.param_groups(net, self.depth))
        deep: dict[str, object] = {}
        if self.method.in_optimizer:
            deep["depth"] = self.depth
        else:
            pysteep.factorize(net, self.depth)
            kept = {id(param) for param in others}
            weights = [param for param in net.parameters() if id(param) not in kept]
        groups = [{"params": weights, self.method.option: self.decay, **deep}, {"params": others}]
        return self.method.optimizer(groups, lr=lr, weight_decay=0.0)  # type: ignore[call-arg]

    def run(self, asked: Asked, process: Process, advance: Callable[[], object]) -> list[dict[str, float]]:
        """Accuracy and L1 norm before training and after each epoch."""
        torch.manual_seed(self.seed)
        data = load(asked.data, asked.batch, self.seed, process.rank, process.world)
        net = MODELS[asked.model](data.channels, data.classes).to(process.device, memory_format=torch.channels_last)
        names = [name for name, _ in pysteep.param_groups(net, self.depth)[0]["params"]]
        optimizer = self.build(net, asked.lr)

        def record(net: nn.Module) -> dict[str, float]:
            weights = pysteep.dense_state_dict(net)
            l1 = sum(float(weights[name].abs().sum(dtype=torch.float64)) for name in names)
            return {"accuracy": accuracy(net, data.test, process), "l1": l1}

        checkpoint = asked.checkpoints / f"{self.name}.pt" if asked.checkpoints else None
        recipe = Recipe(
            asked.epochs, asked.amp, checkpoint, f"{asked.model} on {data.name}, batch {asked.batch}, lr {asked.lr:g}"
        )
        return train(net, optimizer, data.train, recipe, process, record, advance)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    model: str
    data: Path | None
    depths: list[int]
    decays: list[float]
    seeds: int
    epochs: int
    batch: int
    lr: float
    amp: torch.dtype | None
    checkpoints: Path | None


Results = dict[tuple[str, int, float], list[list[dict[str, float]]]]
"""(method, depth, decay) -> for each seed, for each epoch, what was recorded."""


def column(records: list[list[dict[str, float]]], name: str) -> np.ndarray:
    """[seeds, epochs + 1]."""
    return np.array([[epoch[name] for epoch in of_seed] for of_seed in records])


def draw(results: Results, asked: Asked, title: str) -> Figure:
    """L1 norm over training, a panel for each method."""
    figure, panels = plt.subplots(1, len(METHODS), figsize=(15, 4.8), sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        for depth in asked.depths:
            for decay, dashes in zip(asked.decays, ("-", "--", ":"), strict=False):
                norms = column(results[method.name, depth, decay], "l1")
                epochs = np.arange(norms.shape[1])
                axes.plot(epochs, norms.mean(0), dashes, color=COLOURS.get(depth), label=f"L = {depth}, decay {decay:g}")
                axes.fill_between(epochs, norms.min(0), norms.max(0), color=COLOURS.get(depth), alpha=0.15, linewidth=0)
        axes.set(title=method.name, xlabel="epoch", yscale="log")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("L1 norm of the weights x")
    at_start = next(iter(results.values()))[0][0]["l1"]
    panels[0].set_ylim(3e-3 * at_start, 10 * at_start)  # what is below has collapsed
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle(title)
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def table(results: Results) -> list[str]:
    """Accuracies and L1 norms beside the paper's accuracies."""
    paper = "paper, ResNet-20, CIFAR-10 | paper, ResNet-50, ImageNet"
    lines = [f"| method | depth | decay | accuracy, % | L1 norm, end / start | {paper} |", "|---|---|---|---|---|---|---|"]
    for (method, depth, decay), records in results.items():
        norms = column(records, "l1")
        theirs = PAPER.get((method, depth, decay), ("–", "–"))
        accuracies = mean_and_interval(column(records, "accuracy")[:, -1])
        change = f"{(norms[:, -1] / norms[:, 0]).mean():.2g}"
        lines.append(f"| {method} | {depth} | {decay:g} | {accuracies} | {change} | {theirs[0]} | {theirs[1]} |")
    return lines


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of CIFAR-10 or with train/ and val/ (default: digits)")
    add("--model", choices=MODELS, default="resnet20")
    add("--depths", type=int, nargs="+", metavar="L", help="default 2 4 10, with --quick 2 10")
    add("--decays", type=float, nargs="+", default=[1e-1, 1e-4], metavar="D")
    add("--seeds", type=int, help="default 3, with --quick 1")
    add("--epochs", type=int, help="default 10, with --quick 2; the usual for CIFAR-10 is 150, for ImageNet 100")
    add("--batch", type=int, default=64, help="over all processes (default 64)")
    add("--lr", type=float, default=1e-2, help="of every method, cosine to 0 (default 0.01)")
    add("--amp", choices=("float16", "bfloat16"), help="precision of forward and backward (default: float32)")
    add("--checkpoints", type=Path, metavar="DIR", help="folder for checkpoints, from which the same command goes on")
    parsed = parser.parse_args()
    quick = parsed.quick
    asked = Asked(
        parsed.model,
        parsed.data,
        parsed.depths or ([2, 10] if quick else [2, 4, 10]),
        parsed.decays,
        parsed.seeds or (1 if quick else 3),
        parsed.epochs or (2 if quick else 10),
        parsed.batch,
        parsed.lr,
        getattr(torch, parsed.amp) if parsed.amp else None,
        parsed.checkpoints,
    )
    process = start()
    if asked.checkpoints:
        asked.checkpoints.mkdir(parents=True, exist_ok=True)
    works = [
        Work(method, depth, decay, seed)
        for method in METHODS
        for depth in asked.depths
        for decay in asked.decays
        for seed in range(asked.seeds)
    ]
    data = load(asked.data, asked.batch, 0, process.rank, process.world)
    results: Results = {}
    with tqdm(total=len(works) * asked.epochs * len(data.train), unit="step", disable=not process.first) as bar:
        for work in works:
            bar.set_description(work.name)
            records = work.run(asked, process, bar.update)
            results.setdefault((work.method.name, work.depth, work.decay), []).append(records)
    if process.first:
        settings = settings_of(parsed)
        title = f"{asked.model} on {data.name}: {asked.epochs} epochs, lr {asked.lr:g}; mean and range of {asked.seeds} seeds"
        settings.save(draw(results, asked, title), "sparse_resnet")
        settings.write(table(results), "sparse_resnet")
    finish(process)


if __name__ == "__main__":
    main()
