"""mirror_step on any tensors: checks, groups, picks the home, calls it, and lets the balances follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from ..kernels.number import Number
from ..kernels.rounding import NEAREST, Rounding
from .calls import Call, calls
from .dispatch import Choice
from .layout import Role, is_unallocated
from .options import StepOptions, step_on
from .rounding import parts
from .steepest_step import with_gradient


def check_balance(name: str, balance: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError that names the balance unless it can be that of `weight`. One on a GPU is not read."""
    if not isinstance(balance, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {balance!r}")
    if balance.numel() != 1 or balance.dtype != torch.float64 or balance.device != weight.device:
        allowed = f"a float64 tensor of one element on its param's device {weight.device}"
        raise ValueError(f"{name} must be {allowed}; got {balance.dtype}, shape {tuple(balance.shape)}, on {balance.device}")
    if isinstance(balance, FakeTensor) or is_unallocated(balance):
        raise TypeError(f"{name} must hold its own memory; got a {type(balance).__name__} that has none")
    if balance.is_cpu and not 0 <= balance.item() < torch.inf:
        raise ValueError(f"{name} must be a finite number >= 0; got {balance.item()!r}")


def prepare(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    balances: Sequence[Tensor],
    options: StepOptions,
    *,
    backend: Choice,
    rounding: Rounding = NEAREST,
    compensations: Sequence[Tensor | None] = (),
) -> Callable[[], None]:
    """The step as a function to call: every error that the tensors can give is raised here, before anything is written.

    The options are checked already. A gradient that is None leaves its weight and balance alone. The lists of `rounding` and,
    if compensated, `compensations` have an entry for each weight.
    """
    planned: list[tuple[Call, list[Tensor]]] = []
    by_device: dict[torch.device, list[Tensor]] = {}
    written: list[Tensor] = []
    for used, of_part in parts(weights, with_gradient(gradients), rounding):
        params = [weights[i] for i in used]
        seen = [gradient for gradient in (gradients[i] for i in used) if gradient is not None]
        for i, weight in zip(used, params, strict=True):
            if not isinstance(weight, Tensor):
                raise TypeError(f"param {i} must be a torch.Tensor; got {weight!r}")
            if weight.is_complex():
                raise TypeError(f"param {i} must be real; got {weight.dtype}")
            check_balance(f"balance {i}", balances[i], weight)
            by_device.setdefault(balances[i].device, []).append(balances[i])
        roles = [Role("param", params, written=True), Role("gradient", seen)]
        compensated = of_part.mode == "compensated"
        if compensated:
            buffers = [buffer for buffer in (compensations[i] for i in used) if buffer is not None]
            roles.append(Role("compensation", buffers, written=True, dtype=torch.int16))
        served = calls("mirror_step", roles, backend, tuple, used, of_part, int(compensated))
        planned += [(call, [balances[used[i]] for i in call.indices]) for call in served]
        for role in roles:
            written += role.tensors if role.written else ()

    def run() -> None:
        for call, own in planned:
            given = step_on(options, call.device)
            given = {name: value for name, value in given.items() if name not in ("betas", "coupled_weight_decay")}
            call.home.mirror_step(*call.operands, own, depth=options.depth, rounding=call.rounding, **given)
            call.finish()
        if options.weight_decay != 0:
            for device, balances_there in by_device.items():  # also those of weights of which a shard holds no elements
                given = step_on(options, device)
                _decay(balances_there, *(given[name] for name in ("lr", "q", "weight_decay", "found_inf")))
        increment_version(written)

    return run


@torch.no_grad()
def _decay(balances: list[Tensor], lr: Number, q: float, weight_decay: float, found_inf: Number) -> None:
    """balance (1 - lr weight_decay)^q, Lemma 4.5; nothing waits for the device."""
    if isinstance(lr, Tensor):
        factor: Number = (1 - lr.double() * weight_decay).abs() ** q
    else:
        factor = abs(1 - lr * weight_decay) ** q
    if isinstance(found_inf, Tensor):
        one = torch.ones_like(found_inf, dtype=torch.float64)
        factor = torch.where(found_inf != 0, one, one * factor)
    elif found_inf != 0:
        return
    torch._foreach_mul_(balances, factor)
