"""Eigenvalues of a loss's Hessian at both ends of its spectrum, by the weights or by their factors."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .._numbers import as_integer, check_function, is_finite
from .._selection import Match, check_model
from ..factorize import _plain
from ..optim import SteepestDescent
from ._hessian import LOSS_RTOL, Hessian, Variables, variables_of
from ._lanczos import eigenpairs
from ._product_file import ProductFile

__all__ = ["Spectrum", "hessian_spectrum"]

Which = Literal["both", "magnitude", "lowest", "highest"]
Space = Literal["weights", "factors"]
Reduction = Literal["mean", "sum"]
WHICH, SPACES, REDUCTIONS = get_args(Which), get_args(Space), get_args(Reduction)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenpairs of a Hessian, made by `hessian_spectrum`.

    Args:
        values: [k], descending.
        residuals: [k], ||H v - value v||, of products that were taken. A true eigenvalue lies within it of each value.
        vectors: [n, k], float64, of norm 1 and orthogonal.
        negative: how many values are below -residual: negative beyond the error of the method.
        products: Hessian-vector products, with those that were read from a file.
        names: of the tensors of which the n coordinates are made, in their order: parameters, or "<parameter>.factor_<i>".
        shapes: of these tensors.
    """

    values: Array
    residuals: Array
    vectors: Array
    negative: int
    products: int
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def dimension(self) -> int:
        """n."""
        return len(self.vectors)

    def vector(self, index: int) -> dict[str, Tensor]:
        """Eigenvector `index` by name, in the shapes of the parameters or factors; float64, on the CPU."""
        pieces = torch.from_numpy(self.vectors[:, index].copy()).split([shape.numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def __repr__(self) -> str:
        return (
            f"Spectrum({len(self.values)} of {self.dimension} eigenvalues from {self.values[-1]:.4g} to {self.values[0]:.4g}, "
            f"{self.negative} negative, residuals up to {self.residuals.max():.1e}, {self.products} products)"
        )


def hessian_spectrum(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Any,
    k: int = 50,
    which: Which = "both",
    space: Space = "weights",
    params: Match = None,
    *,
    optimizer: SteepestDescent | None = None,
    reduction: Reduction = "mean",
    tolerance: float = 5e-4,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Spectrum:
    """Extreme eigenvalues of the Hessian of a loss at the model's parameters.

    Exact Hessian-vector products over all batches, in the parameters' own dtypes and on their devices, and Lanczos' method in
    float64 with full orthogonality, so that no eigenvalue comes twice. The model is as it was afterwards: parameters,
    gradients, BatchNorm statistics; and so are the generators of random numbers. Call `model.eval()` before for the Hessian
    without dropout and with running statistics; in training mode it is that of one draw of masks.

    It takes memory for some hundred vectors of n numbers in float64 and as many products, up to 4 GiB; where that holds less
    than 2k + 1 of each, for 2k + 1, and then a fifth more products. For k = 50 of a trained network 200 to 400 products are
    usual. Eigenvalues in a dense cluster, as those near 0, converge slowly or not at all: ask for no more of "lowest" or "both"
    than stand clear of 0.

    Args:
        model: any module whose chosen parameters are float32 or float64.
        loss_fn: (outputs, targets) -> a loss, of a batch that is a pair; (outputs, batch) -> a loss, of one that is a mapping,
            which the model gets as keyword arguments. It may add terms of `model.parameters()`.
        data: batches, again at each pass: a DataLoader or a list; or one batch, (inputs, targets) or a mapping. They are moved
            to the parameters' device. Shuffling by torch's global generator or none is the same in each pass.
        k: from 1 to n.
        which: "both": ceil(k/2) highest and floor(k/2) lowest; "magnitude": largest |eigenvalue|; "lowest"; "highest".
        space: "weights": by the dense weights, of a model made by `pysteep.factorize` by their products. "factors": by the
            factors, those of `pysteep.factorize` or of `optimizer`.
        params: None: parameters that require a gradient. A shell-style pattern such as "encoder.*", or a function
            (name, parameter) -> bool, asked for all; factors go by the name of their dense weight. A tied parameter counts
            once, if any of its names is chosen.
        optimizer: with space "factors" only: a SteepestDescent whose depth option holds the factors w_1, ..., w_L, here L
            independent variables whatever its storage.
        reduction: what `loss_fn` gives of a batch: "mean" over its samples, so that batches count by their samples (the first
            dimension of the targets, or of a mapping's first tensor); or "sum".
        tolerance: residual asked of Lanczos' method, relative to each |eigenvalue|, but no less than what float32 or float64
            resolve beside the largest; > 0.
        seed: of the vector that it starts from, and of dropout; >= 0.
        resume: a file that keeps every product, of n numbers each. After an interruption the same call reads what it holds and
            goes on, to the same bits.
        progress: whether to show a bar.

    Returns:
        The eigenpairs.

    Raises:
        ValueError, TypeError: an argument is not as above; a loss or product is not finite, or the loss changes from pass to
            pass; `resume` is a file of something else.
        NoConvergence: the eigenvalues lie too close together; its `values` and `vectors` are those that were found.

    Source: Section 5 and Theorem 4.3 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    _check_choice("which", which, WHICH)
    _check_choice("space", space, SPACES)
    _check_choice("reduction", reduction, REDUCTIONS)
    k, seed = _check_numbers(k, tolerance, seed)
    check_model(model)
    check_function("loss_fn", loss_fn)
    if not (params is None or isinstance(params, str) or callable(params)):
        raise TypeError(f"params must be a shell-style pattern, a function (name, parameter) -> bool or None; got {params!r}")
    if optimizer is not None and (space == "weights" or not isinstance(optimizer, SteepestDescent)):
        raise ValueError(
            f"optimizer must be a pysteep.SteepestDescent with space 'factors' or None; got {type(optimizer).__name__} with "
            f"space {space!r}"
        )
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        if space == "weights":
            stack.enter_context(_plain(model))
        variables = variables_of(model, params, space, optimizer)
        n = sum(tensor.numel() for tensor in variables.tensors)
        if k > n:
            raise ValueError(f"k must be from 1 to n = {n}; got {k}")
        hessian = Hessian(model, loss_fn, data, variables, reduction, seed)
        product = hessian.product
        if resume is not None:
            arguments = {"k": k, "which": which, "space": space, "reduction": reduction, "tolerance": tolerance, "seed": seed}
            fingerprint = _fingerprint(model, variables, arguments)
            file = ProductFile(Path(resume), fingerprint, hessian.loss, product, n, hessian.dtype, rtol=LOSS_RTOL)
            product = stack.enter_context(file)
        bar = stack.enter_context(tqdm(desc="Hessian", unit="product", disable=not progress))
        products = 0

        def counted(vector: Array) -> Array:
            nonlocal products
            result = product(vector).astype(np.float64)
            products += 1
            bar.update()
            return result

        rounding = float(np.finfo(hessian.dtype).eps)
        values, vectors, residuals = eigenpairs(counted, n, k, which, tolerance=tolerance, seed=seed, rounding=rounding)
    negative = int((values < -residuals).sum())
    shapes = tuple(tensor.shape for tensor in variables.tensors)
    return Spectrum(values, residuals, vectors, negative, products, tuple(variables.names), shapes)


def _fingerprint(model: nn.Module, variables: Variables, arguments: dict[str, Any]) -> str:
    """A checksum of all but the data and the loss."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"variable {name}": tensor for name, tensor in zip(variables.names, variables.tensors, strict=True)}
    kinds = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    training = [module.training for module in model.modules()]
    result = hashlib.sha256(json.dumps([arguments, kinds, training]).encode())
    for tensor in tensors.values():
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _check_numbers(k: Any, tolerance: Any, seed: Any) -> tuple[int, int]:
    """k and the seed as Python's ints."""
    if not is_finite(tolerance) or tolerance <= 0:
        raise ValueError(f"tolerance must be a finite number > 0; got {tolerance!r}")
    return _integer("k", k, 1), _integer("seed", seed, 0)


def _integer(name: str, value: Any, least: int) -> int:
    whole = as_integer(value)
    if whole is None or not least <= whole < 2**63:
        raise ValueError(f"{name} must be an int from {least} to 2^63 - 1; got {value!r}")
    return whole
