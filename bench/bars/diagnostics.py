"""What pysteep.diagnostics must reach on a CPU: `python -m bench bars diagnostics`."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from pysteep.diagnostics import compare_checkpoints, hessian_spectrum, sparsity_report

from ..measure.reporting import Bar, Suite
from ..measure.timing import medians
from ..measure.works import RESNET50
from .checkpoints import copied, mapped, read_both, write_pair

ROUNDS = 9
K = 50
GIGABYTES = 4  # of two checkpoints together


def digits_net() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """20 035 parameters, trained for 20 epochs, and the digits."""
    digits = load_digits()
    images, labels = torch.as_tensor(digits.data, dtype=torch.float32) / 16, torch.as_tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 267), nn.Tanh(), nn.Linear(267, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(20):
        for part in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[part]), labels[part]).backward()
            optimizer.step()
    return net, (images, labels)


def spectra() -> tuple[list[Bar], str]:
    """All ends of the spectrum of the digits net."""
    net, data = digits_net()
    n = sum(param.numel() for param in net.parameters())
    lines = [
        f"| spectrum, {n} parameters, k = {K} | products | s | worst residual | negative | highest | lowest |",
        "|---" * 7 + "|",
    ]
    bars = []
    for which in ("magnitude", "highest", "both"):
        begun = time.perf_counter()
        found = hessian_spectrum(net, nn.functional.cross_entropy, data, K, which, progress=False)
        seconds = time.perf_counter() - begun
        worst = float((found.residuals / abs(found.values)).max())
        overlap = float(abs(found.vectors.T @ found.vectors - np.eye(K)).max())
        ends = f"{found.values[0]:.3g} | {found.values[-1]:.3g}"
        lines.append(f"| {which} | {found.products} | {seconds:.1f} | {worst:.1e} | {found.negative} | {ends} |")
        bars.append(Bar(f"spectrum, {which}: worst relative residual / 1e-3", worst / 1e-3, "<=", 1))
        bars.append(Bar(f"spectrum, {which}: overlap of two eigenvectors / 1e-6", overlap / 1e-6, "<=", 1))
        if which == "magnitude":
            bars.append(Bar("spectrum, magnitude: products", found.products, "<=", 400))
    return bars, "\n".join(lines)


def checkpoints(gigabytes: float, dtype: torch.dtype, rounds: int) -> tuple[Bar, str]:
    """Comparing two files beside reading them, from the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pair(Path(folder), gigabytes, dtype)
        size = sum(path.stat().st_size for path in paths)
        steps = {
            "read into a buffer": partial(read_both, copied, paths),
            "mapped and summed": partial(read_both, mapped, paths),
            "compare_checkpoints": partial(compare_checkpoints, *paths, progress=False),
        }
        times = medians(steps, rounds)
    name = str(dtype).removeprefix("torch.")
    lines = [f"| two files, {size / 1e9:.1f} GB of {name} together | s | GB/s |", "|---|---|---|"]
    lines += [f"| {step} | {seconds:.3f} | {size / seconds / 1e9:.1f} |" for step, seconds in times.items()]
    own = times.pop("compare_checkpoints")
    return Bar(f"compare_checkpoints, {name}: best reading time / time", min(times.values()) / own, ">=", 0.6), "\n".join(lines)


def sparsity(dtype: torch.dtype, rounds: int) -> Bar:
    """Of ResNet-50's tensors."""
    net = nn.Module()
    for i, param in enumerate(RESNET50.parameters()):
        net.register_parameter(f"weight_{i}", nn.Parameter(param.detach().to(dtype)))
    report_of = partial(sparsity_report, net, match=lambda *_: True)
    assert report_of().sizes.sum() > 25e6
    name = str(dtype).removeprefix("torch.")
    return Bar(f"sparsity_report, ResNet-50, {name}: seconds", medians({"": report_of}, rounds)[""], "<=", 0.5)


def measure(rounds: int) -> Suite:
    bars, table = spectra()
    tables = [table]
    for dtype in (torch.bfloat16, torch.float32):
        bar, table = checkpoints(GIGABYTES, dtype, rounds)
        bars.append(bar)
        tables.append(table)
    bars += [sparsity(dtype, rounds) for dtype in (torch.float32, torch.bfloat16)]
    return Suite(bars, tables, f"medians of {rounds} rounds taken in turn")
