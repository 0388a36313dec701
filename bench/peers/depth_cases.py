"""The cases of the depth ops: one weight, and ResNet-50's list, as products of factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..measure import operations
from ..measure.timing import triad_of
from ..measure.works import RESNET50, Work
from . import depth as contenders
from .cases import Case, Prepared

QS = (1.0, 1.5, 1.7, 2.0)
DEPTHS = (2, 3, 10)
DTYPES = (torch.float32, torch.bfloat16)
OPERATIONS: dict[str, Callable[[Case], int | None]] = {
    "factor_product": lambda case: operations.factor_product(case.depth or 1),
    "factor_step": lambda case: operations.factor_step(case.depth or 1, case.q or 0, case.storage or ""),
    "mirror_step": lambda case: operations.mirror_step(case.depth or 1, case.q or 0),
}


def one(device: str) -> Work:
    millions = 256 if device == "cuda" else 12
    return Work(f"one tensor of {millions} M", ((millions * 1_000_000,),))


def steps(suite: str, storages: tuple[str, ...], device: str) -> list[Case]:
    """Of the optimiser at each depth. ResNet-50's list without what takes minutes to compile."""
    return [
        case
        for work, dtypes, qs in ((one(device), DTYPES, QS), (RESNET50, DTYPES[:1], (1.0, 2.0)))
        for dtype in dtypes
        for depth in DEPTHS
        for q in qs
        for storage in storages
        for case in step(suite, work, dtype, depth, q, storage, device)
        if work is not RESNET50 or "compile" not in case.contender
    ]


def step(suite: str, work: Work, dtype: torch.dtype, depth: int, q: float, storage: str, device: str) -> list[Case]:
    return [
        Case(
            suite,
            work.name,
            contender.name,
            prepare,
            dtype,
            q,
            depth,
            storage,
            missing=contender.missing,
            what=(work, contender, OPERATIONS["mirror_step" if storage == "implicit" else "factor_step"]),
        )
        for contender in contenders.factor_step_contenders(depth, q, storage, device)
    ]


def products(device: str) -> list[Case]:
    """Forward and backward."""
    work = one(device)
    return [
        Case(
            "factor_product",
            work.name,
            contender.name,
            prepare,
            dtype,
            depth=depth,
            missing=contender.missing,
            what=(work, contender, OPERATIONS["factor_product"]),
        )
        for dtype in DTYPES
        for depth in DEPTHS
        for contender in contenders.factor_product_contenders(depth, device)
    ]


def prepare(case: Case, device: str, at_most: int | None) -> Prepared:
    work, contender, operations_of = case.what
    assert isinstance(work, Work)
    assert isinstance(contender, contenders.Contender)
    work = work.at_most(at_most) if at_most else work
    parameters: list[nn.Parameter] = work.parameters(case.dtype, device)
    moved, each = work.bytes(case.dtype, contender.words), operations_of(case)
    done = contenders.check(contender, parameters)
    return Prepared(done, moved, triad_of(moved, device), moved, each and each * work.weights)
