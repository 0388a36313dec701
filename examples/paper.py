"""What the figures and tables of the paper share: arguments, looks, seeds, tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

mpl.use("Agg")
mpl.rcParams.update(
    {
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.linewidth": 2,
    }
)

COLOURS = {1.0: "#c1442d", 1.5: "#d99a2b", 2.0: "#2f5d8a"}
NAMES = {1.0: "q = 1, sign descent", 1.5: "q = 1.5", 2.0: "q = 2, gradient descent"}
WIDTHS = {1.0: 1.4, 1.5: 2.8, 2.0: 4.6}  # the narrow above the wide, so that lines in one place can all be seen
QS = (1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    quick: bool
    output: Path

    def save(self, figure: Figure, name: str) -> None:
        """Write `name`.png."""
        path = self.output / f"{name}.png"
        figure.savefig(path, bbox_inches="tight")
        print(path)

    def write(self, lines: Sequence[str], name: str) -> None:
        """Print a Markdown table and write it to `name`.md."""
        text = "\n".join(lines) + "\n"
        print(text)
        (self.output / f"{name}.md").write_text(text)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """[--quick] [--output DIR], to which an example may add."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shorter runs, fewer seeds")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder of the picture and table (default results)"
    )
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What was parsed, with the folder made."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    return Settings(arguments.quick, arguments.output)


def settings(description: str | None) -> Settings:
    """Parse [--quick] [--output DIR]."""
    return settings_of(argument_parser(description).parse_args())


def draw_distribution(axes: Axes, x: np.ndarray, values: np.ndarray, q: float) -> None:
    """Median over the last axis as a line, quartiles as a band, as the runs of `q` are drawn."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=-1)
    axes.plot(x, middle, color=COLOURS[q], label=NAMES[q], linewidth=WIDTHS[q], zorder=3 - q / 10)
    axes.fill_between(x, low, high, color=COLOURS[q], alpha=0.2, linewidth=0)


def quartiles(values: np.ndarray) -> str:
    """Median and, in brackets, quartiles, to two digits."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.1e} ({low:.1e} to {high:.1e})"


def mean_and_interval(values: Sequence[float] | np.ndarray, digits: int = 2) -> str:
    """Mean ± half its 95 % confidence interval (Student t); a single value has none."""
    values = np.asarray(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"
