"""pysteep.vote in real gloo processes: the votes, training by them and the bytes on the wire."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import multiprocessing, nn

import pysteep
from pysteep import vote
from tests.support.voting import DTYPES, SHAPES, STEEPEST, STEPS, TRAINING_STEPS, known_gradients, loss_of, network, work

WORLDS = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)


@pytest.fixture(scope="module", params=WORLDS, ids="{}-ranks".format)
def ranks(request, tmp_path_factory):
    """What each rank saw, by name; as many processes as ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(request.param)]


def sums_of_signs(world, step, *, voting=None):
    """Of each gradient: from -world to world, as integers."""
    all_ranks = [known_gradients(rank, step) for rank in voting or range(world)]
    return [sum(g.sign() for g in of_ranks) for of_ranks in zip(*all_ranks, strict=True)]


def assert_majority(gradients, sums, *, ties_are_zero):
    for gradient, total in zip(gradients, sums, strict=True):
        assert gradient.shape == total.shape
        decided = total != 0
        assert torch.equal(gradient[decided].float().sign(), total[decided].sign())
        assert ((gradient[~decided] == 0) if ties_are_zero else (gradient[~decided].abs() == 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ddp_gives_the_majority(ranks, dtype):
    for seen in ranks:
        for step in range(STEPS):
            gradients = seen[f"ddp {dtype}"][step]
            assert all(gradient.dtype == dtype and bool((gradient.abs() <= 1).all()) for gradient in gradients)
            assert_majority(gradients, sums_of_signs(len(ranks), step), ties_are_zero=len(ranks) == 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fsdp_gives_the_majority(ranks, dtype):
    for seen in ranks:
        for step in range(STEPS):
            gradients = seen[f"fsdp {dtype}"][step]
            assert_majority(gradients, sums_of_signs(len(ranks), step), ties_are_zero=True)
            if dtype == torch.float32:
                assert all(bool(((gradient.abs() == 1) | (gradient == 0)).all()) for gradient in gradients)


def test_accumulated_gradients_vote_once(ranks):
    of_ranks = [zip(known_gradients(rank, 0), known_gradients(rank, 1), strict=True) for rank in range(len(ranks))]
    sums = [sum(signs) for signs in zip(*([(a + b).sign() for a, b in pairs] for pairs in of_ranks), strict=True)]
    for seen in ranks:
        assert_majority(seen["ddp accumulated"], sums, ties_are_zero=len(ranks) == 2)


def test_ties_and_zeros_take_turns(ranks):
    for seen in ranks:
        first, second = (torch.cat([g.flatten() for g in gradients]) for gradients in seen["ddp zeros"])
        if len(ranks) == 2:
            assert not first.any()
            assert not second.any()
        else:
            assert (first.abs() == 1).all()
            assert torch.equal(first, -second)
        sums = sums_of_signs(len(ranks), 0)
        for total, a, b in zip(sums, *seen["ddp same"], strict=True):
            assert torch.equal(a[total != 0], b[total != 0])
            assert torch.equal(a[total == 0], -b[total == 0])


def test_a_rank_of_nan_cannot_outvote_the_others(ranks):
    others = len(ranks) - 1
    sums = sums_of_signs(len(ranks), 0, voting=range(1, len(ranks)))
    for gradient, total in zip(ranks[-1]["ddp nan"], sums, strict=True):
        agreed = total.abs() == others
        assert not gradient.isnan().any()
        if others > 1:
            assert torch.equal(gradient[agreed], total[agreed].sign())
        else:  # its own vote is for them or a tie
            assert ((gradient == total) | (gradient == 0)).all()


def reference_run(world):
    """Training in one process; every rank's gradients are formed in turn."""
    model = network()
    weights = list(model.parameters())
    optimizer = pysteep.SteepestDescent(weights, **STEEPEST)
    losses = []
    for step in range(TRAINING_STEPS):
        of_ranks = []
        for rank in range(world):
            loss = loss_of(model, rank, step)
            of_ranks.append(torch.autograd.grad(loss, weights))
            losses.append(loss.item())
        for w, *gradients in zip(weights, *of_ranks, strict=True):
            w.grad = sum(g.sign() for g in gradients).sign()
        optimizer.step()
    assert losses[-1] < losses[0]
    return [w.detach() for w in weights]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_training(ranks, way):
    """All ranks hold equal weights; they are those of a process that forms sign(sum of signs) itself where ties are zeros."""
    first, *others = [seen[f"{way} trained"] for seen in ranks]
    for other in others:
        assert all(map(torch.equal, other, first))
    if way == "fsdp" or len(ranks) != 4:
        assert all(map(torch.equal, first, reference_run(len(ranks))))


def test_bytes_on_the_wire(ranks):
    """What each rank sends to others, against float32 gradients round a ring."""
    world = len(ranks)
    for seen in ranks:
        votes, plain = seen["ddp bytes vote"], seen["ddp bytes plain"]
        assert set(votes) == ({"_allgather_base_"} if world == 2 else {"alltoall_base_", "_allgather_base_"})
        assert plain == {"allreduce_": 2 * (world - 1) / world * 4 * NUMEL}
        assert 28 * sum(votes.values()) <= sum(plain.values())
        votes, plain = seen["fsdp bytes vote"], seen["fsdp bytes plain"]
        assert set(votes) == {"alltoall_base_"}
        assert set(plain) == {"_reduce_scatter_base_"}
        assert 28 * sum(votes.values()) <= sum(plain.values())


def test_errors_of_real_runs_name_the_argument(ranks):
    for seen in ranks:
        assert "bucket must be dense (torch.strided); got torch.sparse_coo" in seen["ddp sparse"]
        assert "serves one module, so that input_tensor must have" in seen["fsdp shared"]


def test_bad_arguments_are_named():
    import torch.distributed as dist

    with pytest.raises(ValueError, match="backend must be one of"):
        vote.VoteState(backend="fast")
    with pytest.raises(ValueError, match="model must be one that fully_shard was applied to; got Linear"):
        vote.set_majority_vote(nn.Linear(2, 2))
    comm, output, group = vote.MajorityVoteReduceScatter(), torch.empty(2), None
    with pytest.raises(ValueError, match="op must be a sum or a mean"):
        comm(output, torch.ones(4), group, dist.ReduceOp.MAX)
    with pytest.raises(ValueError, match="async_op must be False; got True"):
        comm(output, torch.ones(4), group, dist.ReduceOp.SUM, True)
    with pytest.raises(TypeError, match=r"input_tensor must be float16.*got torch\.int64"):
        comm(output, torch.ones(4).long(), group, dist.ReduceOp.SUM)


def test_importing_the_package_does_not_import_it():
    script = "import pysteep, sys; print('pysteep.vote' in sys.modules, pysteep.vote.VoteState().step)"
    finished = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert finished.stdout == "False 0\n"
