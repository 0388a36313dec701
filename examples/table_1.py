"""Table 1: what coupled and decoupled decay regularise, by q and depth, at balance 0 [Thm 4.16].

The exponents of |x| are measured on steps of SteepestDescent with all of its factors stored, without the formulas that they are
compared with. A penalty R(|x|) pulls x back with the strength R'(|x|), which is found by what holds x against it.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from paper import COLOURS, NAMES, QS, settings

from pysteep import SteepestDescent, theory

DEEP = 10_000  # for L = inf
MEASURED = (2, 64)
PAPER = {1.0: "L_3/2, L_1", 1.5: "L_5/4, L_1/2", 2.0: "L_1, log"}


def slope(x: np.ndarray, values: np.ndarray) -> float:
    """Exponent of x that values grow with."""
    return float(np.polyfit(np.log(x), np.log(values), 1)[0])


def name_of(exponent: float) -> str:
    return "log" if exponent < 0.01 else f"L_{exponent:.3g}"


def moved(q: float, depth: int, x: np.ndarray, gradient: np.ndarray, lr: float, **decay: float) -> np.ndarray:
    """By how much one step moves x, whose factors are balanced and all stored."""
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    p.grad = torch.from_numpy(gradient)
    SteepestDescent([p], lr=lr, q=q, depth=depth, storage="full", init="balanced", **decay).step()
    return p.detach().numpy() - x


def decoupled_pull(q: float, depth: int, x: np.ndarray) -> np.ndarray:
    """R'(|x|) of decoupled decay: how far decay alone moves x, beside a gradient of 1 alone."""
    return moved(q, depth, x, np.zeros_like(x), lr=1e-7, weight_decay=1.0) / moved(q, depth, x, np.ones_like(x), lr=1e-7)


def coupled_pull(q: float, depth: int, x: np.ndarray) -> np.ndarray:
    """R'(|x|) of coupled decay: the gradient against which x stays where it is, by bisection."""
    low, high = np.full_like(x, -40.0), np.full_like(x, 40.0)  # logarithms
    for _ in range(50):
        middle = (low + high) / 2
        outwards = moved(q, depth, x, -np.exp(middle), lr=1e-3, coupled_weight_decay=1.0) > 0
        low, high = np.where(outwards, low, middle), np.where(outwards, middle, high)
    return np.exp((low + high) / 2)


def main() -> None:
    asked = settings(__doc__)
    x = np.geomspace(1e-3, 10, 200)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    lines = [
        "| q | coupled, L = 2 | L → ∞ | measured, L = 2, 64 | decoupled, L = 2 | L → ∞ | measured, L = 2, 64 | the paper's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for q in QS:
        of_sums = [slope(x, theory.coupled_regularizer(x[:, None], depth)) for depth in (2, DEEP)]
        of_metrics = [2 - theory.metric_exponent(q, depth) for depth in (2, np.inf)]
        pulls = {depth: decoupled_pull(q, depth, x) for depth in MEASURED}
        coupled = [slope(x, coupled_pull(q, depth, x)) + 1 for depth in MEASURED]
        decoupled = [slope(x, pulls[depth]) + 1 for depth in MEASURED]
        assert np.allclose(coupled, [2 / depth for depth in MEASURED], atol=1e-3), coupled
        assert np.allclose(decoupled, [2 - theory.metric_exponent(q, depth) for depth in MEASURED], atol=1e-3), decoupled
        columns = []
        for computed, measured in ((of_sums, coupled), (of_metrics, decoupled)):
            columns += [*map(name_of, computed), ", ".join(f"{exponent:.3f}" for exponent in measured)]
        lines.append(f"| {q:g} | {' | '.join(columns)} | {PAPER[q]} |")
        for axes, (depth, pull) in zip(panels, pulls.items(), strict=True):
            power = 2 - theory.metric_exponent(q, depth)
            axes.plot(x, pull, color=COLOURS[q], label=f"{NAMES[q]}: |x|^{power - 1:.3g}")
    for axes, depth in zip(panels, MEASURED, strict=True):
        axes.set(title=f"depth {depth}", xlabel="|x|", xscale="log", yscale="log")
        axes.legend(fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("derivative of the regulariser")
    figure.suptitle("Table 1: decoupled decay's pull on x beside that of a gradient of 1, by steps of SteepestDescent", y=1.02)
    asked.save(figure, "table_1")
    asked.write(lines, "table_1")


if __name__ == "__main__":
    main()
