"""What the fine-tuning comparisons share: methods, sweeps over lr, spectra, their picture and table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from paper import mean_and_interval
from torch import Tensor, nn

import pysteep
from pysteep.diagnostics import Spectrum

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "sign descent": pysteep.SteepestDescent,
}
SMALL_SGD, TUNED_SGD = "SGD, Adam's lr", "SGD, tuned"
COLOURS = {"before": "#bbbbbb", SMALL_SGD: "#d99a2b", TUNED_SGD: "#000000", "Adam": "#2f5d8a", "sign descent": "#c1442d"}


@dataclass(frozen=True)
class Run:
    """One fine-tuning: accuracies in percent, and how far the parameters have gone."""

    net: nn.Module
    validation: float
    test: float
    l1: float
    l2: float


def distances(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """L1 and L2 norm of what the parameters have moved."""
    moved = torch.cat([(new - old).detach().flatten() for old, new in zip(before, after, strict=True)]).double()
    return float(moved.norm(1)), float(moved.norm(2))


def compare(
    fine_tune: Callable[[str, float, int], Run], seeds: int, small: Sequence[float], large: Sequence[float]
) -> dict[str, tuple[float, list[Run]]]:
    """The lr of each method and its runs, one for each seed, at the lr of best mean accuracy on the validation split.

    Args:
        fine_tune: trains with (optimizer, lr, seed).
        seeds: how many.
        small: what lr is chosen from for Adam and sign descent.
        large: the same for SGD, which is trained at Adam's lr too.
    """

    def runs(name: str, lr: float) -> list[Run]:
        return [fine_tune(name, lr, seed) for seed in range(seeds)]

    def tuned(name: str, lrs: Sequence[float]) -> tuple[float, list[Run]]:
        best: tuple[float, list[Run]] = 0.0, []
        for lr in lrs:
            tried = runs(name, lr)
            if not best[1] or _validation(tried) > _validation(best[1]):
                best = lr, tried
        return best

    adam = tuned("Adam", small)
    small_sgd = adam[0], runs("SGD", adam[0])
    return {
        SMALL_SGD: small_sgd,
        TUNED_SGD: tuned("SGD", large),
        "Adam": adam,
        "sign descent": tuned("sign descent", small),
    }


def runs_of(seeds: int, small: Sequence[float], large: Sequence[float]) -> int:
    """How many trainings `compare` asks for."""
    return seeds * (2 * len(small) + len(large) + 1)


def _validation(runs: list[Run]) -> float:
    return float(np.mean([run.validation for run in runs]))


def draw(spectra: dict[str, list[Spectrum]], found: dict[str, tuple[float, list[Run]]], title: str) -> Figure:
    """Eigenvalues by rank, of the best seed of each method, over the largest; and the negative ones of all seeds."""
    best = {name: int(np.argmax([run.validation for run in runs])) for name, (_, runs) in found.items()}
    figure, (normalized, negative) = plt.subplots(1, 2, figsize=(13, 5.4))
    for place, (name, of_seeds) in enumerate(spectra.items()):
        values = of_seeds[best.get(name, 0)].values
        ranks = np.arange(1, len(values) + 1)
        normalized.plot(ranks, values / abs(values).max(), ".-", color=COLOURS[name], label=name, linewidth=1)
        for i, spectrum in enumerate(of_seeds):
            sizes = -spectrum.values[spectrum.values < -spectrum.residuals]
            column = place + (i + 0.5) / len(of_seeds) * 0.6 - 0.3
            negative.plot(np.full(len(sizes), column), sizes, "_", color=COLOURS[name], markersize=9)
    normalized.set(xlabel="rank, highest first", ylabel="eigenvalue over the largest in magnitude", title="Best seed of each")
    normalized.set_yscale("symlog", linthresh=1e-3)
    normalized.axhline(0, color="black", linewidth=0.8)
    normalized.legend(fontsize=11)
    negative.set(yscale="log", ylabel="size of a negative eigenvalue", title="The negative ones, a column for each seed")
    negative.set_xticks(range(len(spectra)), list(spectra), rotation=15, fontsize=11)
    for axes in (normalized, negative):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def table(
    spectra: dict[str, list[Spectrum]], found: dict[str, tuple[float, list[Run]]], of: str, paper: dict[str, str]
) -> list[str]:
    """Accuracies, distances and what is negative of the spectrum, beside the paper's accuracies and distances of `of`."""
    k = len(spectra["before"][0].values)
    names = ["method", "lr", "validation accuracy, %", "test accuracy, %", "L1", "L2", f"negative of {k}", "highest", "lowest"]
    names += [f"the paper's {of}: validation accuracy, L1, L2"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, of_seeds in spectra.items():
        cells = [name]
        if name in found:
            lr, runs = found[name]
            columns = {"validation": 2, "test": 2, "l1": 1, "l2": 2}
            cells += [f"{lr:g}"]
            cells += [mean_and_interval([getattr(run, each) for run in runs], digits) for each, digits in columns.items()]
        else:
            cells += ["–"] * 5
        cells.append(mean_and_interval([spectrum.negative for spectrum in of_seeds], 1))
        cells += [f"{np.median([spectrum.values.max() for spectrum in of_seeds]):.2g}"]
        cells += [f"{np.median([spectrum.values.min() for spectrum in of_seeds]):.2g}"]
        cells.append(paper.get(name, "–"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines
