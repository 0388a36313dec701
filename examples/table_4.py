"""Table 4: distance of the balance from Lemma 4.5's prediction, and of x from the truth, under coupled and decoupled decay.

Sign descent, k = 80 rows for 100 coordinates, a million steps: 32 draws of the data beside the paper's single numbers, and how
near to the truth each had come on the way.
"""

import matplotlib.pyplot as plt
import numpy as np
from paper import quartiles, settings

from pysteep import flow

K, N, SUPPORT, SCALE, LR, STEPS, QUICK = 80, 100, 5, 0.1, 1e-4, 1_000_000, 10
DEPTHS = (1, 2, 10)
DECAYS = (1e-4, 1e-3, 1e-2)
NONE = "none"
KINDS = [(NONE, 0.0), *(("coupled", d) for d in DECAYS), *(("decoupled", d) for d in DECAYS)]

# (depth, kind, decay) -> (balance distance, squared distance to the truth); None where the paper's is 0 or not given.
PAPER = {
    (1, NONE, 0.0): (0, 7.1),
    (1, "coupled", 1e-4): (0, 7.1),
    (1, "coupled", 1e-3): (0, 7.1),
    (1, "coupled", 1e-2): (0, 7.1),
    (1, "decoupled", 1e-4): (0, 7.0),
    (1, "decoupled", 1e-3): (0, 5.8),
    (1, "decoupled", 1e-2): (0, 1.0),
    (2, NONE, 0.0): (1.1e-4, 4.8e-1),
    (2, "coupled", 1e-4): (5.3e-4, 4.8e-1),
    (2, "coupled", 1e-3): (5.1e-3, 4.7e-1),
    (2, "coupled", 1e-2): (3.5e-2, 4.7e-1),
    (2, "decoupled", 1e-4): (7.3e-5, 4.7e-1),
    (2, "decoupled", 1e-3): (1.8e-3, 4.1e-1),
    (2, "decoupled", 1e-2): (6.7e-4, 4.8e-1),
    (10, NONE, 0.0): (1.5e-4, 2.1e-4),
    (10, "coupled", 1e-4): (1.2e-1, 2.5e-4),
    (10, "coupled", 1e-3): (3.9e-1, 2.9e-4),
    (10, "coupled", 1e-2): (7.8e-1, 3.0e-3),
    (10, "decoupled", 1e-4): (1.5e-4, 1.4e-4),
    (10, "decoupled", 1e-3): (2.9e-4, 4.9e-5),
    (10, "decoupled", 1e-2): (1.6e-3, 7.9e-6),
}


def simulate(quick: bool) -> flow.Result:
    """Runs [depth, decay, seed]."""
    seeds, faster = (4, QUICK) if quick else (32, 1)
    kinds = np.array([kind for kind, _ in KINDS])[:, None]
    decay = np.array([size for _, size in KINDS])[:, None]
    return flow.simulate(
        flow.regression(K, N, SUPPORT, seed=range(seeds), reduction="sum"),
        q=1.0,
        depth=np.array(DEPTHS)[:, None, None],
        scale=SCALE,
        lr=LR * faster,
        steps=STEPS // faster,
        weight_decay=np.where(kinds == "decoupled", decay, 0.0),
        coupled_weight_decay=np.where(kinds == "coupled", decay, 0.0),
        record=np.geomspace(1000, STEPS // faster, 40).round().astype(int),
    )


def main() -> None:
    asked = settings(__doc__)
    result = simulate(asked.quick)
    balance = np.abs(result.balance[-1] - result.predicted_balance[-1][..., None]).mean(-1)
    distance = result.distance[-1]
    nearest = result.distance.min(0)
    names = (
        "depth",
        "decay",
        "balance distance",
        "paper",
        "squared distance to the truth",
        "paper",
        "at or below it",
        "nearest on the way",
    )
    head = f"| {' | '.join(names)} |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    figure, panels = plt.subplots(1, len(DEPTHS), figsize=(14, 4.6), sharey=True)
    for i, (axes, depth) in enumerate(zip(panels, DEPTHS, strict=True)):
        for j, (kind, size) in enumerate(KINDS):
            theirs = PAPER[depth, kind, size]
            below = f"{int((distance[i, j] <= theirs[1] * 1.05).sum())} of {distance.shape[-1]}"
            own = "–" if depth == 1 else quartiles(balance[i, j])
            name = kind if kind == NONE else f"{kind} {size:g}"
            paper = "–" if depth == 1 else f"{theirs[0]:.1e}"
            ends = f"{quartiles(distance[i, j])} | {theirs[1]:.1e} | {below} | {quartiles(nearest[i, j])}"
            lines.append(f"| {depth} | {name} | {own} | {paper} | {ends} |")
            axes.plot(
                np.full(distance.shape[-1], j),
                distance[i, j],
                ".",
                color="#2f5d8a",
                alpha=0.5,
                label="ours, each draw" if j == 0 else None,
            )
            axes.plot(
                j,
                np.median(distance[i, j]),
                "_",
                color="#2f5d8a",
                markersize=22,
                markeredgewidth=3,
                label="our median" if j == 0 else None,
            )
            axes.plot(j, theirs[1], "D", color="#c1442d", markersize=7, label="the paper's number" if j == 0 else None)
        axes.set(title=f"depth {depth}", yscale="log", xticks=range(len(KINDS)))
        axes.set_xticklabels([kind if kind == NONE else f"{kind}\n{size:g}" for kind, size in KINDS], fontsize=8, rotation=40)
        axes.grid(alpha=0.25, axis="y")
    panels[0].set_ylabel("squared distance to the truth")
    panels[0].legend(loc="lower left", fontsize=10)
    figure.suptitle(
        f"Table 4: sign descent, k = {K}, {result.steps[-1]:,} steps of lr {float(result.settings['lr'].flat[0]):g}"
    )
    figure.tight_layout()
    asked.save(figure, "table_4")
    asked.write([*lines, "", f"{distance.shape[-1]} draws: median (quartiles). Loss: sum of squares."], "table_4")


if __name__ == "__main__":
    main()
