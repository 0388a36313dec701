"""Fig. 2: the metric exponent m = q (L-1)/L against depth, and how the flow dx = x^q dt leaves 0.1.

A mirror flow escapes 0 the sooner the smaller m is; R is a Bregman function up to m = 1 [Def. 4.12, Cor. 4.14].
"""

import matplotlib.pyplot as plt
import numpy as np
from paper import COLOURS, NAMES, QS, settings
from scipy.integrate import solve_ivp

from pysteep import theory

DEPTHS = np.arange(1, 21)
START, LARGEST = 0.1, 3.0


def solution(q: float, times: np.ndarray) -> np.ndarray:
    """Of dx = x^q dt from START: x^(1-q) = START^(1-q) + (1-q) t."""
    if q == 1:
        return START * np.exp(times)
    with np.errstate(divide="ignore", invalid="ignore"):
        base = START ** (1 - q) + (1 - q) * times
        return np.where(base > 0, base ** (1 / (1 - q)), np.nan)


def main() -> None:
    asked = settings(__doc__)
    figure, (exponents, escapes) = plt.subplots(1, 2, figsize=(11, 4.2))
    exponents.axhspan(0, 1, color="#6aa84f", alpha=0.2, linewidth=0)
    exponents.text(DEPTHS[-1], 0.04, "m ≤ 1: a Bregman function", ha="right", color="#38761d")
    for q in QS:
        exponents.plot(DEPTHS, theory.metric_exponent(q, DEPTHS), "o-", markersize=4, color=COLOURS[q], label=NAMES[q])
    exponents.set(xlabel="depth L", ylabel="metric exponent m", xticks=[1, 5, 10, 15, 20], ylim=(0, 2))
    exponents.legend(loc="center right", bbox_to_anchor=(1, 0.26), fontsize=10)
    times = np.linspace(0, 9.5, 2001)
    lines = ["| q | time from 0.1 to 1 under dx = x^q dt | by numerical integration |", "|---|---|---|"]
    for q in QS:
        x = solution(q, times)
        escapes.plot(times, np.where(x <= LARGEST, x, np.nan), color=COLOURS[q], label=f"dx = x^{q:g} dt")
        exact = np.log(1 / START) if q == 1 else (START ** (1 - q) - 1) / (q - 1)

        def reached(_: float, state: np.ndarray) -> float:
            return float(state[0] - 1)

        reached.terminal = True
        found = solve_ivp(lambda _, s, q=q: s**q, (0, 20), [START], events=reached, rtol=1e-10, atol=1e-12)
        lines.append(f"| {q:g} | {exact:.4f} | {found.t_events[0][0]:.4f} |")
    escapes.set(xlabel="time t", ylabel="x", ylim=(0, LARGEST))
    escapes.legend(loc="upper right", fontsize=11)
    for axes in (exponents, escapes):
        axes.grid(alpha=0.25)
    figure.suptitle("Fig. 2: the metric exponent, and what it does near 0")
    asked.save(figure, "figure_2")
    asked.write(lines, "figure_2")


if __name__ == "__main__":
    main()
