"""Tables 2 and 8 to 11, Figures 5a and 16 to 32: fine-tuning from near a saddle, and the Hessian's spectrum where it ends.

SGD at Adam's lr, SGD at an lr of its own, Adam, and sign descent (`SteepestDescent(q=1)`, no momentum), each lr but the first
chosen on a validation split. By default a small convolutional net, pretrained here on scikit-learn's digits 0 to 4, is
fine-tuned on the digits 5 to 9 with a fresh head; with --dataset and --data it is torchvision's pretrained models and its data.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from finetune_tasks import digits, of_torchvision
from finetuning import OPTIMIZERS, SMALL_SGD, TUNED_SGD, Run, compare, distances, draw, runs_of, table
from paper import argument_parser, settings_of
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training import Recipe, accuracy, finish, start, train

from pysteep.diagnostics import Spectrum, hessian_spectrum

SMALL_LRS = [5e-4, 1e-3, 2e-3, 4e-3]
LARGE_LRS = [1e-2, 3e-2, 1e-1, 2e-1, 4e-1]

# (model, dataset) -> method -> validation accuracy, L1 and L2 distance [Tables 8 to 11].
PAPER = {
    ("resnet18", "cifar10"): {
        SMALL_SGD: "19.15 ± 2.82, 424911, 29641",
        TUNED_SGD: "93.60 ± 0.38, 477751, 28410",
        "Adam": "95.19 ± 0.21, 693102, 27834",
    },
    ("resnet18", "flowers"): {
        SMALL_SGD: "1.22 ± 0.53, 206326, 10124",
        TUNED_SGD: "62.13 ± 1.10, 173883, 7015",
        "Adam": "80.50 ± 1.38, 618592, 11432",
    },
    ("vit_l", "cifar10"): {
        SMALL_SGD: "73.27 ± 3.68, 460, 0.48",
        TUNED_SGD: "99.07 ± 0.35, 24618, 6.25",
        "Adam": "99.28 ± 0.07, 453935, 39.5",
    },
    ("vit_l", "flowers"): {
        SMALL_SGD: "1.03 ± 0.82, 25.7, 0.04",
        TUNED_SGD: "98.94 ± 0.05, 4656, 1.50",
        "Adam": "99.37 ± 0.08, 108584, 8.35",
    },
}


def main() -> None:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=("digits", "cifar10", "flowers"), default="digits")
    add("--model", choices=("resnet18", "vit_l"), default="resnet18", help="for cifar10 and flowers (default resnet18)")
    add("--data", type=Path, metavar="DIR", help="torchvision's folder of the dataset")
    add("--seeds", type=int, help="default 5, with --quick 1")
    add("--epochs", type=int, help="default 15, with --quick 4")
    add("--batch", type=int, default=128, help="for cifar10 and flowers (default 128)")
    add("-k", type=int, help="eigenvalues of largest magnitude (default 50, with --quick 10)")
    add("--small-lrs", type=float, nargs="+", metavar="LR", help="to choose from for Adam and sign descent")
    add("--large-lrs", type=float, nargs="+", metavar="LR", help="to choose from for SGD")
    asked = parser.parse_args()
    if asked.dataset != "digits" and asked.data is None:
        parser.error(f"--data must be torchvision's folder for --dataset {asked.dataset}")
    seeds, epochs = asked.seeds or (1 if asked.quick else 5), asked.epochs or (4 if asked.quick else 15)
    small = asked.small_lrs or (SMALL_LRS[1:2] if asked.quick else SMALL_LRS)
    large = asked.large_lrs or (LARGE_LRS[2:3] if asked.quick else LARGE_LRS)
    k = asked.k or (10 if asked.quick else 50)
    if asked.dataset == "digits":
        torch.set_num_threads(1)  # for a net so small more of them wait for each other
    process, recipe = start(), Recipe(epochs)
    with tqdm(total=seeds * 6 + runs_of(seeds, small, large), unit="run", disable=not process.first) as bar:
        tasks = []
        for seed in range(seeds):
            if asked.dataset == "digits":
                tasks.append(digits(seed, epochs, process))
            else:
                tasks.append(of_torchvision(asked.model, asked.dataset, asked.data, asked.batch, seed, process))
            bar.update()

        def fine_tune(name: str, lr: float, seed: int) -> Run:
            task = tasks[seed]
            bar.set_description(f"{name}, lr {lr:g}, seed {seed}")
            net = copy.deepcopy(task.net)
            train(net, OPTIMIZERS[name](net.parameters(), lr=lr), task.train, recipe, process)
            bar.update()
            reached = (accuracy(net, part, process) for part in (task.validation, task.test))
            return Run(net, *reached, *distances(list(task.net.parameters()), list(net.parameters())))

        found = compare(fine_tune, seeds, small, large)
        nets = {"before": [task.net for task in tasks], **{name: [run.net for run in of] for name, (_, of) in found.items()}}
        spectra: dict[str, list[Spectrum]] = {name: [] for name in nets}
        for name, of_seeds in nets.items():
            bar.set_description(f"spectrum, {name}")
            for net, task in zip(of_seeds, tasks, strict=True):
                spectra[name].append(hessian_spectrum(net.eval(), cross_entropy, task.hessian, k, "magnitude", progress=False))
                bar.update()
    if process.first:
        settings = settings_of(asked)
        subject = "digits 5 to 9 after 0 to 4" if asked.dataset == "digits" else f"{asked.model} on {asked.dataset}"
        title = f"Fine-tuning, {subject}: the {k} eigenvalues of largest magnitude at the end, {seeds} seeds"
        settings.save(draw(spectra, found, title), "finetune_spectrum")
        of = asked.model, "cifar10" if asked.dataset == "digits" else asked.dataset
        settings.write([*table(spectra, found, " on ".join(of), PAPER[of]), "", f"Ours: {subject}."], "finetune_spectrum")
    finish(process)


if __name__ == "__main__":
    main()
