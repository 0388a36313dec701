"""Memory whose every element is looked at after an op ran: numbers that can be drawn again, and guards around each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

PIECE = 1 << 24  # elements looked at at a time, for which a definition has some gigabytes of float64 beside them
GUARDS, GUARD = 128, 1.25  # so many elements at least lie before, between and behind the tensors, all of this value
PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Numbers = torch.Generator


class WrongResultError(Exception):
    """A result that is not that of the definition; it must not be timed."""


class Block:
    """Tensors in one block of memory, each where an allocation might start, with guards around them.

    `fill` draws normal numbers piece by piece, so that each piece can be drawn again when it has been overwritten: no copy is
    kept. Blocks of the same shapes have the same pieces.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        mean: float = 0.0,
        deviation: float = 1.0,
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        padded = [-(-size // GUARDS) * GUARDS + GUARDS for size in sizes]
        self.memory = torch.full((GUARDS + sum(padded),), GUARD, dtype=dtype, device=device)
        first, *parts = self.memory.split([GUARDS, *padded])
        self.guards = [first, *(part[size:] for part, size in zip(parts, sizes, strict=True))]
        self.tensors = [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
        # Written through `data`, so that a graph which saved the tensors still runs: only its time matters then.
        self.pieces = [piece for tensor in self.tensors for piece in tensor.data.view(-1).split(PIECE)]
        self.mean, self.deviation, self.seed = mean, deviation, 0
        self.drawing = torch.Generator(device)

    @property
    def held(self) -> int:
        """Bytes."""
        return self.memory.numel() * self.memory.itemsize

    def fill(self, numbers: Numbers) -> None:
        """With numbers that were not there before."""
        self.seed = int(torch.randint(1 << 62, (), generator=numbers, device=numbers.device))
        for k, piece in enumerate(self.pieces):
            piece.copy_(self.drawn(k))

    def drawn(self, k: int) -> Tensor:
        """What `fill` put into piece k."""
        fresh = torch.empty(self.pieces[k].numel(), dtype=self.memory.dtype, device=self.memory.device)
        return fresh.normal_(self.mean, self.deviation, generator=self.drawing.manual_seed(self.seed + k))

    def poison(self) -> None:
        """Every element becomes NaN: what an op must write."""
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    def check_guards(self, name: str) -> None:
        """Raise where something was written beside the tensors."""
        if not bool((torch.cat(self.guards) == GUARD).all()):
            raise WrongResultError(f"{name} wrote outside its operands")

    def check_as_drawn(self, name: str) -> None:
        """Raise where an operand that is only read is no longer what `fill` put there."""
        self.check_guards(name)
        pattern = PATTERNS[self.memory.itemsize]
        for k, piece in enumerate(self.pieces):
            if not torch.equal(piece.view(pattern), self.drawn(k).view(pattern)):
                raise WrongResultError(f"{name} wrote to an operand that it may only read")


def check(name: str, actual: Tensor, right: Tensor, terms: Tensor, rtol: float) -> None:
    """Raise where an element is further off than rounding to its storage and `rtol` of `terms`, what it is a sum of, allow.

    `right` and `terms` are in float64. What is NaN is off: nothing was written there, or no number.
    """
    kind = torch.finfo(actual.dtype)
    unit = torch.ldexp(torch.full_like(right, kind.eps / 2), right.frexp().exponent)  # in the last place of `right`
    error, allowed = (actual.double() - right).abs(), unit / 2 + rtol * terms + kind.tiny
    if bool((error <= allowed).all()):
        return
    if not bool(actual.isfinite().all()):
        raise WrongResultError(f"{name} left elements unwritten, or wrote what is no number")
    raise WrongResultError(f"{name} is wrong: {float((error / allowed).max()):.1e} times what is allowed")


@contextmanager
def results_in(blocks: Sequence[Block]) -> Iterator[None]:
    """What an op allocates for results like its operands is the tensor of the next block, which was poisoned, as it may be."""
    make, left = torch.empty_like, [block.tensors[0] for block in blocks]

    def empty_like(template: Tensor, *arguments: object, **options: object) -> Tensor:
        fits = left and template.shape == left[0].shape and template.dtype == left[0].dtype
        return left.pop(0) if fits else make(template, *arguments, **options)

    with mock.patch.object(torch, "empty_like", empty_like):
        yield
