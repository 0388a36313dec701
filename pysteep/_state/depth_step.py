"""The step of a parameter group of depth > 1: its parameters, their factors as state that fits them, and a call of the ops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from .._ops import factor_step, mirror_step
from .._ops.dispatch import Choice
from .._ops.options import has_momentum, is_zero
from .._ops.steepest_step import with_gradient
from .depth import Depth, State, check_not_shared, interned
from .groups import named, step_options
from .memory import Memory
from .rounding import int16_of, of_group
from .sharding import gradients, local, mark, marks, shards, written_to
from .writes import Marks, Seen, are_last, note_samples, samples_changed

logger = logging.getLogger("pysteep")


States = Mapping[Tensor, State]  # an optimizer's `state`, which has an entry for whatever it is asked for


def prepare(
    memory: Memory, of_params: States, group: dict[str, Any], amp: dict[str, Any], places: Sequence[int], backend: Choice
) -> Callable[[], None]:
    """The step as a function to call, as `steepest_step.prepare`. `amp`: grad_scale, found_inf; `places` as of `of_group`."""
    depth, momentum = interned(group), has_momentum(group["betas"])
    params = group["params"]
    grads, plain, complete = gradients(params)
    if not complete:
        used = with_gradient(grads)
        params, grads, places = [params[i] for i in used], [grads[i] for i in used], [places[i] for i in used]
    states, when = _all_fitting(memory, of_params, group, params, depth, plain=plain)
    weights, grads, _ = (params, grads, []) if plain else shards(params, grads, [])
    options = step_options(group, **amp)
    others: dict[str, Any] = {"backend": backend, "rounding": of_group(group, params, places)}
    if depth.storage == "implicit":
        others["compensations"] = [int16_of(state, "compensation") for state in states] if depth.compensated else []
        run = mirror_step.prepare(weights, grads, [state["balance"] for state in states], options, **others)
    else:
        others["compensations"] = [depth.compensations(state) for state in states] if depth.compensated else []
        factors = _stored(states, depth.keys("factor"), plain=plain)
        momenta = _stored(states, depth.keys("momentum"), plain=plain) if momentum else []
        # At lr = 0 no weight may change, though the product of its factors may round otherwise.
        written = [torch.empty_like(weight) for weight in weights] if is_zero(options.lr) else weights
        run = factor_step.prepare(written, grads, factors, momenta, options, **others, complete=True)

    def step() -> None:
        run()
        written_to(params)
        now = marks(params, plain=plain)
        for seen, own in zip(when, now, strict=True):
            seen.mark, seen.witness_version = own, None
        if when and depth.storage != "implicit":
            note_samples(params, when, now)

    return step


def _stored(states: list[State], names: list[str], *, plain: bool) -> list[tuple[Tensor, ...]]:
    """The local parts of what the states hold by those names, two or more."""
    found = list(map(itemgetter(*names), states))
    return found if plain else [tuple(map(local, own)) for own in found]


def _all_fitting(
    memory: Memory, of_params: States, group: dict[str, Any], params: list[Tensor], depth: Depth, *, plain: bool
) -> tuple[list[State], list[Seen]]:
    """As `fitting`, of many, and when they last fitted. Almost always all do and have all state, which is soon told."""
    states = [of_params[param] for param in params]
    seen = [memory.seen.get(param) for param in params]
    momentum = has_momentum(group["betas"])
    needed = {*depth.keys("factor"), *(depth.keys("momentum") if momentum else ())}
    if depth.storage == "implicit":
        needed = {"balance"}
    complete = not depth.compensated
    for state in states:
        complete = complete and needed <= state.keys()
    now = marks(params, plain=plain)
    noted = are_last(seen, now, depth)
    if noted:
        _look_for_uncounted_writes(memory, group, params, states, cast(list[Seen], seen), depth, now)
    if noted and complete:
        return states, cast(list[Seen], seen)
    for param in params:
        fitting(memory, of_params, group, param, depth, momentum=momentum)
    return states, [memory.seen[param] for param in params]


def _look_for_uncounted_writes(
    memory: Memory,
    group: dict[str, Any],
    params: list[Tensor],
    states: list[State],
    seen: list[Seen],
    depth: Depth,
    now: Marks,
) -> None:
    """Make factors anew where a parameter was written to through `.data`, if a sample tells or it happened before."""
    if not memory.writes_uncounted and not samples_changed(seen, now):
        return
    repaired = [param for param, state in zip(params, states, strict=True) if depth.repair(param, state, roundings=False)]
    if repaired and not memory.writes_uncounted:
        memory.writes_uncounted = True
        logger.warning(
            "%s was written to through .data, which no version counter tells: its factors are made anew, and from now on each "
            "step compares every parameter with its factors. Write inside torch.no_grad(), or call refactor_() afterwards",
            _name_of(group, repaired[0]),
        )


def _name_of(group: dict[str, Any], param: Tensor) -> str:
    return next(name for name, own in named(group) if own is param)


def fitting(
    memory: Memory, of_params: States, group: dict[str, Any], param: Tensor, depth: Depth, *, momentum: bool = False
) -> State:
    """The state of a parameter of the group with factors of which it is the product."""
    state = of_params[param]
    seen = memory.seen.get(param)
    if not are_last([seen], [mark(param)], depth):
        name = _name_of(group, param)
        check_not_shared(name, param, depth.storage)
        if depth.is_in(state):
            depth.check_shapes(name, param, state)
    if not depth.is_in(state) or (seen is not None and not depth.is_alike(seen.depth)):
        depth.create(param, state, momentum=momentum)
        if depth.is_dead(param, state):
            logger.warning(
                "%s: most of its weights are exactly 0. init='balanced' makes factors of 0 of them, which have no gradient and "
                "never move. To train them use init='lambda' with a scale, or depth 1",
                _name_of(group, param),
            )
    else:
        widened = depth.widen(param, state)  # the parameter was narrower, as before model.float()
        if widened or seen is None or not seen.is_of(param, depth.witness(state)):
            depth.repair(param, state, roundings=widened or seen is None)  # after loading, from another storage perhaps
    if momentum:
        depth.add_momentum(param, state)
    depth.add_compensations(param, state)
    memory.seen[param] = Seen.now(param, depth)
    return state
