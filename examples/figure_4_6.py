"""Figs. 4 and 6: the direction of x after classification, for sign descent, Adam and gradient descent at depths 2 and 10.

The limit is one L_inf margin for every depth [Thm F.1]; in finite time deeper networks are sparser. The paper shows one draw
of the data; here the first of 32 is drawn and the table counts all. Adam is shown twice: at depth 10 gradients beside the
saddle are of the size of 0.1^9, below its usual epsilon of 1e-8.
"""

import matplotlib.pyplot as plt
import numpy as np
from paper import quartiles, settings

from pysteep import flow, theory

DEPTHS = (2, 10)
K, N, SUPPORT, SCALE, LR, STEPS = 80, 100, 2, 0.1, 0.01, 10_000
OPTIMIZERS = {
    "sign descent": {"q": 1.0},
    "Adam": {"optimizer": "adam"},
    "Adam, ε = 1e-12": {"optimizer": "adam", "epsilon": 1e-12},
    "gradient descent": {"q": 2.0},
}


def share_of_support(x: np.ndarray) -> np.ndarray:
    """Of |x|'s sum over all coordinates."""
    size = np.abs(x)
    return size[..., :SUPPORT].sum(-1) / np.maximum(size.sum(-1), np.finfo(float).tiny)


def main() -> None:
    asked = settings(__doc__)
    seeds = 4 if asked.quick else 32
    problem = flow.classification(K, N, SUPPORT, seed=range(seeds))
    figure, panels = plt.subplots(len(DEPTHS), len(OPTIMIZERS), figsize=(16, 6), sharex=True, sharey=True)
    lines = [
        "| optimiser | depth | share of abs(x) on the truth's two | margin / largest possible | loss |",
        "|---|---|---|---|---|",
    ]
    best = np.array([theory.linf_margin(Z, y, 1).margin for Z, y in zip(problem.Z, problem.y, strict=True)])
    for column, (name, how) in enumerate(OPTIMIZERS.items()):
        depths = np.array(DEPTHS)[:, None]
        result = flow.simulate(problem, depth=depths, scale=SCALE, lr=LR, steps=STEPS, record=20, **how)
        size = np.maximum(np.abs(result.x).max(-1, keepdims=True), np.finfo(float).tiny)
        direction = result.x / size
        margin = (problem.y * np.matmul(problem.Z, direction[..., None])[..., 0]).min(-1) / best
        for row, depth in enumerate(DEPTHS):
            axes = panels[row, column]
            axes.axvspan(-0.5, SUPPORT - 0.5, color="#6aa84f", alpha=0.3, linewidth=0)
            axes.bar(np.arange(N), direction[row, 0], width=1.0, color="#2f5d8a")
            axes.set(title=f"{name}, depth {depth}", ylim=(-1.05, 1.05), xlim=(-1, N))
            share = quartiles(share_of_support(result.x[row]))
            lines.append(f"| {name} | {depth} | {share} | {quartiles(margin[row])} | {quartiles(result.loss[-1, row])} |")
    for axes in panels[-1]:
        axes.set_xlabel("coordinate")
    for axes in panels[:, 0]:
        axes.set_ylabel("x / max |x|")
    figure.suptitle(f"Figs. 4 and 6: after {STEPS:,} steps; green: the truth's coordinates; the first draw", y=0.99)
    figure.tight_layout()
    asked.save(figure, "figure_4_6")
    asked.write([*lines, "", f"{seeds} draws: median (quartiles)."], "figure_4_6")


if __name__ == "__main__":
    main()
