"""A machine with a GPU, pretended: what is asked of "cuda" is done by the CPU, in every process with this folder on its path.

The home "cuda" is the C++ one, "triton" the reference. So the commands of `make gpu-check` run from end to end, and their
figures mean nothing. PRETENDED_TROUBLE is "wrong", for a GPU that computes garbage, or "slow", for one that never ends.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any


def pretend() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def on_cpu(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(map(names_gpu, value)):
            return type(value)(map(on_cpu, value))
        return "cpu" if names_gpu(value) else value

    def names_gpu(value: Any) -> bool:
        return isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.cuda or (
                func is torch.Tensor.to and any(map(names_gpu, (*args[1:], *(kwargs or {}).values())))
            ):
                args, kwargs = (args[0].clone(), *args[1:]), kwargs or {}  # what moves there is a copy
                func = torch.Tensor.to if args[1:] or kwargs else torch.clone
            return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})

    class Event:
        def __init__(self, **_: Any) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    real_generator = torch.Generator

    class Anyone(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, real_generator)

    class Generator(metaclass=Anyone):
        def __new__(cls, device: Any = "cpu") -> Any:
            return real_generator(on_cpu(device))

    def nothing(*_: Any, **__: Any) -> None: ...

    properties = SimpleNamespace(L2_cache_size=1 << 14, multi_processor_count=132, total_memory=80 << 30)
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "Pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (1 << 30, 80 << 30),
        "is_current_stream_capturing": lambda: False,
        "synchronize": nothing,
        "empty_cache": nothing,
        "Event": Event,
    }.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = nothing
    torch.Generator = Generator  # type: ignore[assignment, misc]
    OnCpu().__enter__()  # for as long as the process lives


def serve() -> None:
    """The package's homes of a GPU, on CPU tensors."""
    from importlib import import_module

    from pysteep._ops import dispatch

    trouble, right = os.environ.get("PRETENDED_TROUBLE"), dispatch._home

    def home(name: str, op: str) -> Any:
        if trouble == "slow":
            time.sleep(1000)
        return import_module(f"pysteep.kernels.reference.{op}") if name == "triton" else right(name, op)

    dispatch._home = home  # type: ignore[assignment]
    for name in ("cuda", "triton"):
        dispatch._PROBES[name] = (("cpu",), lambda: (True, "pretended"))
        if trouble == "wrong":
            dispatch._failures[name] = "its check of itself found garbage, as pretended"
    dispatch.forget_choices()


def hurry() -> None:
    """No figure means anything here, so none fails its piece, and few calls are enough."""
    from bench.gpu import gpu_flow, gpu_timing
    from bench.measure import launches, reporting

    def one_kernel(step: Any) -> int:
        step()
        return 1

    launches._kernels = one_kernel  # the profiler wants a driver
    reporting.Bar.met = property(lambda _: True)  # type: ignore[assignment]
    gpu_timing.host_medians.__defaults__ = (2, None)  # calls, before
    gpu_flow.CHECKED, gpu_flow.ROUNDS = 20, 1


of_the_check = any(word.endswith("gpu_check.py") for word in sys.orig_argv)
of_a_worker = any("exec(eval(sys.stdin.readline()))" in word for word in sys.orig_argv)  # xdist's
if of_the_check or of_a_worker or {"pytest", "bench.gpu.gpu_bars", "bench.gpu.gpu_counters"} & {*sys.orig_argv}:
    pretend()
    if not of_the_check:
        serve()
    if "bench.gpu.gpu_bars" in sys.orig_argv and not os.environ.get("PRETENDED_TROUBLE"):
        hurry()
