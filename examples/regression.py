"""Diagonal regression from beside the saddle, as Figs. 1 and 7 to 10 show it: who reaches the truth, over many draws."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from paper import QS, Settings, draw_distribution, quartiles, settings

from pysteep import flow

N, SUPPORT, SCALE = 100, 5, 0.1
LR, STEPS, QUICK = 1e-4, 1_000_000, 10  # --quick takes steps that are so many times as large and as few


def simulate(asked: Settings, k: int, depths: tuple[int, ...], seeds: int, batch_size: int | None = None) -> flow.Result:
    """Runs [depth, q, seed]; each seed draws Z and, with a batch size, the batches."""
    seeds = 4 if asked.quick else seeds
    faster = QUICK if asked.quick else 1
    steps = STEPS // faster
    return flow.simulate(
        flow.regression(k, N, SUPPORT, seed=range(seeds)),
        q=np.array(QS)[:, None],
        depth=np.array(depths)[:, None, None],
        scale=SCALE,
        lr=LR * faster,
        steps=steps,
        batch_size=batch_size,
        seed=range(seeds),
        record=[0, *np.unique(np.geomspace(10, steps, 120).round().astype(int)).tolist()],
    )


def draw(result: flow.Result, depths: tuple[int, ...], title: str) -> plt.Figure:
    """Distance to the truth against steps, a panel for each depth."""
    figure, panels = plt.subplots(1, len(depths), figsize=(4.2 * len(depths), 4), sharey=True, squeeze=False)
    lr = float(result.settings["lr"].flat[0])
    time = result.steps[1:] * lr
    distance = np.nan_to_num(result.distance[1:], nan=np.inf)
    for i, (axes, depth) in enumerate(zip(panels[0], depths, strict=True)):
        for j, q in enumerate(QS):
            draw_distribution(axes, time, distance[:, i, j], q)
        axes.set(title=f"depth {depth}", xlabel="time: lr × steps", xscale="log", yscale="log")
        axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel("squared distance to the truth")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(QS), bbox_to_anchor=(0.5, -0.09))
    seeds = distance.shape[-1]
    figure.suptitle(f"{title}; median and quartiles of {seeds} draws")
    figure.tight_layout()
    return figure


def table(result: flow.Result, depths: tuple[int, ...]) -> list[str]:
    """Final distance and loss by depth and q: median and quartiles."""
    lines = ["| depth | q | squared distance to the truth | loss | escape time |", "|---|---|---|---|---|"]
    escape = result.escape_time()
    for i, depth in enumerate(depths):
        for j, q in enumerate(QS):
            distance, loss = quartiles(result.distance[-1, i, j]), quartiles(result.loss[-1, i, j])
            times = np.quantile(escape[i, j], 0.5, method="nearest")
            lines.append(f"| {depth} | {q:g} | {distance} | {loss} | {times:.3g} |")
    lr = float(result.settings["lr"].flat[0])
    note = f"{result.x.shape[-2]} draws, lr {lr:g}, {result.steps[-1]} steps: median (quartiles)."
    return [*lines, "", note]


def main(description: str | None, number: int, k: int, batch_size: int | None) -> None:
    """Fig. `number`: four depths, 8 draws."""
    asked, depths = settings(description), (1, 2, 3, 10)
    result = simulate(asked, k, depths, seeds=8, batch_size=batch_size)
    batches = "full batches" if batch_size is None else f"batches of {batch_size}"
    asked.save(draw(result, depths, f"Fig. {number}: k = {k}, n = {N}, {batches}"), f"figure_{number}")
    asked.write(table(result, depths), f"figure_{number}")
