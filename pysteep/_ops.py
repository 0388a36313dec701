"""Every op of pysteep as torch sees it: schema, fake, implementation. torch.compile and torch.export go through these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._steepest_step import prepare

_library = torch.library.Library("pysteep", "DEF")


def _steepest_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    q: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    coupled_weight_decay: float,
    normalize: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
) -> None:
    prepare(
        list(weights),
        list(gradients),
        list(momenta),
        lr=lr if lr_tensor is None else lr_tensor,
        q=q,
        betas=(beta1, beta2),
        weight_decay=weight_decay,
        coupled_weight_decay=coupled_weight_decay,
        normalize=normalize,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        backend=backend,
    )()


def _no_output(*_: object) -> None:
    """What a fake does for an op that only writes to its arguments."""


_library.define("steepest_step" + torch.library.infer_schema(_steepest_step, mutates_args=("weights", "momenta")))
_library.impl("steepest_step", _steepest_step, "CompositeExplicitAutograd")
torch.library.register_fake("pysteep::steepest_step", _no_output, lib=_library)


def call_op(
    weights: list[Tensor],
    gradients: list[Tensor | None],
    momenta: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    **options: Any,
) -> None:
    """The registered op, for code that torch.compile traces; arguments as of `prepare`."""
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    torch.ops.pysteep.steepest_step(
        [weights[i] for i in used],
        [gradients[i] for i in used],
        [momenta[i] for i in used] if momenta else [],
        lr if isinstance(lr, Tensor) else None,
        0.0 if isinstance(lr, Tensor) else lr,
        beta1=betas[0],
        beta2=betas[1],
        **options,
    )
