"""The ops without an optimiser, on tensors that you hold.

>>> pysteep.functional.steepest_step([w], [w.grad], lr=1e-3, q=1.0)
>>> x = pysteep.functional.factor_product([w_1, w_2, w_3])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._numbers import as_integer
from ._ops import factor_step as _factor_step
from ._ops import mirror_step as _mirror_step
from ._ops.dispatch import BackendName, check_backend
from ._ops.factor_product import Product, check_factors, is_traced
from ._ops.options import MAX_TIED_DEPTH, StepOptions, check_depth, check_options, has_momentum
from ._ops.registered import call_step
from ._ops.rounding import check_compensation, check_rounding, check_step
from ._ops.steepest_step import prepare, with_gradient
from .kernels.reference.rounding import SIXTEEN
from .kernels.rounding import Mode, Rounding

__all__ = ["factor_product", "factor_step", "mirror_step", "steepest_step"]


def steepest_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    q: float = 1.0,
    betas: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    weight_decay: float = 0.0,
    coupled_weight_decay: float = 0.0,
    normalize: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Mode = "nearest",
    seed: int = 0,
    step: float | Tensor = 0,
    compensations: Sequence[Tensor | None] | None = None,
    backend: BackendName | None = None,
) -> None:
    r"""One step of steepest descent in L_p, 1/p + 1/q = 1, on all of `params`, in place.

    .. math::
        g &\leftarrow \pm \nabla f(w) / \text{grad\_scale} + \text{coupled\_weight\_decay} \cdot w \\
        c &= \beta_1 m + (1 - \beta_1) g \\
        w &\leftarrow w (1 - \text{lr} \cdot \text{weight\_decay}) - \text{lr} \cdot s\, \mathrm{sign}(c) |c|^{q-1} \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    with - instead of +- if `maximize`, and s = 1, or :math:`\|c\|_q^{2-q}` over all of `params` if `normalize`. Computed in
    float32 for 16- and 32-bit tensors, in float64 for 64-bit ones. Complex numbers are pairs of real ones.

    Args:
        params: tensors of any shape, dense layout, dtype (float16, bfloat16, float32, float64, complex) and device.
        grads: a gradient for each, of its shape and device and of any such dtype; None leaves that param alone. Not written.
        momenta: a buffer m for each, like `grads`; needed where one of `betas` is not 0, or a tensor, and only there.
        lr: learning rate, the length of a coordinate's step at q = 1; a tensor of one element is read on its device.
        q: from 1 (sign descent) to 2 (gradient descent).
        betas: (beta1, beta2), each in [0, 1); a floating-point tensor of one element is read on its device.
        weight_decay: decoupled; multiplied by lr.
        coupled_weight_decay: added to the gradient, times the param.
        normalize: follow the normalised flow, whose speed does not depend on q.
        maximize: ascend.
        grad_scale: tensor of one element that the gradients are divided by, as of torch.amp.GradScaler.
        found_inf: tensor of one element; if it is not 0, nothing is written.
        rounding: of params of 16 bits; wider ones are stored as computed. "nearest". "stochastic": up or down, with chances
            that leave the expected value as it is, drawn from `seed`, `step`, the param's place in `params` and the element's
            place in memory alone. "compensated": to the nearest, and the 16 bits that follow are kept in `compensations` and
            taken up again: a bfloat16 param with its compensation has the bits of a float32 one.
        seed: from 0 to 2^64 - 1, of the random numbers.
        step: how many steps came before; also a floating-point tensor of one element, read on its device.
        compensations: for each param of 16 bits an int16 tensor of its shape, at first 0; None for others. Needed if and only
            if `rounding` is "compensated"; written.
        backend: a name of `pysteep.backends()`; None chooses.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been written then.
        RuntimeError: `backend` cannot serve these tensors here.

    Source: Eq. 3, Eq. 5 and Algorithm 2 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026); the
    rule without momentum is known as Powerball (Yuan et al. 2019), at q = 1 as signSGD, with momentum as Signum and Lion.
    """
    options = StepOptions(
        lr, q, betas, weight_decay, coupled_weight_decay, normalize, maximize, grad_scale=grad_scale, found_inf=found_inf
    )
    check_options(options)
    check_backend(backend)
    weights, gradients = _listed("params", params), _listed("grads", grads)
    buffers = _listed("momenta", momenta)
    _check_one_each("grads", gradients, weights)
    momentum = has_momentum(betas)
    if len(buffers) != (len(weights) if momentum else 0):
        allowed = "one tensor a param" if momentum else "None or empty"
        raise ValueError(f"momenta must be {allowed} with betas {tuple(betas)!r}; got {len(buffers)} for {len(weights)} params")
    of_rounding = _checked_compensations(rounding, compensations, weights)
    how: dict[str, Any] = {"rounding": _rounding(rounding, seed, step, len(weights)), "backend": backend}
    if torch.compiler.is_compiling():
        (streams,) = _used(gradients, how["rounding"].streams)
        call_step(
            "steepest_step",
            *_used(gradients, weights, gradients, buffers, of_rounding),
            options=options,
            **how,
            streams=streams,
        )
    else:
        with torch.no_grad():
            prepare(weights, gradients, buffers, options, **how, compensations=of_rounding)()


def factor_product(factors: Sequence[Tensor], *, backend: BackendName | None = None) -> Tensor:
    r"""The elementwise product of up to 64 factors, differentiable twice: a weight x = w_1 * ... * w_L.

    .. math::
        x = w_1 \odot \dots \odot w_L, \qquad
        \frac{\partial f}{\partial w_i} = \frac{\partial f}{\partial x} \prod_{j \ne i} w_j

    by products from the front and from the back, never by division: a factor of 0 is exact. One pass over memory each way, and
    only the factors are kept for the derivatives. Computed in float32 for 16- and 32-bit tensors, in float64 for 64-bit ones;
    every result is rounded once. Works under torch.compile and torch.func (grad, jvp, vmap).

    Args:
        factors: 1 to 64 tensors of one shape, device and dtype (float16, bfloat16, float32 or float64), of any strided layout.
            Those laid out unlike the first are copied first.
        backend: a name of `pysteep.backends()`; None chooses.

    Returns:
        x, of the shape and dtype of the factors, in the memory format of the first (as `torch.empty_like` of it).

    Raises:
        ValueError: `factors` is empty or longer than 64, or shapes or devices differ; `backend` is not a backend's name.
        TypeError: a factor is not a tensor, is sparse, complex or of integer dtype, has no memory of its own, or dtypes differ.
        RuntimeError: `backend` cannot serve these tensors here; a third derivative was asked for.

    Source: Section 4 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    tensors = check_factors(factors)
    if torch.compiler.is_compiling() or is_traced(tensors):
        result: Tensor = torch.ops.pysteep.factor_product(tensors, backend)
    else:
        check_backend(backend)
        result = Product.apply(backend, *tensors)
    return result


def factor_step(
    params: Iterable[Tensor],
    grads: Iterable[Tensor | None],
    factors: Iterable[Sequence[Tensor]],
    momenta: Iterable[Sequence[Tensor]] | None = None,
    *,
    depth: int,
    lr: float | Tensor,
    q: float = 1.0,
    betas: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
    weight_decay: float = 0.0,
    coupled_weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Mode = "nearest",
    seed: int = 0,
    step: float | Tensor = 0,
    compensations: Sequence[Sequence[Tensor | None]] | None = None,
    backend: BackendName | None = None,
) -> None:
    r"""One step of steepest descent on the factors of x = w_1 * ... * w_L, for all of `params`, given the gradients of x.

    .. math::
        g_i = \pm \frac{1}{\text{grad\_scale}} \frac{\partial f}{\partial x} \prod_{j \ne i} w_j, \qquad
        w_i, m_i \leftarrow \text{steepest\_step}(w_i, g_i, m_i), \qquad x \leftarrow w_1 \odot \dots \odot w_L

    all g_i at the old factors. One pass over memory, in which no factor gradient is ever stored. Computed in float32 for 16-
    and 32-bit params, in float64 for 64-bit ones; x is the product of the factors as they are stored.

    Args:
        params: the products x, of any shape, dense layout, real floating dtype and device; written, not read.
        grads: the gradient of each x, of its shape and device; None leaves that param and its factors alone. Not written.
        factors: for each param the tensors w_1, ..., w_L, or w_1 and w_2 alone: "tied", where w_2 = ... = w_L, which equal
            gradients keep equal. Of the param's shape and device, written.
        momenta: for each param a buffer for each of its stored factors; needed as by `steepest_step`.
        depth: L; from 1 to 64 with all factors stored, 2 to 2^31 - 1 if they are tied.
        lr, q, betas, weight_decay, coupled_weight_decay: as of `steepest_step`, for each factor.
        maximize, grad_scale, found_inf, backend: as of `steepest_step`.
        rounding, seed, step: as of `steepest_step`, for factors of 16 bits; the product is rounded to the nearest.
        compensations: for each param one for each of its stored factors, as of `steepest_step`.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been written then.
        RuntimeError: `backend` cannot serve these tensors here.

    Source: Eq. 5 and Section 4 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    options = StepOptions(
        lr, q, betas, weight_decay, coupled_weight_decay, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf
    )
    check_options(options)
    check_backend(backend)
    weights, gradients = _listed("params", params), _listed("grads", grads)
    stored, buffers = _listed_for_each("factors", factors), _listed_for_each("momenta", momenta)
    _check_one_each("grads", gradients, weights)
    _check_one_each("factors", stored, weights)
    momentum = has_momentum(betas)
    if len(buffers) != (len(weights) if momentum else 0):
        allowed = "one sequence a param" if momentum else "None or empty"
        raise ValueError(f"momenta must be {allowed} with betas {tuple(betas)!r}; got {len(buffers)} for {len(weights)} params")
    for i, own in enumerate(stored):
        whole = as_integer(depth)
        tied = whole is not None and len(own) < whole
        depth = check_depth(depth, *((2, MAX_TIED_DEPTH) if tied else ()))
        _factor_step.check_stored(f"factors of param {i}", len(own), depth)
        if len(own) != len(stored[0]):
            raise ValueError(
                f"factors must be as many for each param; got {len(stored[0])} for param 0, {len(own)} for param {i}"
            )
        if momentum and len(buffers[i]) != len(own):
            raise ValueError(f"momenta of param {i} must be one for each of its {len(own)} factors; got {len(buffers[i])}")
        if isinstance(weights[i], Tensor) and weights[i].is_complex():
            raise TypeError(f"param {i} must be real; got {weights[i].dtype}")
    of_rounding = _listed_for_each("compensations", compensations)
    _check_compensations(rounding, of_rounding, weights)
    for i, own in enumerate(of_rounding):
        _check_one_each(f"compensations of param {i}", own, stored[i])
        for compensation, factor in zip(own, stored[i], strict=True):
            check_compensation(f"compensations of param {i}", compensation, factor.dtype in SIXTEEN)
    options = options._replace(depth=depth)
    how: dict[str, Any] = {"rounding": _rounding(rounding, seed, step, len(weights)), "backend": backend}
    if torch.compiler.is_compiling():
        of_each = (zip(*own, strict=True) for own in (stored, buffers, of_rounding))
        flat = [[tensor for role in _used(gradients, *roles) for tensor in role] for roles in of_each]
        streams = _used(gradients, how["rounding"].streams)[0]
        call_step("factor_step", *_used(gradients, weights, gradients), *flat, options=options, **how, streams=streams)
    else:
        with torch.no_grad():
            _factor_step.prepare(weights, gradients, stored, buffers, options, **how, compensations=of_rounding)()


def mirror_step(
    params: Iterable[Tensor],
    grads: Iterable[Tensor | None],
    balances: Iterable[Tensor],
    *,
    depth: int,
    lr: float | Tensor,
    q: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: Mode = "nearest",
    seed: int = 0,
    step: float | Tensor = 0,
    compensations: Sequence[Tensor | None] | None = None,
    backend: BackendName | None = None,
) -> None:
    r"""One step of the steepest mirror flow of x = w_1 * ... * w_L, without the factors: from x and one number a param.

    Factors of which :math:`|w_j|^q - |w_1|^q = \lambda` for all j >= 2 and all coordinates follow from x:

    .. math::
        z (z + \lambda)^{L-1} = |x|^q, \quad |w_1| = z^{1/q}, \quad w_2 = \dots = w_L = (z + \lambda)^{1/q}

    The step rebuilds them, moves each as `factor_step` does, forms x again and lets the balance follow:
    :math:`\lambda \leftarrow \lambda (1 - \text{lr} \cdot \text{weight\_decay})^q`. So it has the flow of the factors to first
    order in lr, at the memory of plain SGD. x stays as it is, bit for bit, where its gradient is 0 and there is no decay.

    Args:
        params: the products x, of any shape, dense layout, real floating dtype and device; updated in place.
        grads: the gradient of each x, of its shape and device; None leaves that param and its balance alone. Not written.
        balances: for each param a float64 tensor of one element on its device: lambda >= 0; updated in place.
        depth: L, from 2 to 64.
        lr, q, weight_decay: as of `steepest_step`, for each factor. Coupled decay would move the balance of each coordinate
            otherwise, so there is none.
        maximize, grad_scale, found_inf, rounding, seed, step, compensations, backend: as of `steepest_step`.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been written then. Balances on a GPU are not looked at.
        RuntimeError: `backend` cannot serve these tensors here.

    Source: Definition 4.6, Theorem 4.8 and Lemma 4.5 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow"
    (ICLR 2026).
    """
    options = StepOptions(
        lr, q, weight_decay=weight_decay, maximize=maximize, depth=depth, grad_scale=grad_scale, found_inf=found_inf
    )
    check_options(options)
    check_backend(backend)
    options = options._replace(depth=check_depth(depth, 2))
    weights, gradients = _listed("params", params), _listed("grads", grads)
    numbers = _listed("balances", balances)
    _check_one_each("grads", gradients, weights)
    _check_one_each("balances", numbers, weights)
    how: dict[str, Any] = {"rounding": _rounding(rounding, seed, step, len(weights)), "backend": backend}
    buffers = _checked_compensations(rounding, compensations, weights)
    if torch.compiler.is_compiling():
        (streams,) = _used(gradients, how["rounding"].streams)
        call_step(
            "mirror_step", *_used(gradients, weights, gradients, numbers, buffers), options=options, **how, streams=streams
        )
    else:
        with torch.no_grad():
            _mirror_step.prepare(weights, gradients, numbers, options, **how, compensations=buffers)()


def _used(gradients: Sequence[Tensor | None], *roles: Sequence[Any]) -> list[list[Any]]:
    """What each role, unless it is empty, has beside a gradient."""
    used = with_gradient(gradients)
    return [[role[i] for i in used] if role else [] for role in roles]


def _listed(name: str, values: Iterable[Any] | None) -> list[Any]:
    """The values; none of None. Raises TypeError for one tensor, whose rows it would be."""
    if isinstance(values, Tensor):
        raise TypeError(f"{name} must be a sequence of tensors; got one torch.Tensor")
    return [] if values is None else list(values)


def _listed_for_each(name: str, values: Iterable[Iterable[Any]] | None) -> list[list[Any]]:
    """The same, with a sequence for each param."""
    if isinstance(values, Tensor):
        raise TypeError(f"{name} must hold a sequence of tensors for each param; got one torch.Tensor")
    return [_listed(f"{name} of param {i}", own) for i, own in enumerate(values or ())]


def _check_one_each(name: str, values: Sequence[object], weights: Sequence[Tensor]) -> None:
    if len(values) != len(weights):
        raise ValueError(f"{name} must hold one entry for each of the {len(weights)} params; got {len(values)}")


def _rounding(rounding: str, seed: int, step: float | Tensor, count: int) -> Rounding:
    seed = check_rounding(rounding, seed)
    check_step(step)
    return Rounding(rounding, seed, step, range(count), [0] * count)


def _checked_compensations(
    rounding: str, compensations: Sequence[Tensor | None] | None, weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    buffers = _listed("compensations", compensations)
    _check_compensations(rounding, buffers, weights)
    for i, (buffer, weight) in enumerate(zip(buffers, weights, strict=False)):
        check_compensation(f"compensations[{i}]", buffer, weight.dtype in SIXTEEN)
    return buffers


def _check_compensations(rounding: str, compensations: Sequence[object], weights: Sequence[Tensor]) -> None:
    if rounding != "compensated" and compensations:
        raise ValueError(f"compensations must be None with rounding {rounding!r}; got {len(compensations)}")
    if rounding == "compensated":
        _check_one_each("compensations", compensations, weights)
