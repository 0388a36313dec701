"""Every tolerance of the tests, each stated once."""

import torch

POWER_ULPS = 4
"""|c|^(q-1) at general q, in units in the last place of the compute dtype. q in {1, 1.5, 2}: the same bits."""

EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
"""Half an ulp relative to the value: what rounding the result to its storage dtype once may cost."""

STEP_ROUNDINGS = 8
"""Operations of one step, each of which may round its result in the compute dtype."""

PEER_RTOL = 4e-6
"""Against a peer that computes the same float32 formula in another order, relative to the largest weight."""

SUM_RTOL = 1e-5
"""A sum of |c|^q over float32 values, whose terms are rounded to float32."""

MIRROR_ROUNDINGS = 24
"""Roundings of a step that rebuilds factors, for each factor: operations, and powers of four units in the last place."""

MIXED_RTOL = 5 * 2**-8
"""Weights after three small steps on gradients in bfloat16, relative to the largest: five of its roundings."""

CANCELLED = 1e-6
"""A mean of gradients so small beside the largest one that its sign is that of roundings in float32."""
