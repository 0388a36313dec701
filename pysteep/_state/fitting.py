"""Parameters whose state fits them: made, widened and repaired as needed, before a step of their group is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, cast

from torch import Tensor

from .._ops.options import has_momentum
from .depth import Depth, State, dtype_of_state, holds, momentum_of
from .depth_checks import check_not_shared
from .groups import named
from .memory import Memory
from .sharding import mark, marks
from .writes import Marks, Snapshot, are_last, samples_changed

logger = logging.getLogger("pysteep")

States = Mapping[Tensor, State]  # an optimizer's `state`, which has an entry for whatever it is asked for


def momenta_of_weights(memory: Memory, params: list[Tensor], states: list[State], depth: Depth) -> list[Tensor]:
    """The momenta of parameters of depth 1, made or widened as needed."""
    try:
        momenta = list(map(itemgetter("momentum"), states))
    except KeyError:
        return [momentum_of(param, state, depth.state_dtype) for param, state in zip(params, states, strict=True)]
    # model.float() changes all dtypes at once, so the first tells; another one each time, as asking all takes long.
    looked_at = {0, memory.steps % len(params)} if params else ()
    if all(holds(momenta[i].dtype, dtype_of_state(params[i], depth.state_dtype)) for i in looked_at):
        return momenta
    return [momentum_of(param, state, depth.state_dtype) for param, state in zip(params, states, strict=True)]


def fit_products(
    memory: Memory,
    of_params: States,
    group: dict[str, Any],
    params: list[Tensor],
    states: list[State],
    depth: Depth,
    *,
    plain: bool,
) -> list[Snapshot]:
    """As `fitting`, of many of depth > 1, and when they last fitted. Almost always all do and have all state: soon told."""
    seen = [memory.snapshots.get(param) for param in params]
    momentum = has_momentum(group["betas"])
    needed = {*depth.keys("factor"), *(depth.keys("momentum") if momentum else ())}
    if depth.storage == "implicit":
        needed = {"balance"}
    complete = not depth.compensated
    for state in states:
        complete = complete and needed <= state.keys()
    now = marks(params, plain=plain)
    noted, same = are_last(seen, now, depth)
    if noted:
        _look_for_uncounted_writes(memory, group, params, states, cast(list[Snapshot], seen), depth, now)
    if same and complete:
        return cast(list[Snapshot], seen)
    for param in params:
        fitting(memory, of_params, group, param, depth, momentum=momentum)
    return [memory.snapshots[param] for param in params]


def _look_for_uncounted_writes(
    memory: Memory,
    group: dict[str, Any],
    params: list[Tensor],
    states: list[State],
    seen: list[Snapshot],
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
    seen = memory.snapshots.get(param)
    if not are_last([seen], [mark(param)], depth)[1]:
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
    memory.note(param, depth)
    return state
