"""What the tests of ops on a GPU share: its homes, sizes, and whether it has the bits of the reference on a CPU."""

from __future__ import annotations

from tests.support.cases import same_bits

HOMES = ("cuda", "triton")
SIZES = (0, 1, 7, 513, 4099, 70001)


def on_gpu(operands):
    twin = operands.clone()
    for name in ("weights", "gradients", "balances"):
        setattr(twin, name, [t.cuda() for t in getattr(twin, name)])
    for name in ("factors", "momenta", "compensations"):
        setattr(twin, name, [[t.cuda() for t in own] for own in getattr(twin, name)])
    return twin


def check_bits(home, operands, **step):
    result = on_gpu(operands).step(home, **step)
    operands.step("reference", **step)
    assert all(same_bits(mine.cpu(), right) for mine, right in zip(result.written(), operands.written(), strict=True))
