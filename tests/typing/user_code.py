"""What a type checker says of code that uses pysteep. `make lint` runs mypy on it; nobody runs the file itself.

A line that is wrong on purpose says which error it must give: mypy reports an ignored error that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

import torch
from torch import Tensor, nn

import pysteep
from pysteep import GradientRelease, ParamGroups, SteepestDescent

model = nn.Linear(3, 2)
optimizer = SteepestDescent(model.parameters(), lr=1e-3, q=1.5, betas=(0.9, 0.99), depth=3, storage="full", init="balanced")
SteepestDescent(model.parameters(), lr=torch.tensor(1e-3), rounding="stochastic", state_dtype=torch.float32, backend="cpp")
SteepestDescent(pysteep.param_groups(model, 3), scale=0.1, init="lambda")
assert_type(optimizer, SteepestDescent)
assert_type(optimizer.factors(model.weight), list[Tensor])
assert_type(pysteep.param_groups(model, 3), ParamGroups)
assert_type(pysteep.gradient_release(model, optimizer), GradientRelease)

SteepestDescent(model.parameters(), storage="tied_")  # type: ignore[arg-type]
SteepestDescent(model.parameters(), init="saddel")  # type: ignore[arg-type]
SteepestDescent(model.parameters(), rounding="neerest")  # type: ignore[arg-type]
SteepestDescent(model.parameters(), backend="cuda:0")  # type: ignore[arg-type]
SteepestDescent(model.parameters(), q="1")  # type: ignore[arg-type]

weights, gradients = [torch.zeros(2)], [torch.ones(2)]
pysteep.functional.steepest_step(weights, gradients, lr=1e-3, rounding="nearest", backend="numba")
pysteep.functional.steepest_step(weights, gradients, lr=1e-3, rounding="up")  # type: ignore[arg-type]
assert_type(pysteep.functional.factor_product(weights), Tensor)
assert_type(pysteep.serving("cpu", backend="cpp"), str)

# Modules that are imported when they are first used have types all the same.
problem = pysteep.flow.regression(k=8, n=10)
assert_type(problem, pysteep.flow.Problem)
assert_type(pysteep.flow.simulate(problem, q=1.0, lr=1e-3, steps=3, optimizer="adam"), pysteep.flow.Result)
pysteep.flow.simulate(problem, q=1.0, lr=1e-3, steps=3, optimizer="sgd")  # type: ignore[arg-type]
pysteep.flow.Problem(problem.Z, problem.y, loss="hinge")  # type: ignore[arg-type]
exponent: float = pysteep.theory.metric_exponent(1.5, 3)
modules: Sequence[object] = (pysteep.diagnostics, pysteep.flow, pysteep.theory, pysteep.vote)
unknown = pysteep.nothing  # type: ignore[attr-defined]
