"""What the conformance tests share: data with every special value, layouts, the float64 definition, backends to test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pysteep import functional
from pysteep._ops import calls
from pysteep._ops import options as _options
from pysteep._ops import steepest_step as _steepest_step
from pysteep._ops.dispatch import backends, extension
from pysteep.kernels.reference import steepest_step as reference
from pysteep.kernels.reference.signed_power import signed_power
from tests.support.tolerances import EPS, POWER_ULPS, STEP_ROUNDINGS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXACT_QS = (1.0, 1.5, 2.0)
GENERAL_QS = (1.25, 1.7)
QS = EXACT_QS + GENERAL_QS

SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0]

Step = Callable[..., None]

BACKENDS = [name for name in ("cpp", "numba", "reference") if backends()[name].available]
"""Backends that serve CPU tensors here, but for interpreters."""


def special_values(dtype: torch.dtype) -> Tensor:
    """0, -0, infinities, NaN, ones, the largest and smallest normal numbers and some subnormals of both signs."""
    info = torch.finfo(dtype)
    sizes = [info.max, info.tiny, info.smallest_normal / 2, info.smallest_normal / 64]
    return torch.tensor(SPECIAL + sizes + [-size for size in sizes], dtype=torch.float64).to(dtype)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, *, wide: bool = False, special: bool = False) -> Tensor:
    """Normal numbers; `wide` spreads their magnitude over many powers of two, `special` scatters special values."""
    values = torch.randn(shape, dtype=torch.float64)
    if wide:
        values *= torch.exp2(torch.randint(-12, 4, shape).double())
    values = values.to(dtype)
    if special and values.numel():
        chosen = special_values(dtype)
        flat = values.view(-1)
        at = torch.randint(0, flat.numel(), (max(flat.numel() // 8, 1),))
        flat[at] = chosen[torch.randint(0, len(chosen), at.shape)]
    return values


def options(**changes: Any) -> dict[str, Any]:
    """The options of one step, decay on."""
    return {"lr": 0.05, "q": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.3, "coupled_weight_decay": 0.1, **changes}


def float64_step(
    weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor] | None, normalize: bool, **step: Any
) -> list[Tensor]:
    """The weights after one step of the definition, in float64 on copies."""
    full = {"maximize": False, "grad_scale": 1.0, **step}
    w, g = [t.double().clone() for t in weights], [t.double() for t in gradients]
    m = None if momenta is None else [t.double().clone() for t in momenta]
    direction = {name: full[name] for name in ("betas", "coupled_weight_decay", "maximize", "grad_scale")}
    total = float(reference.steepest_power_sum(w, g, m, q=full["q"], **direction)) if w else 0.0
    scale = total ** ((2 - full["q"]) / full["q"]) if normalize else 1.0
    reference.steepest_step(w, g, m, **full, step_scale=scale, found_inf=0.0)
    return w


def float64_bounds(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor | None,
    step: dict[str, Any],
    roundings: int = STEP_ROUNDINGS,
) -> SimpleNamespace:
    """Between what the new weight must lie, from the definition in float64 and the roundings of the compute dtype.

    c is known to a few roundings of its terms, and u grows with c, so u at both ends of that interval bounds u: also where
    terms cancel or vanish and a sign may go either way.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    eps = EPS[compute] * roundings
    w, g = weight.double(), gradient.double()
    (beta1, beta2), coupled = step["betas"], step["coupled_weight_decay"]
    g, size = g + coupled * w, g.abs() + coupled * w.abs()
    c, c_size = g, size
    if momentum is not None:
        m = momentum.double()
        c, c_size = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * size
    reach = eps * c_size + torch.finfo(compute).tiny * (c_size != 0)
    ends = [signed_power(c + sign * reach, step["q"]) for sign in (1, -1)]
    kept = w * (1 - step["lr"] * step["weight_decay"])
    u_error = POWER_ULPS * 2 * EPS[compute]
    low, high = (kept - step["lr"] * (u + sign * u_error * u.abs()) for u, sign in zip(ends, (1, -1), strict=True))
    info = torch.finfo(weight.dtype)
    stored = 2 * EPS[weight.dtype] * torch.maximum(low.abs(), high.abs()) + info.smallest_normal * info.eps
    slack = eps * (kept.abs() + step["lr"] * torch.maximum(ends[0].abs(), ends[1].abs())) + stored
    bounds = SimpleNamespace(low=low - slack, high=high + slack)
    if momentum is not None:
        bounds.momentum = beta2 * m + (1 - beta2) * g
        info = torch.finfo(momentum.dtype)
        smallest = info.smallest_normal * info.eps
        bounds.momentum_error = (eps + 2 * EPS[momentum.dtype]) * (beta2 * m.abs() + (1 - beta2) * size) + smallest
    return bounds


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but any NaN equals any other."""
    views = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = views[a.element_size()]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def cpu_homes() -> list[str]:
    """Backends that serve CPU tensors here, the C++ one once for each instruction set that this machine runs."""
    names = [name for name, backend in backends().items() if backend.serves(torch.device("cpu"))]
    if "cpp" in names:
        at = names.index("cpp")
        names[at : at + 1] = [f"cpp-{isa}" for isa in extension.isas()]
        if extension.cuda_architectures():
            names.append("cuda-on-host")
    return names


@contextmanager
def home_of(home: str) -> Iterator[str]:
    """The `backend` argument by which that home of `cpu_homes()` serves, inside the context."""
    name, _, isa = home.partition("-")
    if home == "cuda-on-host":
        with gpu_code_on_host():
            yield "cpp"
        return
    before = extension.isa() if extension is not None else None
    if isa:
        extension.select_isa(isa)
    try:
        yield name
    finally:
        if isa:
            extension.select_isa(before)


@contextmanager
def gpu_code_on_host() -> Iterator[None]:
    """The CUDA kernels' bodies, run by the CPU over the whole grid, in place of the C++ ops."""
    before = {name: getattr(extension, name) for name in dir(extension) if name.endswith("_cpu")}
    try:
        for name in before:
            setattr(extension, name, getattr(extension, name.removesuffix("cpu") + "cuda_on_host"))
        yield
    finally:
        for name, op in before.items():
            setattr(extension, name, op)


@contextmanager
def numbers_by_address() -> Iterator[None]:
    """What is given in tensors stays there, as on a GPU, for the homes to read."""

    def left_there(value: Any, _device: torch.device, _name: str) -> Any:
        if not isinstance(value, Tensor):
            return float(value)
        value = value.detach().reshape(())
        return value if value.dtype in (torch.float32, torch.float64) else value.double()

    with ExitStack() as patches:
        for module in (calls, _steepest_step, _options):
            patches.enter_context(patch.object(module, "on", left_there))
        yield


@contextmanager
def serving(home: str) -> Iterator[Step]:
    """`functional.steepest_step`, served by one home of `cpu_homes()`."""
    with home_of(home) as backend:
        yield lambda *tensors, **step: functional.steepest_step(*tensors, **step, backend=backend)


LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "strided", "unaligned")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the same 4-d values in another memory layout; around a view, memory that it does not own is 7."""
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    n, c, h, w = values.shape
    if layout == "sliced":
        owner = torch.full((n, c + 2, h, w + 3), 7.0, dtype=values.dtype, device=values.device)
        view = owner[:, 1 : c + 1, :, 2 : w + 2]
    elif layout == "strided":
        owner = torch.full((n, c, 2 * h, 3 * w), 7.0, dtype=values.dtype, device=values.device)
        view = owner[:, :, ::2, 1::3]
    elif layout == "unaligned":
        owner = torch.full((values.numel() + 3,), 7.0, dtype=values.dtype, device=values.device)
        view = owner[1:-2].view(values.shape)
    else:
        return values.clone()
    return view.copy_(values)


def surroundings(view: Tensor) -> Tensor:
    """What the memory around `view` holds, with the view's own elements set to 0."""
    owner = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    copy = owner.clone()
    torch.as_strided(copy, view.shape, view.stride(), view.storage_offset()).zero_()
    return copy
