"""How often a step goes into compiled code: kernels of a GPU; on a CPU calls of operators that read or write memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
CONVERSION = "aten::to"
VIEWS = "alias as_strided detach expand permute reshape select slice squeeze t transpose unsqueeze view"
WITHOUT_MEMORY = {
    f"aten::{name}" for name in (*VIEWS.split(), "empty", "empty_like", "empty_strided", "result_type", "resolve_conj")
}


def launches(step: Step, device: str = "cpu") -> int:
    """Of one call of `step`."""
    if device == "cuda":
        return _kernels(step)
    with _counted_homes() as count, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        step()
    first = [event for event in profiled.events() if event.cpu_parent is None]
    return count[0] or sum(map(_counts, _leaves(first)))


def _kernels(step: Step) -> int:
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    of_gpu = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # What torch notes around Optimizer.step is an event of the GPU as well.
    kernels = [event for event in of_gpu if not getattr(event, "is_user_annotation", False)]
    return sum(not event.name.startswith(("Memset", "Memcpy", "Optimizer.")) for event in kernels)


def _leaves(events: Iterable[Any]) -> Iterator[str]:
    """Operators that call no other. What makes a tensor of a Python number is part of the operator that takes it."""
    for event in events:
        others = [child for child in event.cpu_children if child.name != CONVERSION]
        if event.name.startswith(COMPILED):
            yield event.name
        elif event.name != CONVERSION or event.cpu_parent is None:
            yield from _leaves(others) if others else [event.name]


def _counts(name: str) -> bool:
    return name.startswith(COMPILED) or (name.startswith("aten::") and name not in WITHOUT_MEMORY)


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
