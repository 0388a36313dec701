"""CPU tensors that say they are on a GPU, a home that steps them, and a CUDA graph of that: what the host does, without a GPU.

A tensor here refuses to be read by the host. While a `Graph` is captured, every operation on such tensors and every call of
the home is noted; a replay repeats those and nothing else, as a CUDA graph does. So a number that the host had read, or an
operation that the host had decided upon, would be repeated as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pysteep._ops import factor_step as _factor_step
from pysteep._ops import mirror_step as _mirror_step
from pysteep._ops import steepest_step as _steepest_step
from pysteep._ops.calls import Call, rounding_on
from pysteep._state import depth
from pysteep.kernels.reference import factor_step, mirror_step, steepest_step
from pysteep.kernels.rounding import NEAREST, Rounding

DEVICE = torch.device("cuda", 0)
ON_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}


class OnGpu(Tensor):
    """A tensor on `device` by its own account; its elements are those of `.elements`."""

    elements: Tensor

    @staticmethod
    def __new__(cls, elements: Tensor, device: torch.device = DEVICE) -> OnGpu:
        return Tensor._make_wrapper_subclass(
            cls, elements.shape, strides=elements.stride(), dtype=elements.dtype, device=device, requires_grad=False
        )

    def __init__(self, elements: Tensor, device: torch.device = DEVICE) -> None:  # noqa: ARG002
        self.elements = elements

    def data_ptr(self) -> int:
        return self.elements.data_ptr()

    def __repr__(self) -> str:
        return f"OnGpu({self.elements})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[1:] == (DEVICE,):  # which would look for a driver
            return args[0]
        if func is Tensor.data_ptr:
            return args[0].data_ptr()
        if func is Tensor.copy_:
            return cls.__torch_dispatch__(torch.ops.aten.copy_.default, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ON_HOST:
            raise AssertionError(f"the host waits for the GPU: {func}")
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        given, named = tree_map_only(OnGpu, lambda tensor: tensor.elements, (args, kwargs))
        result = func(*given, **named)
        Graph.note(lambda: func(*given, **named), [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        owners = {id(leaf.elements): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGpu)}
        return tree_map_only(Tensor, lambda tensor: owners[id(tensor)] if id(tensor) in owners else OnGpu(tensor), result)


class NewTensors(TorchFunctionMode):
    """What torch.full and the like make on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        on_gpu = isinstance(device, torch.device) and device.type == "cuda"
        if not on_gpu or any(isinstance(leaf, OnGpu) for leaf in tree_leaves(args)):
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        Graph.note(lambda: func(*args, **kwargs), [result])
        return OnGpu(result, device)


class Graph:
    """What was done to tensors of `OnGpu` while it was captured, to be done again."""

    captured: Graph | None = None

    def __init__(self) -> None:
        self.nodes: list[tuple[Callable[[], Any], list[Tensor]]] = []

    @staticmethod
    def note(node: Callable[[], Any], results: list[Tensor]) -> None:
        if Graph.captured is not None:
            Graph.captured.nodes.append((node, results))

    @contextmanager
    def capture(self) -> Iterator[None]:
        Graph.captured = self
        try:
            yield
        finally:
            Graph.captured = None

    def replay(self) -> None:
        for node, results in self.nodes:
            new = [leaf for leaf in tree_leaves(node()) if isinstance(leaf, Tensor)]
            for tensor, value in zip(results, new, strict=True):
                if tensor is not value:
                    tensor.copy_(value)


def elements(value: Any) -> Any:
    return tree_map_only(OnGpu, lambda tensor: tensor.elements, value)


def _home(op: str) -> SimpleNamespace:
    """The reference, which reads its numbers when it runs."""
    module = {"steepest_step": steepest_step, "factor_step": factor_step, "mirror_step": mirror_step}[op]

    def run(name: str, *operands: Any, **options: Any) -> None:
        operands, options = elements((operands, options))
        node = lambda: getattr(module, name)(*operands, **options)  # noqa: E731
        node()
        Graph.note(node, [])

    def power_sum(*operands: Any, **options: Any) -> Tensor:
        operands, options = elements((operands, options))
        total = steepest_step.steepest_power_sum(*operands, **options)
        Graph.note(lambda: steepest_step.steepest_power_sum(*operands, **options), [total])
        return OnGpu(total)

    return SimpleNamespace(**{op: lambda *a, **k: run(op, *a, **k)}, steepest_power_sum=power_sum)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """Moves a tensor to the GPU that is none; parameters stay parameters."""

    def calls(
        op: str,
        roles: Any,
        _backend: Any,
        arrange: Any = tuple,
        _numbers: Any = None,
        rounding: Rounding = NEAREST,
        compensations: int = 0,
        _beside: Any = (),
    ) -> list[Call]:
        tensors = [list(role.tensors) for role in roles]
        end = len(tensors) - compensations
        of_call = rounding_on(rounding, DEVICE)._replace(compensations=tensors[end:])
        return [Call(DEVICE, _home(op), arrange(tensors[:end]), range(len(tensors[0])), of_call)]

    for module in (_steepest_step, _factor_step, _mirror_step):
        monkeypatch.setattr(module, "calls", calls)
    # Made before any capture, by operations some of which ask for a driver.
    make = depth.initial_factors
    monkeypatch.setattr(depth, "initial_factors", lambda x, *how, **more: list(map(OnGpu, make(elements(x), *how, **more))))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Graph.captured is not None)

    def moved(tensor: Tensor) -> Tensor:
        there = OnGpu(tensor.detach().clone())
        return nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there

    with NewTensors():
        yield moved
