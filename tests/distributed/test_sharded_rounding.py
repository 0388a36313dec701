"""Stochastic rounding of DTensors over one and two mesh dimensions: each rank draws the numbers of its part of the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pysteep import SteepestDescent
from tests.support.cases import same_bits
from tests.support.processes import Cases, run_ranks
from tests.support.sharded_nets import whole

CASES = Cases(__name__)
SHAPES: tuple[tuple[int, ...], ...] = ((13, 5), (8, 3, 2), (3, 7), (1, 9), (4,), (), (0, 3), (33, 17))
"""Uneven ones, some of which leave ranks empty, one of a single row, one without dimensions, one without elements."""
DEPTHS: list[dict[str, Any]] = [{}, {"depth": 3, "storage": "full"}]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_draws_of_one_process(mesh: DeviceMesh, placements: list[Placement]) -> None:
    for depth in DEPTHS:
        alone = [nn.Parameter(drawn(shape, i)) for i, shape in enumerate(SHAPES)]
        placed = [[Replicate()] * mesh.ndim if not p.ndim else placements for p in alone]
        together = [nn.Parameter(distribute_tensor(p.detach(), mesh, own)) for p, own in zip(alone, placed, strict=True)]
        given = {"lr": 0.01, "q": 1.5, "weight_decay": 0.1, "rounding": "stochastic", "seed": 5, **depth}
        ours, theirs = SteepestDescent(alone, **given), SteepestDescent(together, **given)
        for step in range(2):
            for i, (param, twin) in enumerate(zip(alone, together, strict=True)):
                param.grad = drawn(param.shape, 100 * step + i)
                twin.grad = distribute_tensor(param.grad, mesh, placed[i])
            ours.step()
            theirs.step()
        for param, twin in zip(alone, together, strict=True):
            assert same_bits(param.detach(), whole(twin)), (placements, param.shape, depth)


@CASES.add
def one_dimension() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Replicate()):
        assert_draws_of_one_process(mesh, [placement])


@CASES.add
def two_dimensions() -> None:
    """HSDP, rows cut twice, and mesh dimensions of a single rank, over which anything is whole."""
    ranks = dist.get_world_size()
    for sizes in ((2, ranks // 2), (1, ranks)):
        mesh = init_device_mesh("cpu", sizes)
        assert_draws_of_one_process(mesh, [Replicate(), Shard(0)])
        assert_draws_of_one_process(mesh, [Shard(0), Replicate()])
        assert_draws_of_one_process(mesh, [Shard(0), Shard(0)])


@CASES.add
def tensor_parallel_under_fsdp() -> None:
    """ColwiseParallel cuts rows and FSDP2 cuts them again: _StridedShard(0), in one piece. RowwiseParallel's are not."""
    ranks = dist.get_world_size()
    for sizes in ((2, ranks // 2), (1, ranks)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        torch.manual_seed(2)
        alone = nn.Linear(4, 20).bfloat16()
        together = parallelize_module(copy.deepcopy(alone), mesh["tensor"], ColwiseParallel())
        fully_shard(together, mesh=mesh["data"])
        given: dict[str, Any] = {"lr": 0.01, "q": 1.5, "rounding": "stochastic"}
        ours, theirs = SteepestDescent(alone.parameters(), **given), SteepestDescent(together.parameters(), **given)
        for _ in range(2):
            for param, twin in zip(alone.parameters(), together.parameters(), strict=True):
                param.grad, twin.grad = torch.full_like(param, 0.3), torch.full_like(twin, 0.3)
            ours.step()
            theirs.step()
        assert all(
            same_bits(p.detach(), whole(twin)) for p, twin in zip(alone.parameters(), together.parameters(), strict=True)
        )
        by_columns = parallelize_module(copy.deepcopy(alone), mesh["tensor"], RowwiseParallel())
        if sizes[1] > 1:
            with pytest.raises(ValueError, match=r"'stochastic' for param 0, whose elements a rank does not hold in one piece"):
                SteepestDescent(by_columns.parameters(), **given)


results = CASES.fixture(ranks=2)
test_in_two_processes = CASES.test()


@pytest.mark.slow
def test_in_four_processes(tmp_path: Path) -> None:
    results = run_ranks(__name__, [*CASES.cases], 4, tmp_path)
    assert set(results.values()) == {"passed"}, results
