"""`python -m pysteep demo`: geometry and depth on scikit-learn's handwritten digits.

Geometry is the paper's fine-tuning comparison [Tables 2, 8] in small; depth is in _demo_depth.py. A convolutional net is
pretrained on the digits 0-4, gets a fresh head, and is fine-tuned on the digits 5-9 by SGD, Adam and `pysteep.SteepestDescent`
at one small lr, and by SGD at the lr a sweep picks. Every method of a seed starts from the same weights and sees the same
batches. The tables give the accuracy and the distance travelled, the figure the curves.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import pysteep

from . import depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL_LR = 1e-3
BATCH = 32
EPOCHS, QUICK_EPOCHS = 15, 4
SEEDS, QUICK_SEEDS = 5, 1
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


@dataclass(frozen=True)
class Method:
    """One row of the table and one line of the figure; `build(parameters, lr=lr)` makes the optimiser."""

    name: str
    build: Callable[..., torch.optim.Optimizer]
    colour: str
    dashes: str = "-"
    lr: float = SMALL_LR
    steepest: bool = False


# Okabe and Ito's colours, told apart with any colour vision; the dashes tell them apart in grey.
SGD = Method("SGD", torch.optim.SGD, "#000000")
SWEEP = [Method("SGD, tuned", torch.optim.SGD, "#7F7F7F", "--", lr) for lr in (1e-2, 3e-2, 1e-1, 3e-1)]
OTHERS = [
    Method("Adam", torch.optim.Adam, "#0072B2"),
    Method("sign descent (q=1)", partial(pysteep.SteepestDescent, q=1.0), "#D55E00", steepest=True),
    Method("steepest, q=1.25", partial(pysteep.SteepestDescent, q=1.25), "#009E73", "-.", steepest=True),
    Method("steepest, q=1.5", partial(pysteep.SteepestDescent, q=1.5), "#CC79A7", ":", steepest=True),
]


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) scaled to [0, 1] and labels 0-4."""

    images: Tensor
    labels: Tensor

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed), device="cpu")
        for index in order.to(self.labels.device).split(BATCH):
            yield self.images[index], self.labels[index]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean cross-entropy and accuracy."""
        scores = model(self.images)
        return nn.functional.cross_entropy(scores, self.labels).item(), (scores.argmax(1) == self.labels).float().mean().item()


@dataclass(frozen=True)
class Digits:
    """Digits 0-4 to pretrain on, and the splits of the digits 5-9."""

    old: Split
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Run:
    """One fine-tuning; the curves hold one entry per epoch, the first from before any step."""

    train_loss: list[float]
    test_accuracy: list[float]
    validation_accuracy: float
    l1: float
    l2: float
    step_seconds: float


def load(seed: int, device: torch.device) -> Digits:
    """The digits 5-9, relabelled 0-4, are cut 60/15/25 into train, validation and test by `seed`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32, device="cpu").div(16).unsqueeze(1)
    labels = torch.as_tensor(digits.target, dtype=torch.long, device="cpu")
    old, new = (labels < 5).nonzero().flatten(), (labels >= 5).nonzero().flatten()
    shuffled = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed), device="cpu")]
    parts = (old, *shuffled.tensor_split((int(0.60 * len(new)), int(0.75 * len(new)))))
    return Digits(*(Split(images[part].to(device), (labels[part] % 5).to(device)) for part in parts))


def build_net() -> nn.Sequential:
    """About 22 000 parameters; the last layer is the head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 5),
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, seed: int) -> list[float]:
    """One pass over `data`; returns the seconds of each `optimizer.step()`."""
    seconds = []
    for images, labels in data.batches(seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        _synchronize(labels.device)
        start = time.perf_counter()
        optimizer.step()
        _synchronize(labels.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def pretrain(seed: int, data: Split, epochs: int, advance: Callable[[], object]) -> nn.Sequential:
    """A net trained on the digits 0-4, then given a fresh head."""
    torch.manual_seed(seed)
    model = build_net().to(data.labels.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=SMALL_LR)
    for epoch in range(epochs):
        train_epoch(model, optimizer, data, seed=1000 * seed + epoch)
        advance()
    model[-1] = nn.Linear(64, 5).to(data.labels.device)
    return model


def fine_tune(
    pretrained: nn.Module, method: Method, digits: Digits, seed: int, epochs: int, advance: Callable[[], object]
) -> Run:
    """Fine-tune a copy of `pretrained` and measure how well it does and how far it went."""
    model = copy.deepcopy(pretrained)
    optimizer = method.build(model.parameters(), lr=method.lr)
    train, test = digits.train, digits.test
    losses, accuracies, seconds = [train.evaluate(model)[0]], [test.evaluate(model)[1]], []
    for epoch in range(epochs):
        seconds += train_epoch(model, optimizer, train, seed=1000 * seed + epoch)
        losses.append(train.evaluate(model)[0])
        accuracies.append(test.evaluate(model)[1])
        advance()
    travelled = (parameters_to_vector(model.parameters()) - parameters_to_vector(pretrained.parameters())).detach()
    return Run(
        train_loss=losses,
        test_accuracy=accuracies,
        validation_accuracy=digits.validation.evaluate(model)[1],
        l1=travelled.norm(1).item(),
        l2=travelled.norm(2).item(),
        step_seconds=statistics.median(seconds),
    )


def compare(seeds: int, epochs: int, device: torch.device) -> dict[Method, list[Run]]:
    """The runs of every method, one per seed; tuned SGD is that of best mean validation accuracy."""
    runs: dict[Method, list[Run]] = {method: [] for method in (SGD, *SWEEP, *OTHERS)}
    with tqdm(total=seeds * (1 + len(runs)) * epochs, unit="epoch") as bar:
        for seed in range(seeds):
            bar.set_description(f"seed {seed}: pretrain")
            digits = load(seed, device)
            pretrained = pretrain(seed, digits.old, epochs, bar.update)
            for method, of_seeds in runs.items():
                bar.set_description(f"seed {seed}: {method.name}, lr {method.lr:g}")
                of_seeds.append(fine_tune(pretrained, method, digits, seed, epochs, bar.update))
    tuned = max((SGD, *SWEEP), key=lambda method: statistics.mean(run.validation_accuracy for run in runs[method]))
    return {method: runs[method] for method in (SGD, tuned, *OTHERS)}


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval (Student t); a single value has none."""
    from scipy import stats

    if len(values) < 2:
        return values[0], None
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def fine_tuning_rows(runs: dict[Method, list[Run]], device: torch.device) -> list[tuple[str, ...]]:
    """The columns of the paper's Table 8, and the step time and backend of each optimiser."""
    rows: list[tuple[str, ...]] = [("method", "lr", "test accuracy", "L1 distance", "L2 distance", "step, µs", "served by")]
    for method, of_seeds in runs.items():
        accuracy, half = mean_and_interval([100 * run.test_accuracy[-1] for run in of_seeds])
        rows.append(
            (
                method.name,
                f"{method.lr:g}",
                f"{accuracy:.1f} %" if half is None else f"{accuracy:.1f} ± {half:.1f} %",
                f"{statistics.mean(run.l1 for run in of_seeds):.1f}",
                f"{statistics.mean(run.l2 for run in of_seeds):.2f}",
                f"{1e6 * statistics.median(run.step_seconds for run in of_seeds):.0f}",
                f"pysteep: {pysteep.serving(device)}" if method.steepest else "torch.optim",
            )
        )
    return rows


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns under the first row: words to the left, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    pad = [str.rjust if column[1][0].isdecimal() else str.ljust for column in columns]
    lines = ["  ".join(side(cell, width) for side, cell, width in zip(pad, row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def plot_fine_tuning(loss_axes: Axes, accuracy_axes: Axes, runs: dict[Method, list[Run]]) -> None:
    """Training loss and test accuracy against the epoch: mean over the seeds, band from the lowest to the highest."""
    from matplotlib.ticker import MaxNLocator

    for method, of_seeds in runs.items():
        for axes, curves in (
            (loss_axes, torch.tensor([run.train_loss for run in of_seeds], device="cpu")),
            (accuracy_axes, 100 * torch.tensor([run.test_accuracy for run in of_seeds], device="cpu")),
        ):
            epochs = torch.arange(curves.shape[1], device="cpu")
            style: dict[str, Any] = {"color": method.colour, "linestyle": method.dashes, "linewidth": 2}
            axes.plot(epochs, curves.mean(0), label=f"{method.name}, lr {method.lr:g}", **style)
            axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=method.colour, alpha=0.12, linewidth=0)
    loss_axes.set(yscale="log", ylabel="training loss (cross-entropy, nats)")
    accuracy_axes.set(ylim=(0, 100), ylabel="test accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.set(xlabel="epoch", xmargin=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot(runs: dict[Method, list[Run]], saddle: depth.Saddle, sparsity: depth.Sparsity, file: IO[bytes]) -> None:
    """Write the four panels as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    # 9 inches at twice 100 dots: the type is sized for a page that shows the figure 900 px wide.
    figure = Figure(figsize=(9, 8.6), dpi=200, layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.05))
    (above,), (below,) = figure.subfigures(2, 1, height_ratios=(4.6, 4.0), squeeze=False)
    loss_axes, accuracy_axes = above.subplots(1, 2)
    saddle_axes, sparsity_axes = below.subplots(1, 2)
    plot_fine_tuning(loss_axes, accuracy_axes, runs)
    depth.plot_saddle(saddle_axes, saddle)
    depth.plot_sparsity(sparsity_axes, sparsity)
    for axes in (loss_axes, saddle_axes):
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    saddle_axes.legend(loc="lower left", frameon=False)
    sparsity_axes.legend(loc="upper right", frameon=False, fontsize=9)
    seeds = len(runs[SGD])
    over = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    sparsity_axes.set_title(f"Pruned after training ({over})", fontsize=10)
    above.suptitle(f"Geometry: fine-tuning on digits 5-9 after pretraining on 0-4 ({over})", fontsize=12)
    below.suptitle("Depth: weights as products of factors, on all digits", fontsize=12)
    above.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, format="png")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is never seen half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _seed_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, give a whole number from 1 up")
    return int(text)


def _device(text: str) -> torch.device:
    allowed = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        kind = accelerator.type
        allowed += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, this machine has {', '.join(allowed)}")
    return torch.device(text)


def _folder(text: str) -> Path:
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, give a folder to write to ({error.strerror})") from None
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's command line."""
    parser.description = "Train small nets on handwritten digits: geometry against SGD and Adam, and depth; writes demo.png."
    parser.add_argument("--seeds", type=_seed_count, metavar="N", help=f"seeds (default {SEEDS}, with --quick {QUICK_SEEDS})")
    parser.add_argument("--device", type=_device, default="cpu", help="where to train (default cpu)")
    parser.add_argument("--output", type=_folder, default=".", metavar="DIR", help="folder for demo.png (default: this one)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs of fine-tuning instead of {EPOCHS}, the rest alike"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo as `add_arguments` parsed it; returns the exit code."""
    try:
        return _run(args)
    except KeyboardInterrupt:
        print("pysteep demo: interrupted, no half-written file left behind", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    try:
        for module in ("sklearn", "matplotlib"):
            importlib.import_module(module)
    except ModuleNotFoundError as missing:
        print(f"pysteep demo: {missing.name} is not installed; pip install pysteep[demo]", file=sys.stderr)
        return 2
    try:
        pysteep.serving(args.device)
    except (RuntimeError, ValueError) as error:
        print(f"pysteep demo: {error}", file=sys.stderr)
        return 2
    # The net is too small to share out: on a busy machine the threads wait for each other longer than they work.
    torch.set_num_threads(1)
    epochs = QUICK_EPOCHS if args.quick else EPOCHS
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    steps = depth.QUICK_SADDLE_STEPS if args.quick else depth.SADDLE_STEPS
    sparse_epochs = depth.QUICK_SPARSE_EPOCHS if args.quick else depth.SPARSE_EPOCHS
    runs = compare(seeds, epochs, args.device)
    saddle = depth.saddle(steps, args.device)
    sparsity = depth.sparsity(seeds, sparse_epochs, args.device)
    write_atomically(args.output / "demo.png", lambda file: plot(runs, saddle, sparsity, file))

    print(f"\nFine-tuning on digits 5-9, {epochs} epochs, seeds: {seeds}. Accuracy: mean ± 95 % interval; distances: mean.")
    print(f"SGD was tuned on a validation split over lr {', '.join(f'{method.lr:g}' for method in (SGD, *SWEEP))}.\n")
    print(table(fine_tuning_rows(runs, args.device)))
    print(f"\nSoftmax regression on all digits after {steps} full-batch steps.\n")
    print(table(depth.saddle_rows(saddle)))
    print(f"\nTest accuracy (%) after {sparse_epochs} epochs of sign descent on all digits and pruning; mean, seeds: {seeds}.")
    print("lr and decoupled decay were chosen for each line on a validation split, from the same sweep.\n")
    print(table(depth.sparsity_rows(sparsity)))
    print(f"\nBackend that served SteepestDescent on {args.device}: {pysteep.serving(args.device)}")
    for name, backend in pysteep.backends().items():
        if not backend.available:
            print(f"  not available: {name} ({backend.reason})")
    print(f"Figure: {args.output / 'demo.png'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and run the demo."""
    parser = argparse.ArgumentParser(prog="pysteep demo")
    add_arguments(parser)
    return run(parser.parse_args(argv))
