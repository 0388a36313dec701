"""Majority vote instead of averaged gradients, for sign descent on many processes. Experimental: names may change.

>>> ddp.register_comm_hook(pysteep.vote.VoteState(), pysteep.vote.majority_vote_hook)      DistributedDataParallel
>>> pysteep.vote.set_majority_vote(model)                                                  fully_shard
>>> optimizer = pysteep.SteepestDescent(model.parameters(), lr=1e-3, q=1.0)

Each rank sends a bit for each element of its gradient, its sign, and gets what most ranks sent: 1, -1, or 0 on a tie. Those are
the gradients that the optimiser sees. docs/vote.md has the formula, the bytes on the wire and what it must not be used with.

Source: Bernstein et al., "signSGD: compressed optimisation for non-convex problems" (ICML 2018) and "signSGD with majority vote
is communication efficient and fault tolerant" (ICLR 2019).
"""

# No `from __future__ import annotations`: DistributedDataParallel looks at the hook's annotations, which must be classes.
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from ._ops.dispatch import check_backend
from ._ops.sign_vote import MAX_VOTERS, bytes_of, check_values, count_votes, counted, pack_signs, packed_rows
from ._selection import check_model

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket  # torch.distributed does not say that it exports the class
else:
    GradBucket = dist.GradBucket

__all__ = [
    "MajorityVoteReduceScatter",
    "VoteState",
    "count_votes",
    "majority_vote_hook",
    "pack_signs",
    "set_majority_vote",
]

SUMS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.PREMUL_SUM)
"""The reductions that a vote may stand in for: it has no size, so that a factor changes nothing."""


class VoteState:
    """What `majority_vote_hook` needs to know and to remember.

    Args:
        process_group: whose ranks vote: the one that DistributedDataParallel was given. None is the default group.
        backend: a name of `pysteep.backends()`; None chooses.

    Attributes:
        step: how many steps have voted. It tells whose turn it is where gradients are 0, and must be the same on every rank: a
            run that is resumed with it goes on with the same bits.

    Raises:
        ValueError, RuntimeError: `backend` is not a backend's name, or cannot serve here.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, backend: str | None = None) -> None:
        check_backend(backend)
        self.process_group = process_group
        self.backend = backend
        self.step = 0


def majority_vote_hook(state: VoteState, bucket: GradBucket) -> Future[Tensor]:
    """A communication hook for `DistributedDataParallel.register_comm_hook`: gradients become the majority of their signs.

    1, -1, or 0 where as many ranks voted for 1 as for -1; with four ranks or any larger even number such an element is 1 and
    -1 by turns, from step to step and from element to element, since a bit is all that comes back. NaN and 0 are sent as 1 and
    -1 by turns as well. There is no division by the number of ranks.

    Args:
        state: of this model; two models have one each.
        bucket: dense gradients of one real floating dtype.

    Returns:
        a finished future of the bucket's own memory, overwritten. The calls were made on the current stream.

    Raises:
        TypeError: the gradients are sparse, complex or integers.
        ValueError: more than 65535 ranks.
    """
    gradient = bucket.buffer()
    check_values("bucket", gradient)
    vote(gradient, state.process_group, state.step, state.backend)
    if bucket.is_last():
        state.step += 1
    future: Future[Tensor] = Future(devices=[] if gradient.device.type == "cpu" else [gradient.device])
    future.set_result(gradient)
    return future


class MajorityVoteReduceScatter:
    """A reduce-scatter of gradients for one module of `fully_shard`: its `set_custom_reduce_scatter` takes it.

    Each rank gets the majority of the signs of its own shard, 1, -1 or 0 on a tie, by one all-to-all of a bit an element: a
    32nd of what a reduce-scatter of float32 moves. `set_majority_vote` gives one to every module of a model.

    Args:
        backend: a name of `pysteep.backends()`; None chooses.

    Attributes:
        step: how often it was called, as of `VoteState`.

    Raises:
        ValueError, RuntimeError: `backend` is not a backend's name, or cannot serve here.
    """

    def __init__(self, *, backend: str | None = None) -> None:
        check_backend(backend)
        self.backend = backend
        self.step = 0
        self._numel: int | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the gradients."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write to `output_tensor` [n] what the ranks of `group` agree on for their `input_tensor` [ranks * n].

        Raises:
            TypeError: sparse, complex or integer gradients.
            ValueError: `op` is no sum or mean, `async_op` is true, or the sizes are those of another module.
        """
        check_values("input_tensor", input_tensor)
        if op not in SUMS:
            raise ValueError(f"op must be a sum or a mean, which a vote may stand in for; got {op}")
        if async_op:
            raise ValueError("async_op must be False; got True")
        if self._numel not in (None, input_tensor.numel()):
            raise ValueError(
                f"a MajorityVoteReduceScatter serves one module, so that input_tensor must have {self._numel} elements as "
                f"before; got {input_tensor.numel()}: call set_majority_vote(model), or give each module its own"
            )
        self._numel = input_tensor.numel()
        ranks = ranks_of(group)
        shards = input_tensor.view(ranks, output_tensor.numel())
        words = packed_rows(shards, bytes_of(shards.shape[1]), dist.get_rank(group) + self.step, self.backend)
        counted(exchanged(words, group), output_tensor, self.backend)
        self.step += 1


def set_majority_vote(model: nn.Module, *, backend: str | None = None) -> None:
    """Let the modules of `model` that `fully_shard` was applied to vote on their gradients, each by one of its own
    `MajorityVoteReduceScatter`.

    Args:
        model: with one or more such modules, itself among them or not.
        backend: a name of `pysteep.backends()`; None chooses.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` has no such module, or `backend` is not a backend's name.
        RuntimeError: `backend` cannot serve here.
    """
    from torch.distributed.fsdp import FSDPModule

    check_model(model)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        raise ValueError(f"model must be one that fully_shard was applied to; got {type(model).__name__}")
    for module in modules:
        comm: Any = MajorityVoteReduceScatter(backend=backend)  # torch keeps the base class that it names to itself
        module.set_custom_reduce_scatter(comm)


# -- the collectives


def vote(gradient: Tensor, group: dist.ProcessGroup | None, step: int, backend: str | None) -> None:
    """Overwrite the flat `gradient` with the majority of the ranks' signs."""
    ranks, n = ranks_of(group), gradient.numel()
    phase = dist.get_rank(group) + step
    if ranks <= 2:  # as many bytes as below, and ties come back as what they are
        words = packed_rows(gradient.view(1, n), bytes_of(n), phase, backend)
        counted(gathered(words, ranks, group), gradient, backend)
        return
    # A rank counts the votes on an equal share of the bytes.
    share = -(-bytes_of(n) // ranks)
    words = packed_rows(gradient.view(1, n), ranks * share, phase, backend)
    result = gradient.new_empty(8 * share)
    counted(exchanged(words.view(ranks, share), group), result, backend)
    majority = packed_rows(result.view(1, -1), share, step, backend)
    counted(gathered(majority, ranks, group).view(1, -1), gradient, backend)


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """How many vote."""
    ranks = dist.get_world_size(group)
    if ranks > MAX_VOTERS:
        raise ValueError(f"group must have no more than {MAX_VOTERS} ranks; got {ranks}")
    return ranks


def exchanged(words: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Row i of the result is what rank i has as the row of this rank."""
    received = torch.empty_like(words)
    dist.all_to_all_single(received, words, group=group)
    return received


def gathered(words: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """The words [1, bytes] of every rank: [ranks, bytes]."""
    received = words.new_empty(ranks, words.shape[1])
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # torch before 2.13
    gather(received.view(-1), words.view(-1), group=group)
    return received
