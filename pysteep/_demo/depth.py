"""The demo's two panels of depth: leaving a saddle [Thm 4.3, Cor. 4.10], and how few weights are enough [Thm 4.16].

Saddle: softmax regression on all digits with its weights as products of three factors, from init="saddle": x = 0, beside the
saddle where all factors are 0. At depth 1 the same x is no saddle. Sparsity: one net trained on all digits at depth 1 and 3 by
sign descent with decoupled decay; then the smallest weights of all its matrices together are set to 0, and it is tested as it
is, not trained again. lr and decay are chosen for each by the same sweep.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pysteep
from pysteep._state.depth import Init

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEPTH = 3
SADDLE_SCALE = 0.1
SADDLE_STEPS, QUICK_SADDLE_STEPS = 2000, 200
SPARSE_EPOCHS, QUICK_SPARSE_EPOCHS = 60, 5
SPARSE_BATCH = 64
SWEEP = list(product((3e-4, 1e-3, 3e-3), (0.1, 0.3, 1.0)))  # (lr, weight_decay)
WELL_TRAINED = 1.0
"""Percentage points of validation accuracy that a setting may lose to the sweep's best and still be chosen."""
REMOVED = (0.0, 50.0, 70.0, 80.0, 85.0, 90.0, 93.0, 95.0, 97.0, 98.0, 99.0, 99.5, 99.9)
"""Percent of the weights set to 0."""
LABELLED = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9)
"""Those with room for a number on the axis."""

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Descent:
    """One line of the saddle panel."""

    name: str
    q: float
    lr: float
    colour: str
    dashes: str


@dataclass(frozen=True)
class Parameters:
    """One line of the sparsity panel: how the weights are parametrised."""

    name: str
    depth: int
    init: Init
    colour: str
    dashes: str
    marker: str


@dataclass(frozen=True)
class Pruned:
    """Test accuracies in percent, [seed][entry of REMOVED], at the lr and decay that the sweep chose."""

    lr: float
    weight_decay: float
    test: list[list[float]]


Saddle = dict[Descent, dict[int, list[float]]]
"""Loss curves by depth."""
Sparsity = dict[Parameters, Pruned]

DESCENTS = [
    Descent("gradient descent", 2.0, 1e-3, "#000000", "-"),
    Descent("gradient descent", 2.0, 1e-1, "#999999", "--"),
    Descent("sign descent", 1.0, 1e-3, "#D55E00", "-."),
]
PARAMETERS = [
    Parameters("depth 1", 1, "identity", "#000000", "-", "o"),
    Parameters(f'depth {DEPTH}, init="identity"', DEPTH, "identity", "#0072B2", "--", "s"),
    Parameters(f'depth {DEPTH}, init="balanced"', DEPTH, "balanced", "#D55E00", "-.", "^"),
]


def load(device: torch.device) -> Data:
    """All 1797 images, (n, 64) scaled to [0, 1], and labels 0-9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.data, dtype=torch.float32, device="cpu").div(16)
    return images.to(device), torch.as_tensor(digits.target, dtype=torch.long, device="cpu").to(device)


def leave_saddle(descent: Descent, depth: int, data: Data, steps: int, advance: Callable[[], object]) -> list[float]:
    """Training loss of softmax regression from weight and bias 0, before each step and after the last."""
    images, labels = data
    model = nn.Linear(64, 10).to(images.device)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    groups = pysteep.param_groups(model, depth)
    optimizer = pysteep.SteepestDescent(groups, lr=descent.lr, q=descent.q, init="saddle", scale=SADDLE_SCALE)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        advance()
    return [*losses, nn.functional.cross_entropy(model(images), labels).item()]


def saddle(steps: int, device: torch.device) -> Saddle:
    """The loss curve of each descent by depth: DEPTH, beside its saddle, and 1, where x = 0 is none."""
    data = load(device)
    with tqdm(total=2 * len(DESCENTS) * steps, unit="step", desc="saddle") as bar:
        return {
            descent: {depth: leave_saddle(descent, depth, data, steps, bar.update) for depth in (DEPTH, 1)}
            for descent in DESCENTS
        }


def build_net() -> nn.Sequential:
    """26 000 weights."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def train(
    how: Parameters, lr: float, weight_decay: float, data: Data, seed: int, epochs: int, advance: Callable[[], object]
) -> nn.Sequential:
    """A net trained by sign descent while lr falls linearly to 0."""
    images, labels = data
    torch.manual_seed(seed)
    model = build_net().to(images.device)
    groups = pysteep.param_groups(model, how.depth)
    optimizer = pysteep.SteepestDescent(groups, lr=lr, q=1.0, weight_decay=weight_decay, init=how.init)
    steps = epochs * -(-len(labels) // SPARSE_BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator, device="cpu").to(labels.device).split(SPARSE_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
        advance()
    return model


@torch.no_grad()
def prune(model: nn.Module, removed: float) -> None:
    """Set the `removed` percent of all weights together that are smallest in magnitude to 0; biases stay."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    sizes = torch.cat([w.abs().flatten() for w in weights])
    smallest = sizes.argsort(stable=True)[: round(removed / 100 * len(sizes))]
    kept = torch.ones_like(sizes).index_fill_(0, smallest, 0.0)
    for w, of_w in zip(weights, kept.split([w.numel() for w in weights]), strict=True):
        w.mul_(of_w.view_as(w))


@torch.no_grad()
def pruned_accuracy(model: nn.Module, data: Data) -> list[float]:
    """Accuracy in percent for each of REMOVED."""
    images, labels = data
    accuracies = []
    for removed in REMOVED:
        pruned = copy.deepcopy(model)
        prune(pruned, removed)
        accuracies.append(100 * (pruned(images).argmax(1) == labels).float().mean().item())
    return accuracies


def chosen(validation: dict[tuple[float, float], list[float]]) -> tuple[float, float]:
    """The setting of best mean accuracy over REMOVED, of those that are WELL_TRAINED before anything is removed."""
    best = max(accuracies[0] for accuracies in validation.values())
    trained = {setting: curve for setting, curve in validation.items() if curve[0] >= best - WELL_TRAINED}
    return max(trained, key=lambda setting: statistics.mean(trained[setting]))


def sparsity(seeds: int, epochs: int, device: torch.device) -> Sparsity:
    """Train and prune: one split, 60/15/25 into train, validation and test; seeds differ in weights and batches, 0 is swept."""
    images, labels = load(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    parts = order.tensor_split((int(0.60 * len(order)), int(0.75 * len(order))))
    fit, validation, test = ((images[part], labels[part]) for part in parts)
    results = {}
    with tqdm(total=len(PARAMETERS) * (len(SWEEP) + seeds - 1) * epochs, unit="epoch") as bar:
        for how in PARAMETERS:
            bar.set_description(f"sparsity, {how.name}")
            swept = {setting: train(how, *setting, fit, 0, epochs, bar.update) for setting in SWEEP}
            setting = chosen({setting: pruned_accuracy(model, validation) for setting, model in swept.items()})
            models = [swept[setting], *(train(how, *setting, fit, seed, epochs, bar.update) for seed in range(1, seeds))]
            results[how] = Pruned(*setting, [pruned_accuracy(model, test) for model in models])
    return results


def saddle_rows(runs: Saddle) -> list[tuple[str, ...]]:
    """Table of the final losses."""
    rows: list[tuple[str, ...]] = [("training loss", "lr", f"depth {DEPTH}, from saddle", "depth 1, from 0")]
    for descent, curves in runs.items():
        rows.append(
            (f"{descent.name} (q={descent.q:g})", f"{descent.lr:g}", *(f"{curves[depth][-1]:.3f}" for depth in (DEPTH, 1)))
        )
    return rows


def sparsity_rows(results: Sparsity) -> list[tuple[str, ...]]:
    """Table of the mean accuracies."""
    rows: list[tuple[str, ...]] = [("weights removed (%)", "lr", "decay", *(f"{removed:g}" for removed in REMOVED))]
    for how, pruned in results.items():
        means = (statistics.mean(of_share) for of_share in zip(*pruned.test, strict=True))
        rows.append((how.name, f"{pruned.lr:g}", f"{pruned.weight_decay:g}", *(f"{mean:.1f}" for mean in means)))
    return rows


def plot_saddle(axes: Axes, runs: Saddle) -> None:
    """Training loss at depth 3 against the step."""
    for descent, curves in runs.items():
        style: dict[str, Any] = {"color": descent.colour, "linestyle": descent.dashes, "linewidth": 2}
        axes.plot(curves[DEPTH], label=f"{descent.name}, lr {descent.lr:g}", **style)
    axes.set(yscale="log", xmargin=0, xlabel="step", ylabel="training loss (cross-entropy, nats)")
    axes.set_title(f'Softmax regression at depth {DEPTH}, init="saddle"', fontsize=10)


def plot_sparsity(axes: Axes, results: Sparsity) -> None:
    """Test accuracy against the share of weights removed: mean over the seeds, band from the lowest to the highest."""
    from matplotlib.ticker import NullLocator

    kept = [100 - removed for removed in REMOVED]
    for how, pruned in results.items():
        curves = torch.tensor(pruned.test, device="cpu")
        style: dict[str, Any] = {
            "color": how.colour,
            "linestyle": how.dashes,
            "marker": how.marker,
            "markersize": 4,
            "linewidth": 2,
        }
        axes.plot(kept, curves.mean(0), label=how.name, **style)
        axes.fill_between(kept, curves.amin(0), curves.amax(0), color=how.colour, alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlim=(100, min(kept)), ylim=(0, 100))
    axes.set(xlabel="weights removed, smallest first (%)", ylabel="test accuracy (%)")
    axes.set_xticks([100 - removed for removed in LABELLED], [f"{removed:g}" for removed in LABELLED])
    axes.xaxis.set_minor_locator(NullLocator())
