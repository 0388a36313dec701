"""SteepestDescent in torch.distributed.checkpoint: state that is sharded, gathered, saved, and read by others."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from pysteep import SteepestDescent
from tests.support.cases import same_bits
from tests.support.processes import Cases, folder, run_ranks
from tests.support.sharded_nets import DEPTHS, assert_same_bits, batches, build, options, sharded, train, whole

CASES = Cases(__name__)
WHOLE = StateDictOptions(full_state_dict=True)
STATEFUL = DEPTHS[1:]


def made(net: nn.Module, **changes: Any) -> SteepestDescent:
    return SteepestDescent(net.named_parameters(), **options(**changes))


def trained(net: nn.Module, steps: int = 3, **changes: Any) -> tuple[nn.Module, SteepestDescent]:
    optimizer = made(net, **changes)
    train(net, optimizer, batches(steps))
    return net, optimizer


def assert_same_state(optimizer: SteepestDescent, other: SteepestDescent) -> None:
    held, twins = ([state for state in each.state.values() if state] for each in (optimizer, other))  # torch leaves empty ones
    for state, twin in zip(held, twins, strict=True):
        assert state.keys() == twin.keys()
        assert all(same_bits(whole(state[name]), whole(twin[name])) for name in state)


def hand_over(
    net: nn.Module, optimizer: SteepestDescent, twin: nn.Module, other: SteepestDescent, given: StateDictOptions | None
) -> None:
    """The optimiser's state to that of the other net, gathered on its way; None: as the optimiser itself gives it."""
    if given is None:
        other.load_state_dict(optimizer.state_dict())
        return
    state = get_optimizer_state_dict(net, optimizer, options=WHOLE)
    set_optimizer_state_dict(twin, other, state, options=given)


def go_on(net: nn.Module, optimizer: SteepestDescent, twin: nn.Module, other: SteepestDescent) -> None:
    """Two steps more, from equal states, are equal."""
    train(net, optimizer, batches(2))
    train(twin, other, batches(2))
    assert_same_bits(net, twin)
    assert_same_state(optimizer, other)


@CASES.add
def a_state_dict_of_a_new_optimizer_changes_nothing() -> None:
    """It is made by a step with gradients and a learning rate of 0, a tensor where it was one."""
    for net in (build(), sharded(build())):
        for depth in DEPTHS:
            for lr in (0.1, torch.tensor(0.1)):
                optimizer, before = made(net, **depth, lr=lr), [whole(param).clone() for param in net.parameters()]
                factors = [[whole(w).clone() for w in made(net, **depth).factors(param)] for param in net.parameters()]
                state = get_optimizer_state_dict(net, optimizer)["state"]
                assert optimizer.param_groups[0]["lr"] is lr
                assert all(map(same_bits, before, map(whole, net.parameters())))
                for param, own in zip(net.parameters(), factors, strict=True):
                    assert all(map(same_bits, own, map(whole, optimizer.factors(param))))
                momenta = [value for held in state.values() for key, value in held.items() if key.startswith("momentum")]
                assert all(not whole(momentum).any() for momentum in momenta)
                assert bool(momenta) == ("betas" in depth)


@CASES.add
def gathered_state_is_that_of_one_process() -> None:
    for depth in DEPTHS:
        alone, together = trained(build(), **depth), trained(sharded(build()), **depth)
        expected, found = (get_optimizer_state_dict(*each, options=WHOLE) for each in (alone, together))
        assert expected["param_groups"] == found["param_groups"]
        assert expected["state"].keys() == found["state"].keys()
        for name, state in expected["state"].items():
            assert all(same_bits(state[key], found["state"][name][key]) for key in state.keys() | found["state"][name].keys())
        offloaded = get_optimizer_state_dict(*together, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert (offloaded == {}) == (dist.get_rank() > 0)


@CASES.add
def one_process_to_shards_and_back() -> None:
    """By set_optimizer_state_dict, from every rank or from rank 0, and by a plain load_state_dict of all of it."""
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for depth in DEPTHS:
        alone, ours = trained(build(), **depth)
        for given in (WHOLE, from_rank_0, None):
            together = sharded(alone)
            theirs = made(together, **depth)
            hand_over(alone, ours, together, theirs, given)
            assert_same_state(ours, theirs)
            for param in together.parameters():
                shards = [value for key, value in theirs.state[param].items() if key != "balance"]
                assert all(isinstance(shard, DTensor) and shard.placements == param.placements for shard in shards)
                assert all(shard.to_local().shape == param.to_local().shape for shard in shards)
        train(together, theirs, batches(2))
        back = build()
        set_model_state_dict(back, get_model_state_dict(together, options=WHOLE))
        again = made(back, **depth)
        hand_over(together, theirs, back, again, WHOLE)
        go_on(together, theirs, back, again)


@CASES.add
def compensations_and_counts_of_steps() -> None:
    """Of bfloat16 weights: gathered, given to one process and back to shards, training goes on with the same bits."""
    for rounding, depth in itertools.product(("stochastic", "compensated"), (DEPTHS[1], *DEPTHS[2:5])):
        given = {**depth, "rounding": rounding, "seed": 5}
        data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(3)]
        together = sharded(build(), dtype=torch.bfloat16)
        theirs = made(together, **given)
        train(together, theirs, data)
        alone = build().bfloat16()
        set_model_state_dict(alone, get_model_state_dict(together, options=WHOLE))
        ours = made(alone, **{**given, "seed": 6})
        hand_over(together, theirs, alone, ours, WHOLE)
        assert ours.param_groups[0]["seed"] == 5
        back = sharded(build(), dtype=torch.bfloat16)
        set_model_state_dict(back, get_model_state_dict(together))
        again = made(back, **given)
        again.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch shares the tensors
        for net, optimizer in ((together, theirs), (alone, ours), (back, again)):
            train(net, optimizer, data)
        assert_same_bits(together, alone)
        assert_same_bits(together, back)
        for other in (ours, again):
            for state, twin in zip(theirs.state.values(), other.state.values(), strict=True):
                assert state.keys() == twin.keys()
                assert all(torch.equal(whole(state[name]), whole(twin[name])) for name in state)
            assert other.param_groups[0].get("rounding_step") == theirs.param_groups[0].get("rounding_step")


@CASES.add
def sharded_state_dicts() -> None:
    for depth in DEPTHS:
        for given in (
            StateDictOptions(),
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(cpu_offload=True),
        ):
            together, theirs = trained(sharded(build()), **depth)
            twin = sharded(build())
            other = made(twin, **depth)
            model, state = get_state_dict(together, theirs, options=given)
            state = torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)
            set_state_dict(twin, other, model_state_dict=model, optim_state_dict=state, options=given)
            go_on(together, theirs, twin, other)


@CASES.add
def other_storages() -> None:
    """From the whole state and from shards: "tied" to "full" and back, "implicit" to both.

    At depth 3 the gradients of factors 2 and 3 are the same bits; above, their products may be rounded in other orders.
    """
    implicit = {"storage": "implicit", "init": "lambda", "scale": 0.4}
    kinds = [{"storage": storage, "init": "lambda", "scale": 0.4} for storage in ("tied", "full")]
    for betas in ((0.0, 0.0), (0.9, 0.99)):
        for source in (*kinds, implicit) if betas == (0.0, 0.0) else kinds:
            for target in kinds:
                together, theirs = trained(sharded(build()), depth=3, betas=betas, **source)
                for given in (WHOLE, None):
                    twin = sharded(together)
                    other = made(twin, depth=3, betas=betas, **target)
                    if source is implicit and given is WHOLE:
                        given = StateDictOptions()  # torch loses a number that the new state does not have
                    hand_over(together, theirs, twin, other, given)
                    for param, same in zip(together.parameters(), twin.parameters(), strict=True):
                        pairs = zip(theirs.factors(param), other.factors(same), strict=True)
                        if source is implicit:
                            assert all(torch.allclose(whole(a), whole(b), rtol=1e-5, atol=1e-6) for a, b in pairs)
                        else:
                            assert all(same_bits(whole(a), whole(b)) for a, b in pairs)
                    train(twin, other, batches(1))


@CASES.add
def a_conversion_that_is_not_exact_on_one_rank_is_refused_on_all() -> None:
    together, theirs = trained(sharded(build()), depth=3, storage="full", betas=(0.9, 0.99))
    if dist.get_rank() == 1:
        theirs.state[next(together.parameters())]["factor_3"].to_local()[0, 0] += 1
    for given in (None, WHOLE):
        twin = sharded(together)
        other = made(twin, depth=3, betas=(0.9, 0.99))
        with pytest.raises(ValueError, match="storage must be 'full'; got 'tied'"):
            hand_over(together, theirs, twin, other, given)
    other = made(twin, depth=3, storage="implicit", init="balanced")
    with pytest.raises(ValueError, match="storage must be 'full' or 'tied'; got 'implicit'"):
        hand_over(together, theirs, twin, other, None)


@CASES.add
def state_that_does_not_fit_is_refused_by_name() -> None:
    ours, theirs = (trained(net, betas=(0.9, 0.99))[1] for net in (build(), sharded(build())))
    with pytest.raises(ValueError, match=r"state_dict must hold momentum of 0.weight whole"):
        ours.load_state_dict(theirs.state_dict())
    saved = ours.state_dict()
    saved["state"][0]["momentum"] = torch.ones(13, 5)
    with pytest.raises(ValueError, match=r"momentum of 0.weight in shape \(13, 6\), its parameter being .*; got \(13, 5\)"):
        theirs.load_state_dict(saved)
    twin, other = trained(sharded(build()), depth=3, storage="full")
    flat = get_optimizer_state_dict(twin, other, options=StateDictOptions(flatten_optimizer_state_dict=True))
    twin.zero_grad()
    tied = made(twin, depth=3)
    with pytest.raises(ValueError, match=r"state_dict must hold factor_rest of 0.weight as a tensor; got a dict"):
        set_optimizer_state_dict(twin, tied, flat, options=StateDictOptions(flatten_optimizer_state_dict=True))


@CASES.add
def a_checkpoint_of_the_model_alone_makes_factors_anew() -> None:
    for storage in ("tied", "full"):
        together, theirs = trained(sharded(build()), depth=3, storage=storage)
        twin = sharded(build())
        other = made(twin, depth=3, storage=storage)
        train(twin, other, batches(1))
        set_model_state_dict(twin, get_model_state_dict(together))
        for param, same in zip(together.parameters(), twin.parameters(), strict=True):
            assert not torch.equal(whole(theirs.factors(param)[1]), torch.ones(param.shape))
            changed = whole(param) != 0
            assert torch.equal(whole(other.factors(same)[1])[changed], torch.ones(int(changed.sum())))


# ---- on disk, between one and two ranks -------------------------------------------------------------------------------


def save(name: str, net: nn.Module, optimizer: SteepestDescent) -> None:
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder() / name)


def load(name: str, net: nn.Module, optimizer: SteepestDescent) -> None:
    model, state = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder() / name)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


@CASES.add
def saved_after_three_steps() -> None:
    for i, depth in enumerate(DEPTHS):
        save(f"{dist.get_world_size()}-{i}", *trained(sharded(build()), **depth))


def read_after_three_steps() -> None:
    """What the other number of ranks wrote, by a sharded net and by a plain one; five steps at once are the same bits."""
    for i, depth in enumerate(DEPTHS):
        for net in (sharded(build()), build()) if dist.get_world_size() == 1 else (sharded(build()),):
            optimizer = made(net, **depth)
            load(f"{3 - dist.get_world_size()}-{i}", net, optimizer)
            train(net, optimizer, batches(5)[3:])
            alone, ours = trained(build(), 5, **depth)
            assert_same_bits(alone, net)
            assert_same_state(ours, optimizer)


@pytest.mark.slow
def test_on_disk_between_one_and_two_ranks(results: dict[str, str]) -> None:
    """The same bits, as every rank has the same batch."""
    assert results["saved_after_three_steps"] == "passed"
    for ranks, names in ((1, ["read_after_three_steps", "saved_after_three_steps"]), (2, ["read_after_three_steps"])):
        outcome = run_ranks(__name__, names, ranks, CASES.folder)
        assert set(outcome.values()) == {"passed"}, outcome


results = CASES.fixture(ranks=2)
test_in_two_processes = CASES.test()
