"""Which backend serves which device, and why. Every backend is one home of the same ops.

A backend is found by, in this order: the `backend` argument, the environment variable PYSTEEP_BACKEND, and the first in
`BACKENDS` that is available and serves the device. One that is asked for by name and cannot serve raises. Before a backend
first serves an op it must pass that op's check (`self_check`); one that fails is not available from then on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

logger = logging.getLogger("pysteep")

try:
    extension: Any = importlib.import_module("pysteep._csrc")
    _extension_error = ""
except ImportError as error:  # built without a compiler
    extension, _extension_error = None, str(error)


BackendName = Literal["cuda", "triton", "cpp", "numba", "reference"]


@dataclass(frozen=True)
class Backend:
    """One home of the ops.

    Attributes:
        name: "cuda", "triton", "cpp", "numba" or "reference".
        devices: device types that it serves, as in `torch.device.type`; empty means any.
        available: whether it can run here and now, and has failed none of the checks of itself that were made so far.
        reason: what makes it available, what it lacks, or what its check found.
    """

    name: str
    devices: tuple[str, ...]
    available: bool
    reason: str

    def serves(self, device: torch.device) -> bool:
        """Whether it is available and runs on `device`."""
        return self.available and (not self.devices or device.type in self.devices)

    def home(self, op: str) -> ModuleType:
        """The module that holds `op` and what belongs to it."""
        return _home(self.name, op)


@functools.cache
def _home(name: str, op: str) -> ModuleType:
    return importlib.import_module(f"pysteep._ops.native.{op}" if name in ("cuda", "cpp") else f"pysteep.kernels.{name}.{op}")


def _cuda() -> tuple[bool, str]:
    if extension is None:
        return False, f"extension not built: {_extension_error}"
    architectures = extension.cuda_architectures()
    if not architectures:
        return False, "extension built without CUDA"
    if torch.version.hip or not torch.cuda.is_available():
        return False, "built, but torch sees no NVIDIA GPU"
    return True, f"built for {', '.join(architectures)}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton() -> tuple[bool, str]:
    missing = _import_error("triton")
    if missing:
        return False, missing
    if _interpreted():
        return True, "interpreted on the CPU (TRITON_INTERPRET)"
    if torch.cuda.is_available() or torch.xpu.is_available():
        return True, "compiles when first used"
    return False, "installed, but torch sees no GPU"


def _cpp() -> tuple[bool, str]:
    if extension is None:
        return False, f"extension not built: {_extension_error}"
    return True, f"serving from the {extension.isa()} build"


def _numba() -> tuple[bool, str]:
    missing = _import_error("numba")
    return (False, missing) if missing else (True, "compiles when first used")


def _import_error(module: str) -> str:
    """Why `module` cannot be imported; empty if it can."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes
        return f"{module} does not import: {error}"
    return ""


_PROBES: dict[str, tuple[tuple[str, ...], Callable[[], tuple[bool, str]]]] = {
    "cuda": (("cuda",), _cuda),
    "triton": (("cuda", "xpu"), _triton),
    "cpp": (("cpu",), _cpp),
    "numba": (("cpu",), _numba),
    "reference": ((), lambda: (True, "plain torch, any device")),
}
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""Names of all backends, the preferred ones first."""


_failures: dict[str, str] = {}  # by backend: what its check of itself found


@functools.cache
def _backend(name: str) -> Backend:
    devices, probe = _PROBES[name]
    if name == "triton" and _interpreted():
        devices = ("cpu",)
    if name in _failures:
        return Backend(name, devices, False, _failures[name])
    return Backend(name, devices, *probe())


def backends() -> dict[str, Backend]:
    """Every backend by name, available or not, with the reason.

    >>> {name: backend.available for name, backend in pysteep.backends().items()}
    {'cuda': False, 'triton': False, 'cpp': True, 'numba': True, 'reference': True}
    """
    return {name: _backend(name) for name in BACKENDS}


def check_backend(name: str | None, *, argument: str = "backend") -> None:
    """Raise ValueError unless `name` is None or a backend's, and RuntimeError unless it is available."""
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, or None; got {name!r}")
    if not _backend(name).available:
        raise RuntimeError(f"{argument} {name!r} cannot serve here: {_backend(name).reason}")


Choice = str | Backend | None  # a backend's name, one that was chosen already, or the best one
_chosen: dict[tuple[Choice, str, str, str], Backend] = {}
_passed: set[tuple[str, str, str]] = set()  # backend, device type, family of ops: checks that were passed


def choose(backend: Choice, device: torch.device, op: str, mode: str = "nearest") -> Backend:
    """The backend that serves `op` on tensors on `device`, their weights rounded by `mode`, and has passed the check of it."""
    asked = (backend, device.type, op, mode)
    return _chosen.get(asked) or _choose(*asked, device)


def _choose(backend: Choice, device_type: str, op: str, mode: str, device: torch.device) -> Backend:
    if isinstance(backend, Backend):
        return backend
    found = _first(backend, device_type)
    if found.name != "reference":
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a graph would repeat the check
            return found
        check = importlib.import_module("pysteep._ops.self_check").failure
        for family in (op,) if mode == "nearest" else (op, mode):
            if (found.name, device_type, family) in _passed:
                continue
            failure = check(found, _backend("reference"), device, family)
            if failure:
                _failures[found.name] = failure
                forget_choices()
                return _choose(backend, device_type, op, mode, device)
            _passed.add((found.name, device_type, family))
    _chosen[backend, device_type, op, mode] = found
    return found


def forget_choices() -> None:
    """Have every backend looked at anew; what failed its check stays so."""
    for cached in (_backend, _first):
        cached.cache_clear()
    _chosen.clear()


@functools.cache
def _first(name: str | None, device_type: str) -> Backend:
    """The one that serves tensors on `device_type`: `name`, else PYSTEEP_BACKEND, else the best one available."""
    device = torch.device(device_type)
    requested, argument = (name, "backend") if name else (os.environ.get("PYSTEEP_BACKEND") or None, "PYSTEEP_BACKEND")
    if requested:
        check_backend(requested, argument=argument)
        backend = _backend(requested)
        if not backend.serves(device):
            raise RuntimeError(f"{argument} {requested!r} serves {', '.join(backend.devices)} tensors, not {device_type} ones")
        return backend
    passed: list[str] = []
    for candidate in BACKENDS:
        devices = _PROBES[candidate][0]
        if devices and device_type not in devices:
            continue
        backend = _backend(candidate)
        if backend.serves(device):
            level = logging.WARNING if passed else logging.INFO
            logger.log(level, "%s tensors are served by %s%s", device_type, candidate, "".join(passed))
            return backend
        passed.append(f"; not by {candidate}: {backend.reason}")
    raise RuntimeError(f"no backend serves {device_type} tensors")


def serving(device: torch.device | str, backend: BackendName | None = None) -> str:
    """The name of the backend that serves tensors on `device`, given the `backend` argument of an op or optimizer.

    It has passed the check of its step; the checks of other ops are made when they are first used.

    Raises:
        TypeError, ValueError: `device` is no device or its name, or `backend` not a backend's name.
        RuntimeError: `backend`, or what PYSTEEP_BACKEND names, cannot serve that device here.
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device must be a torch.device or its name, not {device!r}")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch.device or its name, like 'cpu' or 'cuda:1', not {device!r}") from error
    if where.type == "cuda" and where.index is None and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())
    return choose(backend, where, "steepest_step").name
