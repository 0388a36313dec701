"""What the tests of hessian_spectrum share: a small net, dense Hessians, and a loss that is interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pysteep.diagnostics import hessian_spectrum

WHICH = ["both", "magnitude", "lowest", "highest"]
FLOAT64 = 1e-10
"""Of eigenvalues in float64, relative to the largest, where Lanczos' method is asked for 1e-11."""


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small wait longer for a second thread than they work, on a machine that does something else as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spectrum_of(*args, **options):
    return hessian_spectrum(*args, **{"tolerance": 1e-11, "progress": False, **options})


def extremes(values, k, which):
    """The definition of `which`."""
    values = np.sort(values)[::-1]
    if which == "magnitude":
        return np.sort(values[np.argsort(-abs(values), kind="stable")[:k]])[::-1]
    high = {"highest": k, "lowest": 0, "both": (k + 1) // 2}[which]
    return np.concatenate([values[:high], values[len(values) - (k - high) :]])


def build_mlp(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(count=23, dtype=torch.float64):
    return torch.randn(count, 5, dtype=dtype), torch.randint(0, 3, (count,))


def dense_hessian(f, *tensors):
    """torch's own Hessian of f by all entries of `tensors`."""
    sizes, shapes = [t.numel() for t in tensors], [t.shape for t in tensors]

    def of_flat(flat):
        return f(*(piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)))

    return torch.autograd.functional.hessian(of_flat, torch.cat([t.detach().reshape(-1) for t in tensors])).numpy()


def of_model(model, inputs, targets, loss_fn=cross_entropy):
    """The dense Hessian by all parameters of `model`."""
    names = [name for name, _ in model.named_parameters()]

    def f(*tensors):
        return loss_fn(functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,)), targets)

    return dense_hessian(f, *model.parameters())


def check(spectrum, matrix, k, which):
    expected = np.linalg.eigvalsh(matrix)
    scale = abs(expected).max()
    np.testing.assert_allclose(spectrum.values, extremes(expected, k, which), rtol=0, atol=FLOAT64 * scale)
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(k), rtol=0, atol=FLOAT64)
    true = np.linalg.norm(matrix @ spectrum.vectors - spectrum.vectors * spectrum.values, axis=0)
    np.testing.assert_allclose(spectrum.residuals, true, rtol=0, atol=FLOAT64 * scale)
    assert spectrum.negative == (spectrum.values < -spectrum.residuals).sum()
    assert spectrum.dimension == len(matrix)


class Interrupted:
    """cross_entropy that counts its calls and is interrupted at one of them."""

    def __init__(self, at=None):
        self.calls, self.at = 0, at

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return cross_entropy(outputs, targets)
