"""Another default device, for the package alone: what it makes without a device shows in any test."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import pysteep

FOLDERS = tuple(Path(folder).resolve() for folder in (Path(pysteep.__file__).parent, *pysteep.kernels.__path__))


class MetaByDefault(TorchFunctionMode):
    """As torch.set_default_device("meta"), but only for calls in the package's own files."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        makes = function in _device_constructors() and kwargs.get("device") is None
        if makes and _is_ours(sys._getframe(1).f_code.co_filename):
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


@functools.cache
def _is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in FOLDERS)
