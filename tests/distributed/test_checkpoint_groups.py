"""torch.distributed.checkpoint with groups of which some have state and others none, as pysteep.param_groups makes them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from pysteep import SteepestDescent, param_groups
from tests.support.processes import Cases, folder, run_ranks
from tests.support.sharded_nets import assert_same_bits, batches, build, sharded, train, whole

CASES = Cases(__name__)

IMPLICIT = {"storage": "implicit", "init": "balanced"}
GROUPS: dict[str, list[dict[str, Any]]] = {
    "tied": [{"depth": 3}, {}],
    "full": [{"depth": 3, "storage": "full"}, {}],
    "implicit": [{"depth": 3, **IMPLICIT}, {}],
    "momentum on biases": [{}, {"betas": (0.9, 0.99)}],
    "momentum on weights": [{"depth": 3, "betas": (0.9, 0.99)}, {}],
    "none": [{}, {}],
    "all kinds": [{"depth": 3, **IMPLICIT}, {"rounding": "stochastic", "betas": (0.9, 0.99)}],
    "compensated": [{"depth": 2, "rounding": "compensated"}, {"rounding": "stochastic", "seed": 3}],
}
WAYS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "from rank 0": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    "offloaded": StateDictOptions(cpu_offload=True),
}


def made(net: nn.Module, kind: str) -> SteepestDescent:
    groups = param_groups(net, depth=2)
    for group, options in zip(groups, GROUPS[kind], strict=True):
        group |= {"depth": 1, **options}
    return SteepestDescent(groups, lr=0.02, weight_decay=0.1)


def data(dtype: torch.dtype, steps: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(dtype), y.to(dtype)) for x, y in batches(steps)]


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind in ("all kinds", "compensated") else torch.float32


def trained(kind: str, steps: int) -> tuple[nn.Module, SteepestDescent]:
    net = sharded(build(), dtype=dtype_of(kind))
    optimizer = made(net, kind)
    train(net, optimizer, data(dtype_of(kind), steps))
    return net, optimizer


@CASES.add
def every_way_carries_every_combination() -> None:
    for kind, options in itertools.product(GROUPS, WAYS.values()):
        net, optimizer = trained(kind, 3)
        model, state = get_state_dict(net, optimizer, options=options)
        state = torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)
        model = {name: value.clone() for name, value in model.items()}
        twin = sharded(build(), dtype=dtype_of(kind))
        other = made(twin, kind)
        set_state_dict(twin, other, model_state_dict=model, optim_state_dict=state, options=options)
        more = data(dtype_of(kind), 2)
        train(net, optimizer, more)
        train(twin, other, more)
        assert_same_bits(net, twin)


def save(kind: str, net: nn.Module, optimizer: SteepestDescent, *, at_once: bool) -> None:
    model, state = get_state_dict(net, optimizer)
    place = folder() / f"{kind}-{dist.get_world_size()}"
    if at_once:
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=place)
    else:
        dcp.async_save({"model": model, "optimizer": state}, checkpoint_id=place).result()


def load(kind: str, ranks: int, net: nn.Module, optimizer: SteepestDescent) -> None:
    model, state = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder() / f"{kind}-{ranks}")
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


@CASES.add
def saved() -> None:
    for i, kind in enumerate(GROUPS):
        save(kind, *trained(kind, 3), at_once=i % 2 == 0)


def loaded_by_half_as_many() -> None:
    """Of what twice as many saved; a step more, and saved again. As many steps at once are the same bits."""
    steps = {2: (3, 4), 1: (4, 5)}[dist.get_world_size()]
    for kind in GROUPS:
        net = sharded(build(), dtype=dtype_of(kind))
        optimizer = made(net, kind)
        load(kind, 2 * dist.get_world_size(), net, optimizer)
        train(net, optimizer, data(dtype_of(kind), 5)[slice(*steps)])
        whole_run, _ = trained(kind, steps[1])
        assert all(torch.equal(whole(a), whole(b)) for a, b in zip(net.parameters(), whole_run.parameters(), strict=True)), kind
        save(kind, net, optimizer, at_once=True)


@pytest.mark.slow
def test_from_four_ranks_to_two_to_one(tmp_path):
    for ranks, name in ((4, "saved"), (2, "loaded_by_half_as_many"), (1, "loaded_by_half_as_many")):
        outcome = run_ranks(__name__, [name], ranks, tmp_path)
        assert set(outcome.values()) == {"passed"}, outcome


results = CASES.fixture(ranks=2)
test_in_two_processes = pytest.mark.slow(CASES.test())
