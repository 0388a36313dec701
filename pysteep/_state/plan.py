"""What one step of one group does: decided once, then run, or handed to a registered op while torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import factor_step, mirror_step, steepest_step
from .._ops.dispatch import Choice
from .._ops.options import has_momentum, is_zero
from .._ops.registered import call_step
from ..kernels.reference.rounding import SIXTEEN
from .depth import Depth, compensation_of, role_of
from .fitting import States, fit_products, momenta_of_weights
from .groups import step_options
from .memory import Memory
from .rounding import int16_of, rounding_of
from .sharding import gradient_of, gradients_of, local, marks, power_sum_over_ranks, shards, written_to
from .writes import Snapshot, note_samples


class Plan(NamedTuple):
    """An op, and what it takes of each parameter's state beside the parameter and its gradient.

    Attributes:
        depth: the options of the factors.
        op: its name.
        roles: names in the state, a tuple for each role of the op: one name, that of each factor that is stored, or none.
        compensations: names likewise, where the rounding is compensated.
    """

    depth: Depth
    op: str
    roles: tuple[tuple[str, ...], ...]
    compensations: tuple[str, ...]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Plan:
        """That of a group whose options were checked."""
        depth, momentum = Depth.of(group), has_momentum(group["betas"])
        own: tuple[str, ...] = ("compensation",) if depth.compensated else ()
        if depth.depth == 1:
            return cls(depth, "steepest_step", (("momentum",) if momentum else (),), own)
        if depth.storage == "implicit":
            return cls(depth, "mirror_step", (("balance",),), own)
        factors, momenta = depth.keys("factor"), depth.keys("momentum") if momentum else []
        own = tuple(depth.keys("compensation")) if depth.compensated else ()
        return cls(depth, "factor_step", (tuple(factors), tuple(momenta)), own)


_OPTIONS = ("depth", "storage", "init", "scale", "q", "state_dtype", "rounding")


_OPTIONS_OF_WEIGHTS = (1, "tied", "identity", None, 1.0)  # the first five, of which depth 1 has no use


def plan_of(group: Mapping[str, Any]) -> Plan:
    """`Plan.of`, of a cache."""
    momentum = has_momentum(group["betas"])
    if group["depth"] == 1:
        return _plan_of(momentum, *_OPTIONS_OF_WEIGHTS, group["state_dtype"], group["rounding"])
    return _plan_of(momentum, *map(group.__getitem__, _OPTIONS))


@lru_cache(maxsize=4096, typed=True)
def _plan_of(momentum: bool, *values: Any) -> Plan:
    return Plan.of({**dict(zip(_OPTIONS, values, strict=True)), "betas": (float(momentum), 0.0)})


# ---- run it ------------------------------------------------------------------------------------------------------------------


def prepare_step(
    memory: Memory, of_params: States, group: dict[str, Any], scaling: dict[str, Any], places: Sequence[int], backend: Choice
) -> Callable[[], None]:
    """The step of a group as a function to call; it raises what the tensors can give before anything is written.

    Args:
        memory, of_params: the optimizer's, and its `state`.
        scaling: grad_scale and found_inf.
        places: of the group's parameters, as of `rounding_of`.
    """
    depth, op, roles, compensations = plan_of(group)
    if group["coupled_weight_decay"] != 0:
        group = _without_decay_at_rest(of_params, group)
    params, kept = group["params"], depth.depth > 1 or roles != ((),) or depth.compensated
    grads, plain, complete = gradients_of(params)
    if not complete and kept:  # state is made only of what is stepped
        used, complete = steepest_step.with_gradient(grads), True
        params, grads, places = [params[i] for i in used], [grads[i] for i in used], [places[i] for i in used]
    states = [of_params[param] for param in params] if kept else []
    seen: list[Snapshot] = []
    if op == "steepest_step":
        buffers: list[Any] = [momenta_of_weights(memory, params, states, depth) if roles != ((),) else []]
    else:
        seen = fit_products(memory, of_params, group, params, states, depth, plain=plain)
        buffers = [list(map(itemgetter(*names), states)) if names else [] for names in roles]
    weights = params
    if not plain:
        weights, grads, _ = shards(params, grads, [])
        buffers = [_local(tensors) for tensors in buffers]
    options = step_options(group, **scaling)
    how: dict[str, Any] = {"backend": backend, "rounding": rounding_of(group, params, places), "compensations": []}
    if compensations:
        if op == "steepest_step":
            how["compensations"] = [compensation_of(param, state) for param, state in zip(params, states, strict=True)]
        else:
            low = [[int16_of(state, name) for name in compensations] for state in states]
            how["compensations"] = low if op == "factor_step" else [own for (own,) in low]
    if op == "steepest_step":
        if weights is not params:
            total = power_sum_over_ranks(params, weights, grads, buffers[0], options, **how) if options.normalize else None
            # Autograd looks at the versions of the DTensors, not at those of their shards.
            how |= {"total": total, "owners": params}
        return steepest_step.prepare(weights, grads, buffers[0], options, **how, complete=complete)
    if op == "mirror_step":
        run = mirror_step.prepare(weights, grads, buffers[0], options, **how)
    else:
        # At lr = 0 no weight may change, though the product of its factors may round otherwise.
        written = [torch.empty_like(weight) for weight in weights] if is_zero(options.lr) else weights
        run = factor_step.prepare(written, grads, buffers[0], buffers[1], options, **how, complete=True)

    def step() -> None:
        run()
        written_to(params)
        now = marks(params, plain=plain)
        for own, mark in zip(seen, now, strict=True):
            own.mark, own.witness_version = mark, None
        if seen and op == "factor_step":
            note_samples(params, seen, now)

    return step


def _without_decay_at_rest(of_params: States, group: dict[str, Any]) -> dict[str, Any]:
    """The group, without coupled decay in the step by which torch.distributed.checkpoint makes state: momenta stay 0.

    That is the first step, with a learning rate and gradients of 0.
    """
    if not has_momentum(group["betas"]) or not is_zero(group["lr"]):
        return group
    stepped = {param: grad for param in group["params"] if (grad := gradient_of(param)) is not None}
    begun = any(role_of(name) == "momentum" for param in stepped for name in of_params.get(param, ()))
    if begun or any(local(grad).any() for grad in stepped.values()):
        return group
    return {**group, "coupled_weight_decay": 0.0}


def _local(tensors: list[Any]) -> list[Any]:
    """The local parts of tensors, or of tuples of them."""
    return [tuple(map(local, own)) if isinstance(own, tuple) else local(own) for own in tensors]


# ---- hand it to a registered op ----------------------------------------------------------------------------------------------


def trace_step(
    of_params: States,
    group: dict[str, Any],
    places: Sequence[int],
    owner: dict[str, Any],
    scaling: dict[str, Tensor | None],
    backend: str | None,
) -> None:
    """The step of those parameters of a group that owner["used"] names, all of which have their state."""
    _, op, roles, compensations = Plan.of(group)
    params = [group["params"][i] for i in owner["used"]]
    buffers = [[of_params[param][name] for name in names for param in params] for names in roles]
    low: list[Any] = []
    if compensations:
        rounded = buffers[0] if op == "factor_step" else params
        every = [of_params[param].get(name) for name in compensations for param in params]
        low = [own for own, tensor in zip(every, rounded, strict=True) if tensor.dtype in SIXTEEN]
    rounding = rounding_of(group, params, places)
    how: dict[str, Any] = {"rounding": rounding, "streams": rounding.streams, "backend": backend, **owner}
    grads = [param.grad for param in params]
    call_step(op, params, grads, *buffers, low, options=step_options(group, **scaling), **how)
