"""Fig. 1: beside a saddle sign descent is faster than gradient descent. k = 300 rows for 100 coordinates, depth 3.

32 draws of the data, where the paper shows one.
"""

import matplotlib.pyplot as plt
import regression
from paper import QS, draw_distribution, settings

DEPTH = 3


def main() -> None:
    asked = settings(__doc__)
    result = regression.simulate(asked, 300, (DEPTH,), seeds=32)
    figure, (losses, distances) = plt.subplots(1, 2, figsize=(11, 4.2))
    time = result.time[1:, 0, 0, 0]
    for j, q in enumerate(QS):
        for axes, values in ((losses, result.loss), (distances, result.distance)):
            draw_distribution(axes, time, values[1:, 0, j], q)
    for axes, name in ((losses, "loss"), (distances, "squared distance to the truth")):
        axes.set(xlabel="time: lr × steps", ylabel=name, xscale="log", yscale="log")
        axes.grid(alpha=0.25)
    losses.legend(loc="lower left")
    figure.suptitle(f"Fig. 1: k = 300, n = 100, depth {DEPTH}; median and quartiles of {result.x.shape[-2]} draws")
    figure.tight_layout()
    asked.save(figure, "figure_1")
    first, second, last = result.escape_time()[0]
    count = int(((first < second) & (second < last)).sum())
    note = f"Sign descent escapes first and gradient descent last in {count} of {len(first)} draws."
    asked.write([*regression.table(result, (DEPTH,)), "", note], "figure_1")


if __name__ == "__main__":
    main()
