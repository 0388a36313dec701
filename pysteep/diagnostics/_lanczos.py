"""Extreme eigenpairs of a symmetric operator of which only products are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

RESTARTS = 40
"""Of Lanczos' method. Spectra of networks take up to 10; one that takes more is a continuum at the end that was asked for."""

Array = np.ndarray[Any, np.dtype[Any]]
Product = Callable[[Array], Array]


def eigenpairs(product: Product, n: int, k: int, which: str, *, tolerance: float, seed: int) -> tuple[Array, Array]:
    """k eigenvalues of a symmetric operator and their vectors, by Lanczos' method with full orthogonality (ARPACK).

    Args:
        product: H v of a v, [n] in float64.
        n: the dimension.
        k: from 1 to n. Of an n that is not far above k the whole matrix is made, by n products.
        which: "magnitude", "lowest", "highest" or "both": ceil(k/2) highest, floor(k/2) lowest.
        tolerance: residual that Lanczos' method is asked for, relative to each |eigenvalue|.
        seed: of the vector that it starts from.

    Returns:
        Values [k], descending, and unit vectors [n, k].

    Raises:
        ArpackNoConvergence: too slow; it holds those pairs that were found.
    """
    # Restarts that drop the highest values have to find them again: keeping as many as are asked for halves the products.
    asked = 2 * k if which == "lowest" else k
    kept = max(2 * asked + 1, 20)
    if n <= kept:
        matrix = np.stack([np.asarray(product(column), np.float64) for column in np.eye(n)])
        values, vectors = eigh((matrix + matrix.T) / 2)
    else:
        values, vectors = _lanczos(product, n, k, asked, kept, which, tolerance, seed)
    order = np.argsort(values)
    if which == "magnitude":
        order = np.argsort(abs(values))
    low = {"lowest": k, "both": k // 2}.get(which, 0)
    chosen = np.concatenate([order[:low], order[len(order) - (k - low) :]])
    chosen = chosen[np.argsort(-values[chosen])]
    return values[chosen], vectors[:, chosen]


def _lanczos(
    product: Product, n: int, k: int, asked: int, kept: int, which: str, tolerance: float, seed: int
) -> tuple[Array, Array]:
    zero = True

    def matvec(vector: Array) -> Array:
        nonlocal zero
        result = product(vector)
        zero = zero and not result.any()
        return result

    ends = {"magnitude": "LM", "highest": "LA", "lowest": "BE", "both": "BE" if k > 1 else "LA"}
    try:
        values, vectors = eigsh(
            LinearOperator((n, n), matvec=matvec, dtype=np.float64),
            asked,
            which=ends[which],
            v0=np.random.default_rng(seed).standard_normal(n),
            ncv=kept,
            maxiter=RESTARTS,
            tol=tolerance,
            rng=np.random.default_rng(seed),
        )
    except ArpackNoConvergence as error:
        found = error.eigenvalues
        raise ArpackNoConvergence(
            f"k={k} eigenvalues ({which}) do not converge: after {RESTARTS} restarts {len(found)} of {asked} have. The others "
            "lie close together, such as near 0 where few are negative: ask for fewer, for another end, or a larger tolerance",
            found,
            error.eigenvectors,
        ) from None
    except ArpackError:
        if not zero:
            raise
        return np.zeros(asked), np.eye(n, asked)
    return values, vectors
