"""Every home of mirror_step against the definition. The Triton home joins in under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from pysteep import functional
from pysteep.kernels.reference import mirror_step as reference
from tests.support.cases import DTYPES, LAYOUTS, QS, cpu_homes, home_of, laid_out, random_values, same_bits, surroundings
from tests.support.mirror_cases import BALANCES, balance, exact_step
from tests.support.tolerances import EPS, MIRROR_ROUNDINGS

HOMES = cpu_homes()
FAST_HOMES = [home for home in HOMES if home != "reference"]
SIZES = (0, 1, 7, 511, 513, 16385, 40001)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


def options(**changes):
    return {"depth": 3, "lr": 0.01, "q": 1.0, "weight_decay": 0.3, **changes}


def run(home, weights, gradients, balances, **step):
    with home_of(home) as backend:
        functional.mirror_step(weights, gradients, balances, **step, backend=backend)


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_against_float64(home, dtype, q, depth):
    """x is rounded once; its change is right to a few units in the last place of what it is a sum of."""
    if home == "numba" and dtype == torch.float64 and q not in (1.0, 1.7):
        pytest.skip("each compiles for seconds; float32 has them all")
    for weight_decay in (0.0, 0.3):
        check_against_float64(home, dtype, options(q=q, depth=depth, weight_decay=weight_decay))


def check_against_float64(home, dtype, step):
    weights = [random_values((1500,), dtype) for _ in BALANCES]
    gradients = [random_values((1500,), dtype, wide=True) for _ in BALANCES]
    for x, g in zip(weights, gradients, strict=True):
        x[::7], g[::11] = 0.0, 0.0
    updated = [x.clone() for x in weights]
    run(home, updated, gradients, [balance(lam) for lam in BALANCES], **step)
    depth = step["depth"]
    eps = EPS[dtype]
    for x, g, new, lam in zip(weights, gradients, updated, BALANCES, strict=True):
        expected, size, error = exact_step(x, g, lam, **step)
        bound = eps * torch.maximum(expected.abs(), x.double().abs()) + MIRROR_ROUNDINGS * depth * eps * size + error
        underflow = 1e-33 if dtype == torch.float32 else 1e-290
        assert bool(((new.double() - expected).abs() <= 1.01 * bound + underflow).all())
        if step["weight_decay"] == 0:
            assert torch.equal(new[::11], x[::11])


@pytest.mark.parametrize("depth", [17, 64])
@pytest.mark.parametrize("home", FAST_HOMES)
def test_great_depth(home, depth):
    x, g = random_values((2000,), torch.float64), random_values((2000,), torch.float64)
    for lam in (0.0, 0.1, 1.5):
        step = options(q=1.25, depth=depth, lr=1e-4)
        updated = x.clone()
        run(home, [updated], [g], [balance(lam)], **step)
        expected, size, error = exact_step(x, g, lam, **step)
        bound = EPS[torch.float64] * (expected.abs() + MIRROR_ROUNDINGS * depth * size) + error
        assert bool(((updated - expected).abs() <= 1.01 * bound).all())


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_weights_and_balances_whose_powers_nearly_vanish(home, q):
    """y^(L-1) is a number still, products of it in the search for y are not; rows of every size beside zeros."""
    x = random_values((2000,), torch.float32) * 10 ** torch.empty(2000).uniform_(-36, 0)
    x[::5] = 0.0
    g = random_values((2000,), torch.float32)
    step = options(q=q, depth=6, weight_decay=0.1)
    for lam in (1e-6, 1e-5):
        updated = x.clone()
        run(home, [updated], [g], [balance(lam)], **step)
        expected, size, error = exact_step(x, g, lam, **step)
        rounding = EPS[torch.float32] * torch.maximum(expected.abs(), x.double().abs())
        bound = rounding + MIRROR_ROUNDINGS * 6 * EPS[torch.float32] * size + error
        assert bool(((updated.double() - expected).abs() <= 1.01 * bound + 1e-44).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_16_bit_weights_are_computed_in_float32(home, dtype):
    x, g = random_values((5000,), dtype), random_values((5000,), dtype)
    wide = x.float()
    run(home, [wide], [g.float()], [balance(0.2)], **options(q=1.5))
    run(home, [x], [g], [balance(0.2)], **options(q=1.5))
    assert same_bits(x, wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_saddle_and_special_values(home, dtype):
    """At x = 0 the step is that of w_1 alone; NaN stays NaN; nothing else becomes one."""
    x = torch.tensor([0.0, -0.0, 0.0, float("nan"), 1.0, 1.0], dtype=dtype)
    g = torch.tensor([1.0, -2.0, 0.0, 1.0, float("nan"), 0.5], dtype=dtype)
    run(home, [x], [g], [balance(0.25)], depth=3, lr=0.5, q=1.0)
    assert x[:3].tolist() == [-0.5 * 0.25**2, 0.5 * 0.25**2, 0.0]
    assert x.isnan().tolist() == [False, False, False, True, True, False]
    y = torch.zeros(3, dtype=dtype)
    run(home, [y], [torch.ones(3, dtype=dtype)], [balance(0.0)], depth=2, lr=0.5, q=1.5)
    assert y.tolist() == [0.0, 0.0, 0.0], "balance 0 at x = 0: both factors are 0 and nothing moves"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, layout):
    values = [random_values((3, 5, 4, 7), torch.float32) for _ in range(2)]
    x, g = laid_out(values[0], layout), laid_out(values[1], LAYOUTS[LAYOUTS.index(layout) - 1])
    around, expected = surroundings(x), values[0].clone()
    run(home, [x], [g], [balance(0.1)], **options(q=1.5))
    run(home, [expected], [values[1]], [balance(0.1)], **options(q=1.5))
    assert same_bits(x, expected)
    assert torch.equal(around, surroundings(x))
    assert torch.equal(g, values[1])


@pytest.mark.parametrize("home", HOMES)
def test_many_tensors_each_with_its_balance(home):
    sizes = [i % 41 for i in range(200)]
    weights, gradients = ([random_values((n,), torch.float32) for n in sizes] for _ in range(2))
    balances = [balance(0.01 * (i % 7)) for i in range(200)]
    alone = [x.clone() for x in weights]
    run(home, weights, gradients, balances, **options())
    for i in range(0, 200, 20):
        own = balance(0.01 * (i % 7))
        run(home, [alone[i]], [gradients[i]], [own], **options())
        assert same_bits(alone[i], weights[i])
        assert own == balances[i]


@pytest.mark.parametrize("home", HOMES)
def test_balance_follows_lemma_4_5(home):
    lam = balance(0.3)
    x, idle, other = torch.ones(4), torch.ones(4), balance(0.3)
    run(home, [x, idle], [torch.ones(4), None], [lam, other], depth=3, lr=0.1, q=1.5, weight_decay=0.2)
    assert lam.item() == pytest.approx(0.3 * (1 - 0.1 * 0.2) ** 1.5, rel=1e-15)
    assert other.item() == 0.3
    assert idle.tolist() == [1.0] * 4
    run(home, [x, idle], [None, None], [lam, other], depth=3, lr=0.1, q=1.5, weight_decay=0.2)
    assert other.item() == 0.3
    assert idle.tolist() == [1.0] * 4


@pytest.mark.parametrize("home", HOMES)
def test_balance_follows_without_elements_and_rests_without_gradients(home):
    """However the weights beside it are laid out."""
    for other in (torch.ones(3), torch.ones(3, 2)[:, 0]):
        empty, lam = torch.empty(0), balance(0.3)
        run(home, [empty, other], [torch.empty(0), torch.ones(3)], [lam, balance(0.3)], **options(q=1.5))
        assert lam.item() == pytest.approx(0.3 * (1 - 0.01 * 0.3) ** 1.5, rel=1e-15)
    lam = balance(0.3)
    run(home, [torch.ones(3)], [None], [lam], **options())
    run(home, [], [], [], **options())
    assert lam.item() == 0.3


@pytest.mark.parametrize("home", HOMES)
def test_numbers_in_tensors_maximize_and_found_inf(home):
    x, g = random_values((1000,), torch.float32), random_values((1000,), torch.float32)
    expected, lam = x.clone(), balance(0.1)
    run(home, [expected], [g], [lam], **options(q=1.5))
    updated, other = x.clone(), balance(0.1)
    numbers = {"lr": torch.tensor(0.01, dtype=torch.float64), "grad_scale": torch.tensor([1024.0]), "maximize": True}
    step = options(q=1.5) | numbers
    run(home, [updated], [-1024 * g], [other], **step, found_inf=torch.tensor(1.0))
    assert same_bits(updated, x)
    assert other.item() == 0.1
    run(home, [updated], [-1024 * g], [other], **step, found_inf=torch.tensor(0.0))
    assert same_bits(updated, expected)
    assert other == lam


@pytest.mark.parametrize("home", [home for home in FAST_HOMES if home != "triton"])
def test_number_of_threads_changes_no_bit(home):
    weights, gradients = ([random_values((n,), torch.float32) for n in (100_003, 5, 70_000)] for _ in range(2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            updated = [x.clone() for x in weights]
            run(home, updated, gradients, [balance(0.1) for _ in updated], **options(q=1.7))
            results.append(updated)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_first_order_in_lr(q, depth):
    """Against factors that are kept: ten times smaller steps, a deviation at least seven times smaller.

    Over the mean of the coordinates: at q = 1 each ends by stepping to and fro around its target, by lr and out of phase.
    """
    start, target = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    deviations = []
    for lr in (4e-3, 4e-4):
        x, lam = start.clone(), balance(0.3)
        factors = [[w.clone() for w in reference.balanced_factors(start, q, depth, 0.3)]]
        explicit = [start.clone()]
        step = {"depth": depth, "lr": lr, "q": q, "weight_decay": 0.5}
        for _ in range(round(1 / lr)):
            functional.mirror_step([x], [x - target], [lam], **step)
            functional.factor_step(explicit, [explicit[0] - target], factors, **step)
        deviations.append((x - explicit[0]).abs().mean().item())
    assert deviations[1] < deviations[0] / 7


X, G = torch.ones(3), torch.ones(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, "depth must be an int from 2 to 64; got 1"),
        ({"depth": 2.5}, "depth must be an int from 2 to 64; got 2.5"),
        ({"depth": 65}, "depth must be an int from 2 to 64; got 65"),
        ({"balances": [balance(-0.1)]}, "balance 0 must be a finite number >= 0; got -0.1"),
        ({"balances": [balance(float("nan"))]}, "balance 0 must be a finite number >= 0; got nan"),
        ({"balances": [torch.tensor(0.1)]}, "balance 0 must be a float64 tensor of one element"),
        ({"balances": []}, "balances must hold one entry for each of the 1 params; got 0"),
        ({"grads": [torch.ones(4)]}, "gradient 0 must have its param's shape"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0; got -1.0"),
    ],
    ids=str,
)
def test_bad_input_is_named_and_nothing_written(changes, message):
    with pytest.raises(ValueError, match=message):
        functional.mirror_step(**{"params": [X], "grads": [G], "balances": [balance(0.1)], "depth": 3, "lr": 0.1, **changes})
    assert X.tolist() == [1.0] * 3


def test_wrong_kinds_of_tensors_are_named():
    for changes, message in (
        ({"params": [torch.ones(3, dtype=torch.complex64)]}, "param 0 must be real; got torch.complex64"),
        ({"balances": [0.1]}, "balance 0 must be a torch.Tensor; got 0.1"),
    ):
        with pytest.raises(TypeError, match=message):
            functional.mirror_step(
                **{"params": [X], "grads": [G], "balances": [balance(0.1)], "depth": 3, "lr": 0.1, **changes}
            )
