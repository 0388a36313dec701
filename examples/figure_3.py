"""Fig. 3: the curves |m|^q - |w|^q = 0.1^q from (0.1, 0), on which two factors stay [Lemma 4.5], to m w = 0.1 and -0.1.

The smaller q, the shorter the way: sign descent escapes the saddle at 0 sooner.
"""

import matplotlib.pyplot as plt
import numpy as np
from paper import COLOURS, NAMES, QS, settings

from pysteep import theory

SCALE, GOAL = 0.1, 0.1


def curve(q: float) -> tuple[np.ndarray, np.ndarray]:
    """m and w on the way to m w = GOAL."""
    x = GOAL * np.linspace(0, 1, 4001) ** 2
    w, m = theory.balanced_factors(x, q, 2, SCALE**q)
    return m, w


def main() -> None:
    asked = settings(__doc__)
    figure, axes = plt.subplots(figsize=(6.4, 6))
    lines = ["| q | length of the way to m w = 0.1 | time under a unit gradient |", "|---|---|---|"]
    for q in QS:
        m, w = curve(q)
        axes.plot(np.append(m[::-1], m), np.append(-w[::-1], w), color=COLOURS[q], label=NAMES[q])
        axes.plot([m[-1]] * 2, [-w[-1], w[-1]], "o", color=COLOURS[q], markersize=6)
        length = np.hypot(np.diff(m), np.diff(w)).sum()
        lines.append(f"| {q:g} | {length:.4f} | {theory.escape_time(GOAL, q, 2, SCALE**q):.4f} |")
    line = np.linspace(0.05, 0.6, 400)
    for sign in (1, -1):
        axes.plot(line, sign * GOAL / line, ":", color="#666666", linewidth=1.5)
    axes.text(0.2, 0.5, "m w = 0.1", color="#666666")
    axes.text(0.2, -0.53, "m w = −0.1", color="#666666")
    axes.plot([SCALE], [0], "k*", markersize=12)
    axes.annotate("start (0.1, 0)", (SCALE, 0), (0.13, -0.012))
    axes.set(xlabel="m", ylabel="w", xlim=(0, 0.6), ylim=(-0.6, 0.6))
    axes.legend(loc="center right")
    axes.grid(alpha=0.25)
    axes.set_title("Fig. 3: |m|^q − |w|^q = 0.1^q, up to |m w| = 0.1")
    asked.save(figure, "figure_3")
    asked.write(lines, "figure_3")


if __name__ == "__main__":
    main()
