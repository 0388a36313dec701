"""A backend checks itself: before it first serves an op, the op runs on a few numbers, here and by the definition.

A compiler that makes a wrong kernel says nothing: with numba 0.60 a step at general q was wrong in every element. This looks
for results of that kind, in float32 at general q; the last bits are for the tests. 16-bit weights are asked for apart, for each
way to round them, when it is first used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.rounding import Rounding
from . import factor_step as _factor_step
from . import mirror_step as _mirror_step
from . import sign_vote as _sign_vote
from . import steepest_step as _steepest_step
from .dispatch import Backend
from .options import StepOptions

CPU = torch.device("cpu")
REPEATS = 27  # of five numbers: whole vectors and a rest, on every machine
TOLERANCE = 1e-5  # relative to the largest result: 80 ulp
STEP = StepOptions(lr=0.125, weight_decay=0.5)

Values = tuple[float, ...]
A: Values = (0.5, -1.25, 3.0, -0.0625, 1.0)
B: Values = (1.5, 0.5, -2.0, 1.25, 0.75)
GRADIENT: Values = (-2.0, 0.75, 0.0, 1e-3, 40.0)

Results = tuple[Tensor, ...]


def tensor(values: Values, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).repeat(REPEATS)


def steepest_step(backend: Backend, device: torch.device) -> Results:
    w, g = tensor(A, device), tensor(GRADIENT, device)
    _steepest_step.prepare([w], [g], [], STEP._replace(q=1.7), backend=backend)()
    return (w,)


def rounded_step(mode: str) -> Callable[[Backend, torch.device], Results]:
    def step(backend: Backend, device: torch.device) -> Results:
        w, g = (tensor(values, device, torch.bfloat16) for values in (A, GRADIENT))
        low = torch.zeros_like(w, dtype=torch.int16)
        options: dict[str, Any] = {"rounding": Rounding(mode, 1, 2.0, [3], [4]), "compensations": [low]}
        _steepest_step.prepare([w], [g], [], STEP._replace(q=2.0), backend=backend, **options)()
        return w, low

    return step


def factor_step(backend: Backend, device: torch.device) -> Results:
    factors = tensor(A, device), tensor(B, device)
    w, g = torch.empty_like(factors[0]), tensor(GRADIENT, device)
    _factor_step.prepare([w], [g], [factors], [], STEP._replace(depth=3, q=1.7), backend=backend)()
    return w, *factors


def mirror_step(backend: Backend, device: torch.device) -> Results:
    w, g, balance = tensor(A, device), tensor(GRADIENT, device), torch.tensor(0.25, dtype=torch.float64, device=device)
    _mirror_step.prepare([w], [g], [balance], STEP._replace(depth=3, q=1.7), backend=backend)()
    return (w,)


def factor_product(backend: Backend, device: torch.device) -> Results:
    home, factors = backend.home("factor_product"), [tensor(values, device) for values in (A, B, GRADIENT)]
    x, *grads = [torch.empty_like(w) for w in (factors[0], *factors)]
    home.factor_product(factors, x)
    home.factor_product_backward(factors[1], factors, grads)
    return x, *grads


def sign_vote(backend: Backend, device: torch.device) -> Results:
    votes = torch.stack([tensor(values, device) for values in (A, B, GRADIENT, A)])
    words = _sign_vote.packed_rows(votes, _sign_vote.bytes_of(votes.shape[1]), 0, backend)
    result = torch.empty_like(votes[0])
    _sign_vote.counted(words, result, backend)
    return (result,)


def diagonal_flow(backend: Backend, device: torch.device) -> Results:
    first, rest = tensor(A, device)[None], tensor(B, device)[None]
    Z, y = torch.stack([rest[0], first[0]])[None] / 16, torch.ones(1, 2, dtype=torch.float32, device=device)
    reals = {"q": 1.7, "lr": 0.125, "weight_decay": 0.5, "coupled_weight_decay": 0.0}
    runs = {name: torch.tensor([value], dtype=torch.float64, device=device) for name, value in reals.items()}
    integers = {"problem": 0, "depth": 3, "seed": 0}
    runs |= {name: torch.tensor([value], dtype=torch.int64, device=device) for name, value in integers.items()}
    data: dict[str, Any] = {"batch_size": 0, "loss": "mse", "reduction": "mean", "betas": (0.0, 0.0), "epsilon": 1e-8}
    backend.home("diagonal_flow").diagonal_flow(first, rest, None, Z, y, **runs, **data, begin=0, end=2)
    return first[0], rest[0]


CHECKS: dict[str, Callable[[Backend, torch.device], Results]] = {
    "steepest_step": steepest_step,
    "factor_step": factor_step,
    "mirror_step": mirror_step,
    "factor_product": factor_product,
    "sign_vote": sign_vote,
    "diagonal_flow": diagonal_flow,
    "stochastic": rounded_step("stochastic"),
    "compensated": rounded_step("compensated"),
}


def failure(backend: Backend, reference: Backend, device: torch.device, family: str) -> str:
    """What is wrong with the results of `backend` on `device`; empty if nothing.

    In a thread of its own, where no mode of the caller's (inference, fake tensors, autocast) is on.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is no memory to ask.
    """
    check, outcome = CHECKS[family], list[str | Exception]()

    def ask() -> None:
        try:
            expected = [result.double() for result in check(reference, CPU)]
            outcome.append(difference(family, check(backend, device), expected))
        except Exception as error:  # a broken kernel or compiler raises whatever it likes
            outcome.append(error)

    thread = threading.Thread(target=ask, name="pysteep self-check")
    thread.start()
    thread.join()
    found = outcome[0]
    if isinstance(found, (MemoryError, torch.OutOfMemoryError)):
        raise found
    return f"its check of {family} raised {found!r}" if isinstance(found, Exception) else found


def difference(family: str, results: Results, expected: list[Tensor]) -> str:
    for result, right in zip(results, expected, strict=True):
        got = result.double().cpu()
        wrong = ~((got - right).abs() <= TOLERANCE * right.abs().max())
        if wrong.any():
            i = int(wrong.nonzero()[0])
            return f"its check of {family} gave {got[i].item():.7g} where {right[i].item():.7g} is right"
    return ""
