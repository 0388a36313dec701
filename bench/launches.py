"""How often a step goes into compiled code: kernels of a GPU; on a CPU calls of operators that read or write memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import pysteep

from .timing import Step

HOMES = {
    "steepest_step": ("steepest_step", "steepest_power_sum"),
    "factor_product": ("factor_product", "factor_product_backward"),
    "factor_step": ("factor_step",),
    "mirror_step": ("mirror_step",),
    "diagonal_flow": ("diagonal_flow",),
}
COMPILED = "## Call CompiledFxGraph"
WITHOUT_MEMORY = (
    "empty",
    "view",
    "as_strided",
    "detach",
    "select",
    "slice",
    "t",
    "transpose",
    "expand",
    "resolve",
    "result_type",
)


def launches(step: Step, device: str = "cpu") -> int:
    """Of one call of `step`."""
    if device == "cuda":
        return _kernels(step)
    with _counted_homes() as count, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        step()
    names = [event.name for event in profiled.events() if _is_leaf(event)]
    return count[0] or sum(map(_counts, names))


def _kernels(step: Step) -> int:
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    kinds = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memset", "Memcpy")) for name in kinds)


def _is_leaf(event: Any) -> bool:
    return event.name.startswith(COMPILED) or not event.cpu_children


def _counts(name: str) -> bool:
    if name.startswith(COMPILED):
        return True
    return name.startswith("aten::") and not name.removeprefix("aten::").rstrip("_").startswith(WITHOUT_MEMORY)


@contextmanager
def _counted_homes() -> Iterator[list[int]]:
    """Counts the calls of pysteep's ops, which are no torch operators when called eagerly."""
    count = [0]

    def counting(original: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            return original(*arguments, **options)

        return counted

    with ExitStack() as stack:
        for backend in pysteep.backends().values():
            for op, names in HOMES.items() if backend.available else ():
                home = backend.home(op)
                for name in names:
                    stack.enter_context(mock.patch.object(home, name, counting(getattr(home, name))))
        yield count
