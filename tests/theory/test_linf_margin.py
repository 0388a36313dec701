"""The L_inf margin of data of uneven scale, against all vertices of the linear program in exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from pysteep import theory


def determinant(rows):
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def exact_margin(signed):
    """Of rows of two numbers: the largest t with signed x >= t, |x_l| <= 1 is at a vertex of three tight constraints."""
    constraints = [([Fraction(a), Fraction(b), Fraction(-1)], Fraction(0)) for a, b in signed.tolist()]
    for at in (0, 1):
        for side in (1, -1):
            bound = [Fraction(side * (at == i)) for i in range(2)]
            constraints += [([*bound, Fraction(0)], Fraction(-1))]
    best = Fraction(0)
    for tight in itertools.combinations(constraints, 3):
        rows, right = [row for row, _ in tight], [value for _, value in tight]
        whole = determinant(rows)
        if whole == 0:
            continue
        vertex = [
            determinant([[*row[:i], value, *row[i + 1 :]] for row, value in zip(rows, right, strict=True)]) / whole
            for i in range(3)
        ]
        if all(sum(a * v for a, v in zip(row, vertex, strict=True)) >= value for row, value in constraints):
            best = max(best, vertex[2])
    return best


def check(Z, y):
    exact = exact_margin(y[:, None] * Z)
    if exact == 0:
        with pytest.raises(ValueError, match="Z must be separated"):
            theory.linf_margin(Z, y, 2)
        return
    found = theory.linf_margin(Z, y, 2)
    assert found.margin == pytest.approx(float(exact), rel=1e-9)
    assert np.abs(found.direction).max() == 1
    assert (y * (Z @ found.direction) >= found.margin * (1 - 1e-9)).all()


@pytest.mark.parametrize(
    "Z",
    [
        [[1e10, 0.0], [0.0, 1.0]],
        [[1e200, 0.0], [0.0, 1.0]],
        [[1e200, -1e200], [1.0, 0.5]],
        [[1e-200, 3e-200], [2e-200, -1e-200]],
        [[1e200, 1e200], [1.0, -0.5]],
        [[1e150, 0.0], [0.0, 1e-150]],
        [[1.0, 1e-12], [-1.0, 1e-12]],
        [[1e8, 1.0], [-1e8, 1.0]],
        [[1.7e308, 1.7e308], [1.7e308, -1e308]],
    ],
)
def test_uneven_scales(Z):
    with np.errstate(over="ignore"):
        check(np.array(Z), np.ones(2))
        check(np.array(Z)[:, ::-1] * [1, -1], np.array([1.0, 1.0]))


def test_drawn_scales():
    rng = np.random.default_rng(2)
    for _ in range(60):
        Z = rng.normal(size=(4, 2)) * 10.0 ** rng.uniform(-8, 8, size=(4, 1)) * 10.0 ** rng.uniform(-4, 4, size=2)
        y = np.sign(Z @ (rng.normal(size=2) / np.abs(Z).max(axis=0))) if rng.random() < 0.8 else rng.choice([-1.0, 1.0], 4)
        check(Z, y)


def test_what_is_not_separated():
    for Z in ([[0.0, 0.0], [1.0, 1.0]], [[1e200, 0.0], [-1e200, 0.0]], [[1.0, 1.0], [-1e-9, -1e-9]]):
        with pytest.raises(ValueError, match="Z must be separated"):
            theory.linf_margin(Z, [1, 1], 2)


def test_a_tensor():
    assert theory.linf_margin(torch.tensor([[1e10, 0.0], [0.0, 1.0]]), torch.ones(2), 2).margin == 1.0
