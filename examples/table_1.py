"""Table 1: what coupled and decoupled decay regularise, by q and depth, at balance 0 [Thm 4.16].

The exponents of |x| are measured: of coupled decay on the least sum of squares of factors, of decoupled decay on x's own pull
back to 0 under decay alone, in units of the metric.
"""

import matplotlib.pyplot as plt
import numpy as np
from paper import COLOURS, NAMES, QS, settings

from pysteep import SteepestDescent, theory

DEEP = 10_000  # for L = inf
PAPER = {1.0: "L_3/2, L_1", 1.5: "L_5/4, L_1/2", 2.0: "L_1, log"}


def slope(x: np.ndarray, values: np.ndarray) -> float:
    """Exponent of x that values grow with."""
    return float(np.polyfit(np.log(x), np.log(values), 1)[0])


def name_of(exponent: float) -> str:
    return "log" if exponent < 0.01 else f"L_{exponent:.3g}"


def pull(q: float, depth: int, x: np.ndarray) -> np.ndarray:
    """-dx/dt under decay alone, divided by the metric, by one step of SteepestDescent: the derivative of the regulariser."""
    import torch

    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    p.grad = torch.zeros_like(p)
    lr = 1e-7
    optimizer = SteepestDescent([p], lr=lr, q=q, weight_decay=1.0, depth=depth, storage="tied", init="balanced")
    optimizer.step()
    return (x - p.detach().numpy()) / lr / theory.inverse_metric(x, q, depth, 0.0)


def main() -> None:
    asked = settings(__doc__)
    x = np.geomspace(1e-3, 10, 200)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    lines = [
        "| q | coupled, L = 2 | L → ∞ | decoupled, L = 2 | L → ∞ | measured at L = 2 and 64 | the paper's decoupled |",
        "|---|---|---|---|---|---|---|",
    ]
    for q in QS:
        coupled = [name_of(slope(x, theory.coupled_regularizer(x[:, None], depth))) for depth in (2, DEEP)]
        decoupled = [name_of(2 - theory.metric_exponent(q, depth)) for depth in (2, np.inf)]
        measured = [slope(x, pull(q, depth, x)) + 1 for depth in (2, 64)]
        expected = [2 - theory.metric_exponent(q, depth) for depth in (2, 64)]
        assert np.allclose(measured, expected, atol=1e-3), (measured, expected)
        both = ", ".join(f"{exponent:.3f}" for exponent in measured)
        lines.append(f"| {q:g} | {' | '.join((*coupled, *decoupled))} | {both} | {PAPER[q]} |")
        for axes, depth in zip(panels, (2, 64), strict=True):
            power = 2 - theory.metric_exponent(q, depth)
            axes.plot(x, pull(q, depth, x), color=COLOURS[q], label=f"{NAMES[q]}: |x|^{power - 1:.3g}")
    for axes, depth in zip(panels, (2, 64), strict=True):
        axes.set(title=f"depth {depth}", xlabel="|x|", xscale="log", yscale="log")
        axes.legend(fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("derivative of the regulariser")
    figure.suptitle("Table 1: how decoupled decay pulls x to 0, measured by one step of SteepestDescent", y=1.02)
    asked.save(figure, "table_1")
    asked.write(lines, "table_1")


if __name__ == "__main__":
    main()
