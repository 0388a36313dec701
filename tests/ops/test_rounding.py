"""Stochastic and compensated rounding in every home. The Triton home joins in under TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pysteep import functional
from pysteep.kernels.reference import rounding as reference
from pysteep.kernels.rounding import Rounding
from tests.support.cases import EXACT_QS, LAYOUTS, cpu_homes, home_of, laid_out, options, random_values, same_bits, surroundings
from tests.support.rounding_cases import DRAWS, MODES, MOMENTUM, SIXTEEN, SIZES, SPREAD, Operands, low_bits, step_of_shards
from tests.support.tolerances import EPS

HOMES = cpu_homes()
FAST_HOMES = [home for home in HOMES if home != "reference"]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


def check_bits(home, operands, **step):
    expected = operands.clone().step("reference", **step)
    operands.step(home, **step)
    assert all(map(same_bits, operands.written(), expected.written()))


def compiles_for_each(home: str) -> bool:
    """numba compiles a kernel for each of the arguments: there, what differs in what it rounds, once with each."""
    return home == "numba"


STEPS = [
    (home, dtype, q, betas)
    for home, dtype, q, betas in itertools.product(FAST_HOMES, SIXTEEN, EXACT_QS, ((0.0, 0.0), MOMENTUM))
    if q == 1.5 or not compiles_for_each(home) or (dtype == torch.bfloat16 and betas == (0.0, 0.0))
]
KINDS = ((1, 1), (3, 3), (17, 17), (2, 2), (2, 10))
FACTORS = [
    (home, dtype, *kind)
    for home, dtype, kind in itertools.product(FAST_HOMES, SIXTEEN, KINDS)
    if not compiles_for_each(home) or (kind in ((17, 17), (2, 2)) or (kind == (1, 1) and dtype == torch.bfloat16))
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])
@pytest.mark.parametrize(("home", "dtype", "q", "betas"), STEPS, ids=str)
def test_steepest_step_has_the_bits_of_the_reference(home, mode, dtype, q, betas):
    operands = Operands("steepest_step", dtype, betas=betas, rounding=mode["rounding"])
    check_bits(home, operands, q=q, betas=betas, **mode)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])
@pytest.mark.parametrize(("home", "dtype", "stored", "depth"), FACTORS, ids=str)
def test_factor_step_has_the_bits_of_the_reference(home, mode, dtype, stored, depth):
    betas = MOMENTUM if depth != 3 else (0.0, 0.0)
    sizes = SIZES if depth < 17 else (513, 0, 7)
    operands = Operands("factor_step", dtype, sizes, stored=stored, betas=betas, rounding=mode["rounding"])
    check_bits(home, operands, depth=depth, q=1.5, betas=betas, **mode)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])
@pytest.mark.parametrize("home", FAST_HOMES)
def test_mirror_step_has_nearly_the_bits_of_the_reference(home, mode, dtype):
    """The float32 that is rounded differs by a few units in the last place, so that few of its 16-bit roundings differ."""
    operands = Operands("mirror_step", dtype, rounding=mode["rounding"])
    before = operands.clone()
    expected = operands.clone().step("reference", depth=3, **mode)
    operands.step(home, depth=3, **mode)
    for w, other, old in zip(operands.weights, expected.weights, before.weights, strict=True):
        differ = (w != other) & ~(w.isnan() & other.isnan())
        assert float(differ.double().sum()) <= 1 + 0.01 * len(w)
        size = torch.maximum(old.double().abs(), other.double().abs())
        assert ((w.double() - other.double()).abs() <= 2 * EPS[dtype] * size)[differ].all()


@pytest.mark.parametrize("home", HOMES)
def test_a_wider_state_beside_16_bits(home):
    """float32 factors of a bfloat16 x: nothing is rounded but x, whatever the mode."""
    results = []
    for mode in ({}, {"rounding": "compensated"}, DRAWS):
        torch.manual_seed(1)
        operands = Operands("factor_step", torch.bfloat16, stored=2, rounding="nearest")
        operands.factors = [[w.float() for w in own] for own in operands.factors]
        if mode.get("rounding") == "compensated":
            operands.compensations = [[None, None] for _ in operands.factors]
        operands.step(home, depth=5, **mode)
        results.append([*operands.weights, *(w for own in operands.factors for w in own)])
    assert all(map(same_bits, results[0], results[1]))
    assert all(map(same_bits, results[0], results[2]))


@pytest.mark.parametrize("home", HOMES)
def test_compensated_bfloat16_is_float32(home):
    """Bit for bit, over many steps: the weight and its compensation are the two halves of the float32."""
    n = 1000
    w = torch.randn(n).bfloat16()
    wide, low = w.float(), torch.zeros(n, dtype=torch.int16)
    for _ in range(20):
        g = torch.randn(n).bfloat16()
        step = options(q=1.5, lr=1e-3)
        with home_of(home) as backend:
            functional.steepest_step([w], [g], **step, rounding="compensated", compensations=[low], backend=backend)
            functional.steepest_step([wide], [g.float()], **step, backend=backend)
        assert torch.equal(reference.widen_compensated(w, low), wide)
    assert torch.equal(w, reference.round_compensated(wide, torch.bfloat16)[0])


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_what_is_split_is_joined(dtype):
    x = torch.cat([random_values((5000,), torch.float32, wide=True), SPREAD])
    x = x[(x.abs() >= 2.0**-17) | (x == 0) | x.isnan()] if dtype == torch.float16 else x
    high, low = reference.round_compensated(x, dtype)
    assert same_bits(reference.widen_compensated(high, low), x)
    nearest = x.to(dtype)
    same = (high == nearest) | x.isnan()
    tie = (x.double() - high.double()).abs() == (x.double() - nearest.double()).abs()
    assert (same | tie).all()


@pytest.mark.parametrize("home", HOMES)
def test_a_weight_set_to_0_forgets_its_compensation(home):
    """Pruned, say: what is left of the number before must not come back."""
    for left in (-32768, -1, 0, 1, 32767):
        w, low = torch.zeros(9, dtype=torch.bfloat16), torch.full((9,), left, dtype=torch.int16)
        with home_of(home) as backend:
            step = {"lr": 0.5, "q": 2.0, "rounding": "compensated", "compensations": [low], "backend": backend}
            functional.steepest_step([w], [torch.ones(9, dtype=torch.bfloat16)], **step)
        assert (w == -0.5).all()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_stochastic_rounding_is_unbiased(home, dtype):
    """The mean of many draws of one number is within four standard errors of it, for normal and subnormal numbers."""
    n = 10**6 if home != "triton" else 10**5  # that is an interpreter
    last = torch.finfo(dtype).eps
    for k, (start, part) in enumerate(
        [(1.0, 0.3), (-0.75, 0.9), (2.0**-13, 0.01), (2.0**-15 if last > 2**-10 else 2.0**-20, 0.4)]
    ):
        w = torch.full((n,), start, dtype=dtype)
        unit = float(torch.nextafter(w[0].abs().double().to(dtype), torch.tensor(float("inf"), dtype=dtype)) - w[0].abs())
        move = np.float32(part * unit)
        exact = float(np.float32(start) - move)
        with home_of(home) as backend:
            step = {"lr": float(move), "q": 1.0, "rounding": "stochastic", "seed": 5, "step": k, "backend": backend}
            functional.steepest_step([w], [torch.ones(n, dtype=dtype)], **step)
        values = w.double()
        assert len(values.unique()) == 2
        spread = float(values.std()) / n**0.5
        assert abs(float(values.mean()) - exact) <= 4 * spread


@pytest.mark.parametrize("home", FAST_HOMES)
def test_draws_differ_by_seed_step_tensor_and_element(home):
    def draw(seed=0, step=0, tensors=1):
        w = [torch.ones(999, dtype=torch.bfloat16) for _ in range(tensors)]
        g = [torch.ones(999, dtype=torch.bfloat16) for _ in range(tensors)]
        with home_of(home) as backend:
            how = {"rounding": "stochastic", "seed": seed, "step": step, "backend": backend}
            functional.steepest_step(w, g, lr=2.0**-9, **how)
        return [(t == 1).double() for t in w]

    first, other_tensor = draw(tensors=2)
    others = [other_tensor, draw(seed=1)[0], draw(seed=2**32)[0], draw(step=1)[0], first.roll(1)]
    assert torch.equal(first, draw()[0])
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.15


@pytest.mark.parametrize("home", FAST_HOMES)
def test_shards_draw_the_numbers_of_the_whole(home):
    """Wherever they are cut, and far into a parameter."""
    start, cuts = 2**38 + 5, (0, 8195, 16390, 25003)
    w, g = (random_values((cuts[-1],), torch.bfloat16) for _ in range(2))
    shards, gradients = ([t[a:b].clone() for a, b in itertools.pairwise(cuts)] for t in (w, g))
    draws = {"mode": "stochastic", "seed": 2**40 + 3, "step": 17.0}
    step_of_shards("reference", [w], [g], Rounding(**draws, streams=[2**32 - 1], firsts=[start]))
    firsts = [start + cut for cut in cuts[:-1]]
    step_of_shards(home, shards, gradients, Rounding(**draws, streams=[2**32 - 1] * 3, firsts=firsts))
    assert same_bits(torch.cat(shards), w)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("home", FAST_HOMES)
def test_the_norm_is_that_of_compensated_weights(home, momentum):
    """With coupled decay and no gradient the direction is the weight, here 2^-9 above what is stored."""
    results = []
    for each in ("reference", home):
        w, low = torch.ones(9000, dtype=torch.bfloat16), torch.full((9000,), 2**14, dtype=torch.int16)
        m, betas = ([torch.zeros_like(w)], (0.5, 0.5)) if momentum else (None, (0.0, 0.0))
        step = {"lr": 1e-5, "q": 1.7, "betas": betas, "coupled_weight_decay": 1.0, "normalize": True, "rounding": "compensated"}
        with home_of(each) as backend:
            functional.steepest_step([w], [torch.zeros_like(w)], m, **step, compensations=[low], backend=backend)
        results.append(1 + 2.0**-9 - reference.widen_compensated(w, low).double())
    assert float(results[0][0]) > 0
    assert torch.allclose(results[1], results[0], rtol=1e-4, atol=0)


def test_the_noise_is_that_of_philox():
    """Element e has bits of word e / 2 % 4 of the block of its counter; blocks do not depend on where a shard begins."""
    zeros = [np.zeros(1, np.uint64)] * 4  # the known answer of Random123, philox4x32-7
    assert [hex(int(word[0])) for word in reference.philox(zeros, 0)] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]
    draws = {"seed": 7, "step": 3, "stream": 2, "role": 1}
    whole = reference.noise(0, 1000, **draws)
    assert torch.equal(reference.noise(333, 500, **draws), whole[333:833])
    words = reference.philox([np.array([k], np.uint64) for k in (1, 1 << 16, 3, 2)], 7)
    assert [int(words[k][0]) & 0xFFFF for k in range(4)] == whole[16:24:2].tolist()
    assert [int(words[k][0]) >> 16 for k in range(4)] == whole[17:24:2].tolist()
    assert torch.equal(whole[24:32], 0xFFFF - whole[16:24])
    far = reference.noise(2**40 + 5, 19, **draws)
    assert torch.equal(reference.noise(2**40, 24, **draws)[5:], far)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, mode, layout):
    """Any dense layout: the same as the flat tensor of its elements in memory order; other memory stays as it is."""
    values, gradient = (random_values((3, 5, 4, 6), torch.bfloat16) for _ in range(2))
    w, g = laid_out(values, layout), laid_out(gradient, "contiguous")
    around = surroundings(w)
    low = laid_out(low_bits(values), layout)
    step = {**options(), **mode}
    own = {"compensations": [low]} if mode["rounding"] == "compensated" else {}
    dense = layout in ("channels_last", "transposed")
    order = sorted(range(4), key=lambda d: -w.stride(d)) if dense else [0, 1, 2, 3]
    flat = {k: [t[0].permute(order).reshape(-1).clone()] for k, t in own.items()}
    w_flat, g_flat = (t.permute(order).reshape(-1).clone() for t in (w, g))
    with home_of(home) as backend:
        functional.steepest_step([w], [g], **step, **own, backend=backend)
        functional.steepest_step([w_flat], [g_flat], **step, **flat, backend=backend)
    assert same_bits(w.permute(order).reshape(-1), w_flat)
    assert torch.equal(surroundings(w), around)
    if own:
        assert torch.equal(low.permute(order).reshape(-1), flat["compensations"][0])


@pytest.mark.parametrize("home", HOMES)
def test_decay_of_a_ten_thousandth(home):
    """1000 steps from 1.0 end at 0.905, where rounding to the nearest leaves 1.0."""
    ends = {}
    for mode in ("nearest", "stochastic", "compensated"):
        w, low = torch.ones(4000, dtype=torch.bfloat16), torch.zeros(4000, dtype=torch.int16)
        g = torch.zeros(4000, dtype=torch.bfloat16)
        buffers = {"compensations": [low]} if mode == "compensated" else {}
        with home_of(home) as backend:
            for k in range(1000):
                how = {"rounding": mode, "step": k, "backend": backend, **buffers}
                functional.steepest_step([w], [g], lr=1e-3, weight_decay=0.1, **how)
        ends[mode] = float(w.double().mean())
    assert ends["nearest"] == 1.0
    assert abs(ends["stochastic"] - 0.905) <= 0.002
    assert abs(ends["compensated"] - 0.905) <= 0.002


@pytest.mark.parametrize("op", ["steepest_step", "factor_step", "mirror_step"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])
@pytest.mark.parametrize("home", HOMES)
def test_found_inf_writes_nothing(home, mode, op):
    """Also where a compensation is left of another number, and is not what would be stored of this one."""
    for dtype in SIXTEEN:
        betas = MOMENTUM if op != "mirror_step" else (0.0, 0.0)
        operands = Operands(op, dtype, stored=2, betas=betas, rounding=mode["rounding"])
        before = operands.clone()
        depth = {"depth": 5} if op != "steepest_step" else {}
        operands.step(home, betas=betas, found_inf=torch.ones(()), **depth, **mode)
        assert all(map(same_bits, operands.written(), before.written()))


BAD = [
    ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic, compensated; got 'up'"),
    ({"rounding": "stochastic", "seed": -1}, ValueError, "seed must be an int from 0"),
    ({"rounding": "stochastic", "step": 0.5}, ValueError, "step must be a whole number"),
    ({"rounding": "compensated"}, ValueError, "compensations must hold one entry"),
    ({"rounding": "compensated", "compensations": [None]}, TypeError, "must be an int16 tensor"),
    ({"rounding": "compensated", "compensations": [torch.zeros(4)]}, TypeError, "compensation 0 must be torch.int16"),
    ({"rounding": "compensated", "compensations": [torch.zeros(5, dtype=torch.int16)]}, ValueError, "shape"),
    ({"compensations": [torch.zeros(4, dtype=torch.int16)]}, ValueError, "compensations must be None with rounding 'nearest'"),
]


@pytest.mark.parametrize(("how", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_options(how, error, message):
    w = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(error, match=message):
        functional.steepest_step([w], [torch.ones_like(w)], lr=1.0, **how)
    assert (w == 1).all()


def test_int16_is_no_dtype_of_momenta():
    w, m = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16)
    with pytest.raises(TypeError, match="momentum 0 must be float16, bfloat16"):
        functional.steepest_step([w], [torch.ones_like(w)], [m], lr=1.0, betas=MOMENTUM)
