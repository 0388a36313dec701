"""The ops without an optimiser: they update tensors that you hold.

>>> pysteep.functional.steepest_step([w], [w.grad], lr=1e-3, q=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dispatch import check_backend
from ._ops import call_op
from ._steepest_step import check_options, prepare

__all__ = ["steepest_step"]


def steepest_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    q: float = 1.0,
    betas: tuple[float, float] = (0.0, 0.0),
    weight_decay: float = 0.0,
    coupled_weight_decay: float = 0.0,
    normalize: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
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
        momenta: a buffer m for each, like `grads`; needed if and only if `betas` are not both 0.
        lr: learning rate, the length of a coordinate's step at q = 1; a tensor of one element is read on its device.
        q: from 1 (sign descent) to 2 (gradient descent).
        betas: (beta1, beta2), each in [0, 1).
        weight_decay: decoupled; multiplied by lr.
        coupled_weight_decay: added to the gradient, times the param.
        normalize: follow the normalised flow, whose speed does not depend on q.
        maximize: ascend.
        grad_scale: tensor of one element that the gradients are divided by, as of torch.amp.GradScaler.
        found_inf: tensor of one element; if it is not 0, nothing is written.
        backend: a name of `pysteep.backends()`; None chooses.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing has been written then.
        RuntimeError: `backend` cannot serve these tensors here.

    Source: Eq. 3, Eq. 5 and Algorithm 2 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026); the
    rule without momentum is known as Powerball (Yuan et al. 2019), at q = 1 as signSGD, with momentum as Signum and Lion.
    """
    check_options(lr=lr, q=q, betas=betas, weight_decay=weight_decay, coupled_weight_decay=coupled_weight_decay)
    check_backend(backend)
    weights, gradients, buffers = list(params), list(grads), list(momenta or ())
    if len(gradients) != len(weights):
        raise ValueError(f"grads must hold one entry for each of the {len(weights)} params; got {len(gradients)}")
    has_momentum = tuple(betas) != (0.0, 0.0)
    if len(buffers) != (len(weights) if has_momentum else 0):
        allowed = "one tensor a param" if has_momentum else "None or empty"
        raise ValueError(f"momenta must be {allowed} with betas {tuple(betas)!r}; got {len(buffers)} for {len(weights)} params")
    options: dict[str, Any] = {
        "lr": lr,
        "q": q,
        "betas": betas,
        "weight_decay": weight_decay,
        "coupled_weight_decay": coupled_weight_decay,
        "normalize": normalize,
        "maximize": maximize,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "backend": backend,
    }
    if torch.compiler.is_compiling():
        call_op(weights, gradients, buffers, **options)
    else:
        with torch.no_grad():
            prepare(weights, gradients, buffers, **options)()
