"""Table 3: sign flips and the balance of queries and keys before and after fine-tuning [App. H].

    python examples/qk_balance.py BEFORE AFTER    two checkpoints in safetensors, such as a base model and its instruct version
    python examples/qk_balance.py                 makes them: a tiny Llama, trained on the spot

The tiny Llama learns sentences from a small grammar by AdamW without decay, then sums of two numbers, by each method from the
same checkpoint. Everything goes through files, as with a model of any size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from paper import Settings, argument_parser, mean_and_interval, settings_of
from tqdm import tqdm

from pysteep import SteepestDescent
from pysteep.diagnostics import CheckpointComparison, compare_checkpoints

PAPER = {
    "LLaMA-3.1 8B": ("1.25", "0.87", "1.57", "-624.13", "100", "-20.28", "100"),
    "LLaMA-3.2 3B": ("4.37", "3.50", "5.04", "-1757.04", "100", "-101.71", "100"),
    "LLaMA-3.2 1B": ("4.73", "3.24", "6.11", "-891.76", "100", "-66.15", "100"),
}
METHODS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, lr 5e-4, decay 0.1": lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.1),
    "sign descent, lr 1e-4, decay 0.5": lambda parameters: SteepestDescent(parameters, lr=1e-4, q=1, weight_decay=0.5),
    "sign descent, lr 1e-4, no decay": lambda parameters: SteepestDescent(parameters, lr=1e-4, q=1),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+=."
LENGTH, BATCH = 32, 16
Text = Callable[[np.random.Generator], str]


def sentence(draw: np.random.Generator) -> str:
    people, verbs, things = "the cat|a dog|my friend|one bird", "sees|wants|finds|brings", "a ball|the house|some bread|my book"
    return " ".join(str(draw.choice(words.split("|"))) for words in (people, verbs, things)) + ".\n"


def sum_of_two(draw: np.random.Generator) -> str:
    a, b = draw.integers(0, 50, 2)
    return f"{a}+{b}={a + b}.\n"


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, text: Text, steps: int, seed: int, bar: tqdm) -> float:
    """Take steps on random pieces of text; returns the mean loss of the last tenth of them."""
    draw = np.random.default_rng(seed)
    written = "".join(text(draw) for _ in range(4000))
    tokens = torch.tensor([ALPHABET.index(character) for character in written])
    losses = []
    for _ in range(steps):
        begins = draw.integers(0, len(tokens) - LENGTH, BATCH)
        batch = torch.stack([tokens[begin : begin + LENGTH] for begin in begins])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.update()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def trained_here(quick: bool) -> tuple[dict[str, list[CheckpointComparison]], str]:
    """The comparisons of each method, one for each seed, and what they are of."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # for matrices so small more of them wait for each other
    seeds, before_steps, after_steps = (1, 200, 100) if quick else (4, 800, 400)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    found: dict[str, list[CheckpointComparison]] = {name: [] for name in METHODS}
    losses: dict[str, list[float]] = {name: [] for name in METHODS}
    total = seeds * (before_steps + after_steps * len(METHODS))
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="step") as bar:
        before, after = Path(folder, "before"), Path(folder, "after")
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            train(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), sentence, before_steps, seed, bar)
            model.save_pretrained(before)
            for name, build in METHODS.items():
                model = LlamaForCausalLM.from_pretrained(before).train()
                losses[name].append(train(model, build(model.parameters()), sum_of_two, after_steps, 100 + seed, bar))
                model.save_pretrained(after)
                found[name].append(compare_checkpoints(before, after, progress=False))
    reached = ", ".join(f"{np.mean(values):.3f} by {name}" for name, values in losses.items())
    weights = next(iter(found.values()))[0].weights
    spread = (
        "one seed" if seeds == 1 else f"{seeds} seeds, mean ± half the 95 % confidence interval, shares of all their layers"
    )
    about = (
        f"Not pretrained models, but a Llama of {weights:,} weights, randomly initialised: {before_steps} steps on made-up "
        f"sentences by AdamW without decay, then {after_steps} on sums of two numbers; {spread}. Losses in the end: {reached}."
    )
    return found, about


def row(name: str, results: list[CheckpointComparison]) -> str:
    def mean(column: str) -> str:
        return mean_and_interval([getattr(result, column) for result in results])

    def share(column: str) -> str:
        return f"{np.mean([getattr(result, column) for result in results]):.0f}"

    percents = [mean(f"{of}_percent") for of in ("query", "key", "total")]
    balances = [cell for q in (1, 2) for cell in (mean(f"mean_delta_l{q}"), share(f"below_zero_l{q}"))]
    return f"| {name} | {' | '.join(percents + balances)} |"


def draw_layers(asked: Settings, found: dict[str, list[CheckpointComparison]]) -> None:
    """Delta of each layer: a line through the means over the seeds, a point for each seed."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4))
    for axes, power in zip(panels, (1, 2), strict=True):
        for (name, results), colour in zip(found.items(), COLOURS, strict=False):
            values = np.array([getattr(result, f"delta_l{power}") for result in results])
            layers = np.arange(values.shape[1])
            axes.plot(layers, values.mean(0), color=colour, label=name)
            axes.plot(np.tile(layers, (len(values), 1)), values, "o", color=colour, alpha=0.4, markersize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="layer", ylabel=f"$\\Delta_{{L_{power}}}$", title=f"$L_{power}$: below 0, closer to balance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(found))
    figure.suptitle("Change by fine-tuning of | ‖Q‖ − ‖K‖ |, the imbalance of a layer's queries and keys", y=1.0)
    figure.tight_layout()
    asked.save(figure, "qk_balance")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="BEFORE AFTER", help="safetensors files, indices or folders")
    arguments = parser.parse_args()
    if len(arguments.checkpoints) not in (0, 2):
        parser.error(f"give BEFORE and AFTER or neither; got {len(arguments.checkpoints)} paths")
    asked = settings_of(arguments)
    if arguments.checkpoints:
        result = compare_checkpoints(*arguments.checkpoints)
        print(result, end="\n\n")
        if not result.layers:
            parser.error("no query and key matrices are known in these checkpoints")
        found, about = {Path(result.after).name: [result]}, f"{result.before} to {result.after}."
    else:
        found, about = trained_here(arguments.quick)
    lines = [
        "| model | Q (%) | K (%) | total (%) | mean Δ_L1 | < 0 (%) | mean Δ_L2 | < 0 (%) |",
        "|---|---|---|---|---|---|---|---|",
        *(row(name, results) for name, results in found.items()),
        *(f"| the paper's {name} | {' | '.join(cells)} |" for name, cells in PAPER.items()),
        "",
        about,
    ]
    draw_layers(asked, found)
    asked.write(lines, "qk_balance")


if __name__ == "__main__":
    main()
