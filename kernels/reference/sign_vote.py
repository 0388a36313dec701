"""Signs as bits, and the majority of them: the definition.

    bit_j  <- g_j > 0, or g_j is 0 or NaN and j + phase is even        8 of them a byte, the lowest bit first; 0 past the end
    vote_j <- sign(sum over voters of (2 bit_j - 1))                    1, -1, or 0 where as many bits are 1 as 0

Source: signSGD with majority vote (Bernstein et al., ICML 2018, ICLR 2019). A bit has no third state, so zeros take turns: with
the voter's number and the step in `phase`, those of an even number of voters cancel, and those of one cancel from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_signs(gradient: Tensor, words: Tensor, phase: int) -> None:
    """Write the signs of `gradient` [rows, n] to `words`, uint8 [rows, bytes] with 8 bytes >= n."""
    n, bits = gradient.shape[1], 8 * words.shape[1]
    turn = (torch.arange(n, device=gradient.device) + phase) % 2 == 0
    sent = (gradient > 0) | (~(gradient < 0) & turn)
    places = torch.arange(8, dtype=torch.uint8, device=gradient.device)
    words.copy_((pad(sent, (0, bits - n)).to(torch.uint8).unflatten(1, (-1, 8)) << places).sum(-1))


def count_votes(words: Tensor, result: Tensor) -> None:
    """Write to `result` [n] what the voters of `words`, uint8 [voters, bytes] with 8 bytes >= n, agree on."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.unsqueeze(-1) >> places & 1).flatten(1)[:, : len(result)]
    result.copy_((2 * bits.sum(0) - len(words)).sign())
