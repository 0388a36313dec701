"""Extreme eigenpairs of a symmetric operator of which only products are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

MEMORY = 4 << 30
"""Bytes that vectors and their products may take. Where they hold all, one product in six is saved."""
MOST_VECTORS = 1000
PATIENCE = 40
"""Products, in units of 2k + 1, after which what has not converged is a continuum. Spectra of networks take 2 to 6."""

Array = np.ndarray[Any, np.dtype[Any]]
Product = Callable[[Array], Array]


class Eigenpairs(NamedTuple):
    """Values [k], descending; unit vectors [n, k]; norms [k] of what products of the vectors and these values differ by."""

    values: Array
    vectors: Array
    residuals: Array


class NoConvergence(RuntimeError):
    """Eigenvalues lie too close together for Lanczos' method; `values` [j] and `vectors` [n, j] are those that it found."""

    def __init__(self, message: str, values: Array, vectors: Array) -> None:
        super().__init__(message)
        self.values, self.vectors = values, vectors


def eigenpairs(
    product: Product,
    n: int,
    k: int,
    which: str,
    *,
    tolerance: float,
    seed: int,
    rounding: float = 2.0**-52,
    most: int | None = None,
) -> Eigenpairs:
    """k eigenpairs of a symmetric operator, by Lanczos' method with full orthogonality and thick restarts.

    Args:
        product: H v of a v, [n] in float64.
        n: the dimension.
        k: from 1 to n.
        which: "magnitude", "lowest", "highest" or "both": ceil(k/2) highest, floor(k/2) lowest.
        tolerance: residual that is asked for, relative to each |eigenvalue|.
        seed: of the vector that it starts from.
        rounding: of the products, relative to the largest eigenvalue: no less is asked for.
        most: vectors, > k, to keep before a restart; None: as MEMORY allows, and 2k + 1 at least.

    Raises:
        NoConvergence: too slow.

    Source: "Thick-restart Lanczos method for large symmetric eigenvalue problems" (Wu, Simon 2000).
    """
    fair = max(2 * k + 1, 20)
    most = min(n, most or max(fair, min(MOST_VECTORS, MEMORY // (16 * n))))
    # Tensors, as NumPy's threads and torch's get into each other's way; NumPy's memory, which is there only once it is used.
    basis, images = (torch.from_numpy(np.empty((most, n))) for _ in range(2))
    projected = np.zeros((most, most))
    generator = np.random.default_rng(seed)
    vector = _unit(torch.from_numpy(generator.standard_normal(n)))
    m = products = 0
    ready = min(fair, n)  # how many vectors tell whether the wanted ones are among them
    exhausted = False
    while True:
        basis[m] = vector
        images[m] = torch.from_numpy(product(basis[m].numpy()))
        m, products = m + 1, products + 1
        left, couplings = _orthogonal(images[m - 1], basis[:m])
        projected[m - 1, :m] = projected[:m, m - 1] = couplings.numpy()
        coupling = float(left.norm())
        if m >= ready and (m == most or products % max(5, m // 50) == 0):
            values, turned = eigh(projected[:m, :m])
            scale = abs(values).max()
            wanted = _extremes(values, k, which)
            open_ = coupling * abs(turned[-1, wanted]) > np.maximum(tolerance * abs(values[wanted]), rounding * scale)
            if m == n or not open_.any():
                found, by = values[wanted].copy(), torch.from_numpy(turned[:, wanted].T.copy())
                vectors = by @ basis[:m]
                residuals = (by @ images[:m] - torch.from_numpy(found)[:, None] * vectors).norm(dim=1)
                return Eigenpairs(found, vectors.T.numpy(), residuals.numpy())
            if products >= PATIENCE * fair:
                good = wanted[~open_]
                raise NoConvergence(
                    f"k={k} eigenvalues ({which}) do not converge: after {products} products {len(good)} have. The others "
                    "lie close together, such as near 0 where few are negative: ask for fewer, another end or more tolerance",
                    values[good],
                    basis[:m].numpy().T @ turned[:, good],
                )
            if m == most:
                m = _restart(basis, images, projected, values, turned, wanted)
        if coupling > 4 * rounding * abs(projected[:m, :m]).max():
            vector = left / coupling
        else:  # to a part of the space that no product leads to, where all of the wanted may be
            if not exhausted:
                ready, exhausted = min(m + k, most), True
            vector = _unit(_orthogonal(torch.from_numpy(generator.standard_normal(n)), basis[:m])[0])


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of `vector` is orthogonal to the rows of `basis`, and its coordinates along them."""
    left, coordinates = vector, basis.new_zeros(len(basis))
    before = left.norm()
    for _ in range(4):  # until nothing is found any more: one pass leaves the rounding of what it takes away
        along = basis @ left
        left, coordinates = left - along @ basis, coordinates + along
        after = left.norm()
        if after > 0.7 * before:
            break
        before = after
    return left, coordinates


def _extremes(values: Array, k: int, which: str) -> Array:
    """Where the k of ascending `values` are that `which` asks for, in descending order of them."""
    n = len(values)
    if which == "magnitude":
        return np.sort(np.argsort(-abs(values), kind="stable")[:k])[::-1]
    low = {"lowest": k, "both": k // 2, "highest": 0}[which]
    return np.concatenate([np.arange(low), np.arange(n - (k - low), n)])[::-1]


def _restart(basis: Tensor, images: Tensor, projected: Array, values: Array, turned: Array, wanted: Array) -> int:
    """Keep the wanted Ritz vectors and, of the others, those of the largest values; returns how many.

    The others, too, as the highest would come back at once where only the lowest are wanted.
    """
    m, n = basis.shape
    rest = np.setdiff1d(np.argsort(-abs(values)), wanted, assume_unique=True)
    kept = np.concatenate([wanted, rest[: (m - len(wanted)) // 2]])
    by = torch.from_numpy(turned[:, kept].T.copy())
    for begin in range(0, n, 1 << 16):
        part = slice(begin, begin + (1 << 16))
        basis[: len(kept), part] = by @ basis[:, part]
        images[: len(kept), part] = by @ images[:, part]
    projected[:] = 0
    np.fill_diagonal(projected[: len(kept), : len(kept)], values[kept])
    return len(kept)
