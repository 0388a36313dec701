"""SteepestDescent in DistributedDataParallel over two processes: the numbers of one process; factors stay where they are."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from pysteep import SteepestDescent
from tests.support.cases import same_bits
from tests.support.processes import Cases
from tests.support.sharded_nets import DEPTHS, Batch, assert_close, assert_same_bits, batches, build, options, train
from tests.support.tolerances import CANCELLED

CASES = Cases(__name__)


def own_half(data: list[Batch]) -> list[Batch]:
    return [(x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]) for x, y in data]


def pair(**changes: object) -> tuple[nn.Module, SteepestDescent, nn.Module, SteepestDescent]:
    """A net of one process and its replicated copy, each with its optimiser."""
    alone = build()
    together = DistributedDataParallel(copy.deepcopy(alone))
    given = options(**changes)
    return alone, SteepestDescent(alone.parameters(), **given), together, SteepestDescent(together.parameters(), **given)


@CASES.add
def training_is_that_of_one_process() -> None:
    """The same bits, as both ranks have the same batch and the mean of two equal gradients is exact."""
    for q, depth in itertools.product((1.0, 1.7, 2.0), DEPTHS):
        alone, ours, together, theirs = pair(q=q, **depth)
        assert train(alone, ours, batches(5)) == train(together, theirs, batches(5)), (q, depth)
        assert_same_bits(alone, together)
        for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
            assert all(map(same_bits, ours.state[param].values(), theirs.state[twin].values()))


@CASES.add
def a_batch_for_each_rank() -> None:
    """The gradient's mean is rounded otherwise than that of the whole batch. The ranks' weights stay the same bits."""
    for q, depth in itertools.product((1.7, 2.0), DEPTHS):
        alone, ours, together, theirs = pair(q=q, **depth)
        train(alone, ours, batches(5))
        train(together, theirs, own_half(batches(5)))
        assert_close(alone, together)
        for tensor in (*together.parameters(), *(value for state in theirs.state.values() for value in state.values())):
            of_rank_0 = tensor.detach().clone()
            dist.broadcast(of_rank_0, 0)
            assert same_bits(tensor.detach(), of_rank_0)


@CASES.add
def signs_differ_only_where_the_gradient_cancels() -> None:
    """q = 1 with a batch for each rank: a step has the other sign only where the mean of gradients is rounding."""
    for depth in (DEPTHS[0], DEPTHS[2]):
        alone, ours, together, theirs = pair(q=1.0, **depth)
        train(alone, ours, batches(1))
        train(together, theirs, own_half(batches(1)))
        for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
            flipped = (param - twin).abs() > options()["lr"] / 2
            assert (param.grad[flipped].abs() <= CANCELLED * param.grad.abs().max()).all()


@CASES.add
def normalize_reduces_nothing() -> None:
    for betas in ((0.0, 0.0), (0.9, 0.99)):
        alone, ours, together, theirs = pair(q=1.7, betas=betas, normalize=True, lr=1e-3)
        train(alone, ours, batches(3))
        train(together, theirs, batches(3))
        assert_same_bits(alone, together)


@CASES.add
def accumulation_and_clipping() -> None:
    for depth in DEPTHS:
        alone, ours, together, theirs = pair(q=1.7, **depth)
        for net, optimizer in ((alone, ours), (together, theirs)):
            first, second = batches(2)
            with net.no_sync() if net is together else torch.enable_grad():
                nn.functional.mse_loss(net(first[0]), first[1]).backward()
            nn.functional.mse_loss(net(second[0]), second[1]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
        assert_close(alone, together)


@CASES.add
def an_infinity_on_one_rank_stops_all() -> None:
    for depth in DEPTHS:
        _, _, together, optimizer = pair(**depth)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for spoiled in (False, True):
            optimizer.zero_grad()
            x, y = batches(1)[0]
            if spoiled and dist.get_rank() == 1:
                x[0, 0] = torch.inf
            scaler.scale(nn.functional.mse_loss(together(x), y)).backward()
            before = [param.detach().clone() for param in together.parameters()]
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, (param.detach() for param in together.parameters()))) == spoiled
        assert scaler.get_scale() == 512.0


@CASES.add
def only_x_travels() -> None:
    """A step of training at depth 10 reduces the bytes that it reduces at depth 1: those of the weights."""
    moved = []
    for depth in ({"depth": 1}, *DEPTHS[2:]):
        _, _, together, optimizer = pair(**depth)
        seen: list[int] = []

        def counting(_, bucket, seen=seen):  # DDP takes no annotation that is a string
            seen.append(bucket.buffer().nbytes)
            return allreduce_hook(None, bucket)

        together.register_comm_hook(None, counting)
        train(together, optimizer, batches(2))
        moved.append(sum(seen))
    assert set(moved) == {2 * sum(param.nbytes for param in build().parameters())}


def zero(net: nn.Module, **given: Any) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(net.parameters(), optimizer_class=SteepestDescent, **given)


@CASES.add
def zero_redundancy_is_that_of_one_process() -> None:
    """Each rank steps a part of the parameters, whole ones; its state stays there."""
    for depth in ({}, {"rounding": "compensated"}, *DEPTHS[1:5]):
        alone = build()
        together = DistributedDataParallel(copy.deepcopy(alone))
        ours, theirs = SteepestDescent(alone.parameters(), **options(**depth)), zero(together, **options(**depth))
        assert train(alone, ours, batches(3)) == train(together, theirs, batches(3))
        assert_same_bits(alone, together)


@CASES.add
def zero_redundancy_refuses_what_needs_all_parameters() -> None:
    """Also where the option was set later, before anything is written; and serves it where there is one rank."""
    alone_on_each = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for option, value in (("normalize", True), ("rounding", "stochastic")):
        together = DistributedDataParallel(build())
        late = zero(together, **options())
        late.param_groups[0][option] = value
        for optimizer in (zero(together, **options(**{option: value})), late):
            with pytest.raises(ValueError, match=f"{option} must be .* inside ZeroRedundancyOptimizer, .*got {value!r}"):
                train(together, optimizer, batches(1))
        assert_same_bits(build(), together)
        own = zero(build(), **options(**{option: value}), process_group=alone_on_each[dist.get_rank()])
        own.step()


@CASES.add
def compiled_steps_beside_a_process_group() -> None:
    """The look for wrappers is traced with the step, into the same graph."""
    alone, compiled = build(), build()
    ours, theirs = (SteepestDescent(net.parameters(), **options(depth=3)) for net in (alone, compiled))
    step = torch.compile(theirs.step, fullgraph=True, backend="eager")
    for x, y in batches(2):
        for net in (alone, compiled):
            net.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
        ours.step()
        step()
    assert_same_bits(alone, compiled)


@CASES.add
def fsdp1_is_that_of_one_process() -> None:
    """FullyShardedDataParallel leaves a rank a flat part of plain memory: right for what is elementwise, at any depth."""
    for original, depth in itertools.product((True, False), DEPTHS[:6]):
        alone = build()
        together = FullyShardedDataParallel(copy.deepcopy(alone), device_id=torch.device("cpu"), use_orig_params=original)
        ours, theirs = (SteepestDescent(net.parameters(), **options(**depth)) for net in (alone, together))
        assert train(alone, ours, batches(3)) == train(together, theirs, batches(3)), (original, depth)
        with FullyShardedDataParallel.summon_full_params(together):
            assert all(map(same_bits, (p.detach() for p in alone.parameters()), unflattened(together, alone)))


def unflattened(together: nn.Module, alone: nn.Module) -> list[Tensor]:
    return [together.get_parameter(f"_fsdp_wrapped_module.{name}").detach() for name, _ in alone.named_parameters()]


@CASES.add
def fsdp1_refuses_what_needs_whole_parameters() -> None:
    for original, (option, value) in itertools.product((True, False), (("normalize", True), ("rounding", "stochastic"))):
        together = FullyShardedDataParallel(build(), device_id=torch.device("cpu"), use_orig_params=original)
        message = f"{option} must be .* for param 0, a flat part of FullyShardedDataParallel .*got {value!r}"
        with pytest.raises(ValueError, match=message):
            SteepestDescent(together.parameters(), **options(**{option: value}))
        late = SteepestDescent(together.parameters(), **options())
        late.param_groups[0][option] = value
        with pytest.raises(ValueError, match=message):
            late.step()


results = CASES.fixture(ranks=2)
test_in_two_processes = CASES.test()
