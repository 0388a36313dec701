"""sign_vote: every home against the definition and against numpy's own packing, over sizes, layouts and numbers of voters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pysteep._ops.dispatch import extension
from pysteep._ops.sign_vote import MAX_VOTERS, bytes_of, counted, packed_rows
from pysteep.kernels.reference import sign_vote as reference
from pysteep.vote import count_votes, pack_signs
from tests.support.cases import DTYPES, cpu_homes, home_of, random_values, same_bits, special_values, surroundings

HOMES = [home for home in cpu_homes() if home != "cuda-on-host" or hasattr(extension, "pack_signs_cuda_on_host")]
SIZES = (0, 1, 3, 7, 8, 9, 31, 32, 33, 63, 65, 257, 513, 4097)
LARGE = 70001  # several chunks for each of two threads
VOTERS = (1, 2, 3, 6, 31, 300)


def signs_by_numpy(gradient, phase):
    """Written another way: +-1, zeros and NaN by turns, and numpy packs."""
    flat = gradient.double().numpy()
    turn = np.where((np.arange(flat.size) + phase) % 2 == 0, 1.0, -1.0)
    signs = np.where((flat == 0) | np.isnan(flat), turn, np.sign(flat))
    return torch.from_numpy(np.packbits(signs > 0, bitorder="little"))


@pytest.mark.parametrize("phase", [0, 1, -3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_packs_as_numpy_does(home, dtype, phase):
    for n in (*SIZES, LARGE) if phase == 1 and dtype == torch.float32 else SIZES:
        gradient = random_values((n,), dtype, wide=True, special=True)
        before = gradient.clone()
        with home_of(home) as backend:
            words = pack_signs(gradient, phase=phase, backend=backend)
        assert (words.dtype, words.shape) == (torch.uint8, (bytes_of(n),))
        assert torch.equal(words, signs_by_numpy(gradient, phase))
        assert same_bits(gradient, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_every_kind_of_number(home, dtype):
    values = special_values(dtype)
    with home_of(home) as backend:
        sent = [count_votes(pack_signs(values, phase=p, backend=backend)[None], len(values)).tolist() for p in (0, 1)]
    for j, value in enumerate(values.double().tolist()):
        turn = 1.0 if j % 2 == 0 else -1.0
        expected = float(np.sign(value))
        wanted = [expected, expected] if abs(expected) == 1 else [turn, -turn]
        assert [votes[j] for votes in sent] == wanted, value


@pytest.mark.parametrize("voters", VOTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_counts_the_majority(home, dtype, voters):
    for n in (*SIZES, LARGE) if voters == 6 and dtype == torch.float32 else SIZES:
        votes = 1 - 2 * torch.randint(0, 2, (voters, n))
        votes[:, : n // 3] = votes[:1, : n // 3]  # unanimous
        votes[voters // 2 :, n // 3 : n // 2] = -votes[: voters - voters // 2, n // 3 : n // 2]  # close
        words = torch.from_numpy(np.packbits(votes.numpy() > 0, axis=1, bitorder="little"))
        with home_of(home) as backend:
            result = count_votes(words, n, dtype=dtype, backend=backend)
        assert (result.dtype, result.shape) == (dtype, (n,))
        assert same_bits(result, votes.sum(0).sign().to(dtype))
        if voters % 2:
            assert (result != 0).all()


@pytest.mark.parametrize("home", HOMES)
def test_as_many_voters_as_there_may_be(home):
    up = torch.tensor([0, 1, MAX_VOTERS // 2, MAX_VOTERS // 2 + 1, MAX_VOTERS - 1, MAX_VOTERS])
    words = (torch.arange(MAX_VOTERS)[:, None] < up).numpy()
    words = torch.from_numpy(np.packbits(words, axis=1, bitorder="little"))
    with home_of(home) as backend:
        assert count_votes(words, 6, backend=backend).tolist() == [-1, -1, -1, 1, 1, 1]
        assert count_votes(words[:-1], 6, backend=backend).tolist() == [-1, -1, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_rows_and_unaligned_views(home, dtype):
    """Rows longer than their elements need are filled with 0; nothing around a view is written."""
    for rows, n, more in ((1, 77, 0), (3, 40, 3), (5, 13, 1), (2, 64, 16), (4, 0, 2)):
        owner = random_values((rows * n + 5,), dtype, special=True)
        gradient = owner[1 : 1 + rows * n].view(rows, n)
        row_bytes = bytes_of(n) + more
        expected = torch.empty(rows, row_bytes, dtype=torch.uint8)
        reference.pack_signs(gradient, expected, 1)
        with home_of(home) as backend:
            assert torch.equal(packed_rows(gradient, row_bytes, 1, backend), expected)
            moved = torch.full((rows * row_bytes + 7,), 7, dtype=torch.uint8)
            words = moved[3 : 3 + rows * row_bytes].view(rows, row_bytes).copy_(expected)
            result = torch.full((n + 3,), 7.0, dtype=dtype)[1 : 1 + n]
            around = surroundings(result)
            counted(words, result, backend)
        wanted = torch.empty(n, dtype=dtype)
        reference.count_votes(expected, wanted)
        assert same_bits(result, wanted)
        assert torch.equal(surroundings(result), around)


@pytest.mark.parametrize("home", HOMES)
def test_zeros_cancel(home):
    """Of two ranks within a step, and of one rank in two steps."""
    nothing = torch.zeros(101)
    with home_of(home) as backend:
        sent = [[pack_signs(nothing, phase=rank + step, backend=backend) for rank in range(3)] for step in range(2)]
        two = count_votes(torch.stack(sent[0][:2]), 101, backend=backend)
        three = [count_votes(torch.stack(votes), 101, backend=backend) for votes in sent]
    assert (two == 0).all()
    assert (three[0] == -three[1]).all()


@pytest.mark.parametrize("home", HOMES)
def test_any_layout(home):
    values = random_values((6, 5), torch.float32)
    lazy = torch.randn(30, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    with home_of(home) as backend:
        assert torch.equal(pack_signs(values.t(), backend=backend), signs_by_numpy(values.t().flatten(), 0))
        assert torch.equal(pack_signs(lazy, backend=backend), signs_by_numpy(lazy.clone(), 0))
        assert pack_signs(torch.tensor(-2.0), backend=backend).tolist() == [0]
        words = pack_signs(values, backend=backend)
        assert torch.equal(count_votes(torch.stack([words] * 3, 1).t(), 30, backend=backend), values.flatten().sign())


BAD_GRADIENTS = [
    (3.0, "gradient must be a torch.Tensor; got 3.0"),
    (torch.ones(2, dtype=torch.int32), "gradient must be float16.*got torch.int32"),
    (torch.ones(2, dtype=torch.complex64), "gradient must be float16.*got torch.complex64"),
    (torch.ones(2).to_sparse(), "gradient must be dense"),
]


@pytest.mark.parametrize(("gradient", "message"), BAD_GRADIENTS, ids=[case[1] for case in BAD_GRADIENTS])
def test_bad_gradients_are_named(gradient, message):
    with pytest.raises(TypeError, match=message):
        pack_signs(gradient)


def test_bad_arguments_are_named():
    words = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"phase must be an integer; got 0\.5"):
        pack_signs(torch.ones(3), phase=0.5)
    with pytest.raises(TypeError, match=r"words must be a uint8 tensor \[voters, bytes\]; got torch.int32 \(3, 2\)"):
        count_votes(words.int(), 3)
    with pytest.raises(TypeError, match=r"words must be a uint8 tensor .*; got torch.uint8 \(2,\)"):
        count_votes(words[0], 3)
    with pytest.raises(ValueError, match="words must have rows of 1 to 65535 voters; got 0"):
        count_votes(words[:0], 3)
    with pytest.raises(ValueError, match="numel must be an int from 0 to the 16 bits of a row of words; got 17"):
        count_votes(words, 17)
    with pytest.raises(TypeError, match=r"dtype must be float16, bfloat16, float32 or float64; got torch\.int8"):
        count_votes(words, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="backend must be one of"):
        pack_signs(torch.ones(3), backend="fast")
    with pytest.raises(RuntimeError, match="serves cpu tensors, not meta ones"):
        pack_signs(torch.ones(2, device="meta"), backend="numba")
