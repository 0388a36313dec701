"""SteepestDescent on parameters sharded by FSDP2 over two processes: the numbers of one process."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pysteep import SteepestDescent, functional
from pysteep._state import sharding
from tests.support.cases import same_bits
from tests.support.processes import Cases
from tests.support.sharded_nets import (
    DEPTHS,
    assert_close,
    assert_same_bits,
    batches,
    build,
    options,
    sharded,
    train,
    whole,
)
from tests.support.tolerances import MIXED_RTOL, SUM_RTOL

CASES = Cases(__name__)


def pair(**changes: Any) -> tuple[nn.Module, SteepestDescent, nn.Module, SteepestDescent]:
    """A net of one process and its sharded copy, each with its optimiser."""
    alone = build()
    together = sharded(alone)
    given = options(**changes)
    return alone, SteepestDescent(alone.parameters(), **given), together, SteepestDescent(together.parameters(), **given)


@CASES.add
def shards_are_uneven_and_one_is_empty() -> None:
    """What the other cases rely on."""
    rows = [param.to_local().shape[0] for param in sharded(build()).parameters()]
    assert rows == ([7, 7, 3, 3, 1, 1] if dist.get_rank() == 0 else [6, 6, 2, 2, 0, 0])


@CASES.add
def training_is_that_of_one_process() -> None:
    """The same bits, as both ranks have the same batch and the mean of two equal gradients is exact."""
    for q, depth in itertools.product((1.0, 1.7, 2.0), DEPTHS):
        alone, ours, together, theirs = pair(q=q, **depth)
        assert train(alone, ours, batches(5)) == train(together, theirs, batches(5)), (q, depth)
        assert_same_bits(alone, together)
        for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
            for a, b in zip(ours.factors(param), theirs.factors(twin), strict=True):
                assert isinstance(b, DTensor)
                assert b.placements == twin.placements
                assert same_bits(a, b.full_tensor())
            for name, value in theirs.state[twin].items():
                assert isinstance(value, DTensor) != (name == "balance")
                assert same_bits(ours.state[param][name], whole(value))


@CASES.add
def a_batch_for_each_rank() -> None:
    """The gradient's mean is rounded otherwise than that of the whole batch: equal to the tolerance."""
    for q, depth in itertools.product((1.7, 2.0), DEPTHS):
        alone, ours, together, theirs = pair(q=q, **depth)
        train(alone, ours, batches(5))
        train(together, theirs, [(x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]) for x, y in batches(5)])
        assert_close(alone, together)


@CASES.add
def weights_of_16_bits_are_rounded_as_in_one_process() -> None:
    """The random numbers of an element do not depend on the rank that holds it; compensations are sharded as the weights."""
    for rounding, depth in itertools.product(("stochastic", "compensated"), (DEPTHS[0], *DEPTHS[2:6])):
        alone = build().bfloat16()
        together = sharded(build(), dtype=torch.bfloat16)
        given = options(**depth, rounding=rounding, seed=7)
        ours, theirs = (SteepestDescent(net.parameters(), **given) for net in (alone, together))
        data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(4)]
        train(alone, ours, data)
        train(together, theirs, data)
        for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
            assert same_bits(param.detach(), whole(twin)), (rounding, depth)
            assert ours.state[param].keys() == theirs.state[twin].keys()
            for name, value in theirs.state[twin].items():
                assert torch.equal(ours.state[param][name], whole(value)), (rounding, depth, name)


@CASES.add
def random_numbers_need_elements_in_one_piece() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"rounding must not be 'stochastic' for param 0, whose elements"):
        SteepestDescent([param], rounding="stochastic")


@CASES.add
def random_numbers_need_the_order_of_the_whole() -> None:
    mesh, rows_last = init_device_mesh("cpu", (dist.get_world_size(),)), torch.ones(6, 4).t().contiguous().t()
    for placement in (Shard(0), Replicate()):
        param = nn.Parameter(distribute_tensor(rows_last, mesh, [placement]))
        with pytest.raises(ValueError, match=r"'stochastic' for param 0, whose elements a rank holds in another order"):
            SteepestDescent([param], rounding="stochastic")
    SteepestDescent([nn.Parameter(DTensor.from_local(rows_last, mesh, [Replicate()]))], rounding="stochastic")


@CASES.add
def layouts_are_looked_at_once() -> None:
    """Where each shard begins is not computed again at each step, nor for the next optimiser of such parameters."""
    together = sharded(build(), dtype=torch.bfloat16)
    optimizer = SteepestDescent(together.parameters(), **options(rounding="stochastic"))
    train(together, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in batches(1)])
    with mock.patch.object(sharding, "_first_element", side_effect=AssertionError("computed again")):
        train(together, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in batches(2)])


@CASES.add
def normalize_is_over_all_ranks() -> None:
    for q, betas in itertools.product((1.0, 1.7, 2.0), ((0.0, 0.0), (0.9, 0.99))):
        alone, ours, together, theirs = pair(q=q, betas=betas, normalize=True, lr=1e-3)
        before = [param.detach().clone() for param in alone.parameters()]
        train(alone, ours, batches(1))
        train(together, theirs, batches(1))
        for old, param, twin in zip(before, alone.parameters(), together.parameters(), strict=True):
            moved, seen = param.detach() - old, whole(twin) - old
            rounding = 2 * torch.finfo(torch.float32).eps * old.abs().max()
            assert (moved - seen).abs().max() <= SUM_RTOL * moved.abs().max() + rounding, (q, betas)


@CASES.add
def normalize_counts_what_every_rank_holds_once() -> None:
    """Beside sharded parameters one that each rank has whole, a replicated one, and one of which the other rank has all."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(3)
    full = [torch.randn(shape, generator=generator) for shape in ((5, 3), (4,), (7,), (1, 6))]
    grads = [torch.randn(w.shape, generator=generator) for w in full]
    alone = [nn.Parameter(w.clone()) for w in full]
    placements: list[Any] = [Shard(0), None, Replicate(), Shard(0)]

    def placed(tensor: Tensor, placement: Any) -> Tensor:
        return tensor.clone() if placement is None else distribute_tensor(tensor.clone(), mesh, [placement])

    together = [nn.Parameter(placed(w, placement)) for w, placement in zip(full, placements, strict=True)]
    for params in (alone, together):
        for param, grad, placement in zip(params, grads, placements, strict=True):
            param.grad = grad.clone() if params is alone else placed(grad, placement)
        SteepestDescent(params, lr=0.1, q=1.5, normalize=True, weight_decay=0.1).step()
    for param, twin in zip(alone, together, strict=True):
        torch.testing.assert_close(param.detach(), whole(twin), rtol=SUM_RTOL, atol=0)


@CASES.add
def clipping_accumulation_and_resharding() -> None:
    """clip_grad_norm_ with its DTensor norm, gradients summed over two batches before the ranks meet, weights kept gathered."""
    for depth, reshard in itertools.product(DEPTHS[1:4], (True, False)):
        alone = build()
        together = sharded(alone, reshard_after_forward=reshard)
        nets = [(net, SteepestDescent(net.parameters(), **options(q=1.7, **depth))) for net in (alone, together)]
        for _ in range(3):
            for net, optimizer in nets:
                optimizer.zero_grad()
                for i, (x, y) in enumerate(batches(2)):
                    if net is together:
                        net.set_requires_gradient_sync(i == 1)
                    nn.functional.mse_loss(net(x), y).backward()
                norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                assert isinstance(norm, DTensor) == (net is together)
                optimizer.step()
        assert_close(alone, together)


@CASES.add
def mixed_precision() -> None:
    """Gradients in bfloat16, reduced in float32; weights and factors in float32: near those of a run in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for depth in DEPTHS:
        alone = build()
        together = sharded(alone, mp_policy=policy)
        optimizer = SteepestDescent(together.parameters(), **options(q=2.0, **depth))
        train(alone, SteepestDescent(alone.parameters(), **options(q=2.0, **depth)), batches(3))
        losses = train(together, optimizer, batches(3))
        assert losses[-1] < losses[0]
        assert {param.dtype for param in together.parameters()} == {torch.float32}
        for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
            assert (param - whole(twin)).abs().max() <= MIXED_RTOL * param.abs().max()


@CASES.add
def bfloat16_weights() -> None:
    for depth in DEPTHS:
        alone = build().bfloat16()
        together = sharded(alone)
        for net in (alone, together):
            data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(3)]
            train(net, SteepestDescent(net.parameters(), **options(q=1.5, **depth)), data)
        assert_same_bits(alone, together)


@CASES.add
def a_tensor_learning_rate() -> None:
    for depth in DEPTHS:
        alone, ours, together, theirs = pair(**depth)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = torch.tensor(0.0125)
        train(alone, ours, batches(2))
        train(together, theirs, batches(2))
        assert_same_bits(alone, together)


@CASES.add
def writes_from_outside_are_noticed() -> None:
    """To the DTensor or to its shard; where one rank alone has a change, the other one does not wait for it."""
    for storage, through in itertools.product(("full", "tied"), ("whole", "shard", "one rank")):
        alone, ours, together, theirs = pair(q=1.5, depth=3, storage=storage, betas=(0.9, 0.99))
        train(alone, ours, batches(3))
        train(together, theirs, batches(3))
        masks = [torch.rand(param.shape, generator=torch.Generator().manual_seed(7)) > 0.5 for param in alone.parameters()]
        with torch.no_grad():
            for param, twin, mask in zip(alone.parameters(), together.parameters(), masks, strict=True):
                shard = distribute_tensor(mask, twin.device_mesh, twin.placements)
                if through == "one rank":
                    rows = distribute_tensor(torch.arange(len(mask)), twin.device_mesh, twin.placements).to_local()
                    if dist.get_rank() == 0:
                        twin.to_local().mul_(shard.to_local())
                    ends = torch.tensor([len(rows)])
                    dist.broadcast(ends, 0)
                    mask[int(ends) :] = True
                elif through == "shard":
                    twin.to_local().mul_(shard.to_local())
                else:
                    twin.mul_(shard)
                param.mul_(mask)
        train(alone, ours, batches(2))
        train(together, theirs, batches(2))
        assert_same_bits(alone, together)


@CASES.add
def refactor() -> None:
    for depth in DEPTHS[2:]:
        alone, ours, together, theirs = pair(**depth)
        for net, optimizer in ((alone, ours), (together, theirs)):
            train(net, optimizer, batches(2))
            optimizer.refactor_()
            train(net, optimizer, batches(2))
        assert_same_bits(alone, together)


@CASES.add
def saddle() -> None:
    alone, ours, together, theirs = pair(depth=3, init="saddle", scale=0.3)
    assert all(not whole(param).any() for param in together.parameters())
    train(alone, ours, batches(3))
    train(together, theirs, batches(3))
    assert_same_bits(alone, together)


@CASES.add
def an_infinity_on_one_rank_stops_all() -> None:
    for depth in DEPTHS:
        together = sharded(build())
        optimizer = SteepestDescent(together.parameters(), **options(**depth))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x, y = batches(1)[0]
        for spoiled in (False, True):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(together(x), y)).backward()
            if spoiled and dist.get_rank() == 1:
                next(together.parameters()).grad.to_local()[0, 0] = torch.inf
            before = [whole(param).clone() for param in together.parameters()]
            held = [whole(value).clone() for state in optimizer.state.values() for value in state.values()]
            scaler.step(optimizer)
            scaler.update()
            kept = [torch.equal(old, whole(param)) for old, param in zip(before, together.parameters(), strict=True)]
            assert all(kept) == spoiled
        now = [whole(value) for state in optimizer.state.values() for value in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
        assert scaler.get_scale() == 512.0


@CASES.add
def a_distributed_found_inf() -> None:
    """As a scaler may give it that does not reduce it: the largest of the ranks' numbers counts."""
    alone, ours, together, theirs = pair(q=1.5)
    before = [whole(param).clone() for param in together.parameters()]
    x, y = batches(1)[0]
    nn.functional.mse_loss(together(x), y).backward()
    mesh = init_device_mesh("cpu", (2,))
    for found in (1.0, 0.0):
        mine = torch.tensor(found if dist.get_rank() == 1 else 0.0)
        theirs.found_inf = DTensor.from_local(mine, mesh, [Partial("max")])
        theirs.grad_scale = DTensor.from_local(torch.tensor(1.0), mesh, [Replicate()])
        theirs.step()
        kept = [torch.equal(old, whole(param)) for old, param in zip(before, together.parameters(), strict=True)]
        assert all(kept) == bool(found)
    train(alone, ours, batches(1))
    assert_same_bits(alone, together)


@CASES.add
def only_x_travels() -> None:
    """A step of training at depth 10 moves the bytes that it moves at depth 1."""
    moved = {}
    for depth in ({"depth": 1}, *DEPTHS[2:]):
        together = sharded(build())
        optimizer = SteepestDescent(together.parameters(), **options(**depth))
        train(together, optimizer, batches(1))
        with Collectives() as seen:
            train(together, optimizer, batches(1))
        moved[str(depth)] = seen.bytes
    assert len(set(moved.values())) == 1, moved
    assert min(moved.values()) > 0


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the tensors that collectives are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


@CASES.add
def versions_of_dtensors_are_counted() -> None:
    """Autograd then notices that a weight of which it still needs the old value was written to."""
    mesh = init_device_mesh("cpu", (2,))
    for depth in ({}, {"depth": 3}, {"depth": 3, "storage": "implicit", "init": "balanced"}):
        p = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Shard(0)]))
        loss = (p * p * p).sum()
        p.grad = distribute_tensor(torch.ones(5), mesh, [Shard(0)])
        SteepestDescent([p], lr=0.1, **depth).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@CASES.add
def gradients_that_are_placed_otherwise() -> None:
    """Terms of a gradient are summed; one on another mesh, a plain one, and terms of a weight are refused by name."""
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    w, g = torch.randn(5, 3), torch.randn(5, 3)
    for depth in ({}, {"depth": 3}):
        for placement in (Shard(0), Replicate()):
            plain, p = nn.Parameter(w.clone()), nn.Parameter(distribute_tensor(w.clone(), mesh, [placement]))
            ours, theirs = (SteepestDescent([param], lr=0.1, q=1.5, **depth) for param in (plain, p))
            terms = DTensor.from_local(g, mesh, [Partial("sum")])
            for grad in (terms, terms.redistribute(mesh, [placement], async_op=True)):
                plain.grad, p.grad = 2 * g, grad
                ours.step()
                theirs.step()
                assert same_bits(plain.detach(), whole(p))
        before = whole(p).clone()
        p.grad = distribute_tensor(g, other, [Replicate(), Shard(0)])
        with pytest.raises(ValueError, match="gradient 0 must be on its param's mesh"):
            SteepestDescent([p], lr=0.1, **depth).step()
        assert torch.equal(before, whole(p))
    with pytest.raises(ValueError, match="param 0 must be placed by Shard or Replicate"):
        SteepestDescent([nn.Parameter(DTensor.from_local(w, mesh, [Partial("sum")]))])
    with pytest.raises(TypeError, match="must hold its own memory"):
        functional.steepest_step([p.detach()], [p.grad], lr=0.1)


results = CASES.fixture(ranks=2)
test_in_two_processes = CASES.test()
