"""What each process of test_vote.py does: real gloo processes, which write what they saw to a file for each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import pysteep
from pysteep import vote

SHAPES = ((7,), (3, 5), (1,), (33, 2), (4001,), (5, 61, 67))
STEPS = 3
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEEPEST = {"lr": 0.01, "q": 1.0, "weight_decay": 0.1}
TRAINING_STEPS = 12


def known_gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """No zeros among them."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [torch.where(g.abs() < 0.01, 0.01, g).to(dtype) for g in draws]


class Known(nn.Module):
    """Its gradients are what it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in SHAPES)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(11, 23), nn.Tanh(), nn.Linear(23, 5))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Noisy answers of one linear map."""
    generator = torch.Generator().manual_seed(7919 * step + rank)
    x = torch.randn(16, 11, generator=generator)
    return x, x[:, :5] - x[:, 6:11] + 0.1 * torch.randn(16, 5, generator=generator)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


class Wire(TorchDispatchMode):
    """Bytes that this rank sends to others, by collective: all-reduces and reduce-scatters go round a ring."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, others = func.name().partition("::")[2].partition(".")[0], self.world - 1
            handed_in = args[0] if name == "allreduce_" else [args[1]]
            factor = {
                "allreduce_": 2 * others / self.world,
                "_reduce_scatter_base_": others / self.world,
                "alltoall_base_": others / self.world,
                "_allgather_base_": others,
            }[name]
            self.sent[name] = self.sent.get(name, 0) + factor * sum(t.numel() * t.itemsize for t in handed_in)
        return func(*args, **(kwargs or {}))


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def full_gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() for p in model.parameters()]


def voting_ddp(
    model: nn.Module, *, backend: str | None = None, **options: Any
) -> tuple[DistributedDataParallel, vote.VoteState]:
    """In several buckets."""
    ddp, state = DistributedDataParallel(model, bucket_cap_mb=0.03, **options), vote.VoteState(backend=backend)
    ddp.register_comm_hook(state, vote.majority_vote_hook)
    return ddp, state


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    for child in model.children():
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp_votes(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    for dtype in DTYPES:
        model = Known(dtype)
        ddp, state = voting_ddp(model)
        seen = []
        for step in range(STEPS):
            model.zero_grad()
            ddp(known_gradients(rank, step, dtype)).backward()
            seen.append(gradients_of(model))
        yield f"ddp {dtype}", seen
        assert state.step == STEPS

    model = Known()
    ddp, _ = voting_ddp(model, backend="reference", gradient_as_bucket_view=True)
    with ddp.no_sync():
        ddp(known_gradients(rank, 0)).backward()
    ddp(known_gradients(rank, 1)).backward()
    yield "ddp accumulated", gradients_of(model)

    ddp, _ = voting_ddp(model)
    for name, kept in (("zeros", 0.0), ("same", None)):  # the same gradients twice, so that ties are in the same places
        seen = []
        for _ in range(STEPS):
            model.zero_grad()
            ddp([g * 0 if kept == 0 else g for g in known_gradients(rank, 0)]).backward()
            seen.append(gradients_of(model))
        yield f"ddp {name}", seen[1:]  # the buckets are made anew after the first step

    ddp, _ = voting_ddp(model)
    model.zero_grad()
    ddp([g * torch.nan if rank == 0 else g for g in known_gradients(rank, 0)]).backward()
    yield "ddp nan", gradients_of(model)

    for name, hooked in (("vote", True), ("plain", False)):
        model = Known()
        ddp = voting_ddp(model)[0] if hooked else DistributedDataParallel(model, bucket_cap_mb=0.03)
        with Wire(world) as wire:
            ddp(known_gradients(rank, 0)).backward()
        yield f"ddp bytes {name}", wire.sent

    embedding = DistributedDataParallel(nn.Embedding(5, 2, sparse=True))
    embedding.register_comm_hook(vote.VoteState(), vote.majority_vote_hook)
    try:
        embedding(torch.tensor([1, 3])).sum().backward()
    except Exception as error:  # DistributedDataParallel wraps what a hook raises
        yield "ddp sparse", str(error)


def ddp_training(rank: int, world: int) -> Iterator[tuple[str, Any]]:  # noqa: ARG001
    model = network()
    ddp, _ = voting_ddp(model)
    optimizer = pysteep.SteepestDescent(ddp.parameters(), **STEEPEST)
    for step in range(TRAINING_STEPS):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    yield "ddp trained", [p.detach() for p in model.parameters()]


def fsdp_votes(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (torch.float32, torch.float64):
        model = fully_shard(Known(dtype), mesh=mesh)
        vote.set_majority_vote(model)
        seen = []
        for step in range(STEPS):
            model.zero_grad()
            model(known_gradients(rank, step, dtype)).backward()
            seen.append(full_gradients_of(model))
        yield f"fsdp {dtype}", seen

    for name, hooked in (("vote", True), ("plain", False)):
        model = fully_shard(Known(), mesh=mesh)
        if hooked:
            vote.set_majority_vote(model)
        loss = model(known_gradients(rank, 0))
        with Wire(world) as wire:
            loss.backward()
        wire.sent.pop("_allgather_base_", None)  # of the weights
        yield f"fsdp bytes {name}", wire.sent

    comm = vote.MajorityVoteReduceScatter()
    comm(torch.empty(3), torch.ones(3 * world), dist.group.WORLD, dist.ReduceOp.AVG)
    try:
        comm(torch.empty(2), torch.ones(2 * world), dist.group.WORLD, dist.ReduceOp.AVG)
    except ValueError as error:
        yield "fsdp shared", str(error)


def fsdp_training(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    model = sharded(network(), init_device_mesh("cpu", (world,)))
    vote.set_majority_vote(model)
    for step in range(TRAINING_STEPS):
        model.zero_grad()
        loss_of(model, rank, step).backward()
        weights, gradients = zip(*((p.to_local(), p.grad.to_local()) for p in model.parameters()), strict=True)
        pysteep.functional.steepest_step(weights, gradients, **STEEPEST)
    yield "fsdp trained", [p.full_tensor().detach() for p in model.parameters()]


@contextmanager
def group(rank: int, world: int, folder: str) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def work(rank: int, world: int, folder: str) -> None:
    """The whole program of one rank."""
    seen: dict[str, Any] = {}
    with group(rank, world, folder):
        for part in (ddp_votes, ddp_training, fsdp_votes, fsdp_training):
            seen.update(part(rank, world))
    torch.save(seen, Path(folder) / f"rank_{rank}.pt")
