"""Every home of factor_step against the definition. The Triton home joins in under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from pysteep import functional
from pysteep.kernels.reference import factor_step as reference
from tests.support.cases import (
    DTYPES,
    EXACT_QS,
    GENERAL_QS,
    LAYOUTS,
    cpu_homes,
    home_of,
    laid_out,
    options,
    random_values,
    same_bits,
    surroundings,
)
from tests.support.tolerances import EPS, POWER_ULPS

HOMES = cpu_homes()
FAST_HOMES = [home for home in HOMES if home != "reference"]
SIZES = (0, 1, 7, 64, 511, 513, 4099)
MOMENTUM = (0.9, 0.99)
# (factors stored, depth): full, and tied.
KINDS = ((1, 1), (2, 2), (3, 3), (10, 10), (17, 17), (64, 64), (2, 3), (2, 4), (2, 10), (2, 33), (2, 66), (2, 1000))
# Every q and both momenta at float32, the others' conversions once with each power that rounds differently.
EXACT = [(torch.float32, q, betas) for q in EXACT_QS for betas in ((0.0, 0.0), MOMENTUM)]
EXACT += [(dtype, q, betas) for dtype in DTYPES for q, betas in ((1.0, (0.0, 0.0)), (1.5, MOMENTUM)) if dtype != torch.float32]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


class Operands:
    """Random weights, gradients, factors and, if `betas` ask for them, momenta; factors and momenta by weight."""

    def __init__(self, sizes, stored, betas=(0.0, 0.0), dtype=torch.float32, **how):
        def values():
            return [random_values((n,), dtype, **how) for n in sizes]

        self.weights, self.gradients = values(), values()
        self.factors = list(map(list, zip(*(values() for _ in range(stored)), strict=True)))
        self.momenta = list(map(list, zip(*(values() for _ in range(stored)), strict=True))) if any(betas) else []

    def written(self):
        return [*self.weights, *(t for own in (*self.factors, *self.momenta) for t in own)]

    def clone(self):
        twin = object.__new__(Operands)
        twin.weights, twin.gradients = ([t.clone() for t in role] for role in (self.weights, self.gradients))
        twin.factors, twin.momenta = ([[t.clone() for t in own] for own in role] for role in (self.factors, self.momenta))
        return twin

    def step(self, home, depth, **step):
        with home_of(home) as backend:
            functional.factor_step(
                self.weights, self.gradients, self.factors, self.momenta, depth=depth, **options(**step), backend=backend
            )
        return self


def check_bits(home, operands, depth, **step):
    expected = operands.clone().step("reference", depth, **step)
    untouched = [g.clone() for g in operands.gradients]
    operands.step(home, depth, **step)
    assert all(map(same_bits, operands.written(), expected.written()))
    assert all(map(same_bits, operands.gradients, untouched))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "q", "betas"), EXACT, ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_same_bits_as_the_reference(home, dtype, q, betas, kind):
    stored, depth = kind
    sizes = SIZES if depth < 17 else (513, 0, 7)
    check_bits(home, Operands(sizes, stored, betas, dtype, special=True), depth, q=q, betas=betas)


@pytest.mark.parametrize("kind", [(3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_same_bits_without_decay_ascending(home, kind):
    """Without coupled decay the factor must not enter its gradient: 0 * inf would."""
    stored, depth = kind
    plain = {"weight_decay": 0.0, "coupled_weight_decay": 0.0}
    operands = Operands(SIZES, stored, special=True)
    check_bits(home, operands, depth, **plain)
    ascended, negated = operands.clone(), operands.clone()
    negated.gradients = [-g for g in negated.gradients]
    with home_of(home) as backend:
        for twin, maximize in ((ascended, True), (negated, False)):
            arguments = (twin.weights, twin.gradients, twin.factors)
            functional.factor_step(*arguments, depth=depth, maximize=maximize, **options(**plain), backend=backend)
    assert all(map(same_bits, ascended.written(), negated.written()))


@pytest.mark.parametrize("betas", [(0.0, 0.0), MOMENTUM], ids=str)
@pytest.mark.parametrize("kind", [(3, 3), (2, 10)], ids=str)
@pytest.mark.parametrize("q", GENERAL_QS)
@pytest.mark.parametrize("home", HOMES)
def test_general_power(home, q, kind, betas):
    """The gradients of the factors have the same bits, so factors differ by what the power may."""
    stored, depth = kind
    operands = Operands((1, 513, 9001), stored, betas)
    exact = operands.clone()
    for role in (exact.weights, exact.gradients):
        role[:] = [t.double() for t in role]
    operands.step(home, depth, q=q, betas=betas)
    twin = Operands((1,), stored)
    twin.weights, twin.gradients, twin.factors, twin.momenta = exact.weights, exact.gradients, exact.factors, exact.momenta
    for role in (twin.factors, twin.momenta):
        role[:] = [[t.double() for t in own] for own in role]
    before = twin.clone()
    twin.step("reference", depth, q=q, betas=betas)
    eps = EPS[torch.float32]
    for i, own in enumerate(operands.factors):
        for w, expected, start in zip(own, twin.factors[i], before.factors[i], strict=True):
            moved = (expected - start).abs()
            # Products of up to 10 factors know c to 2 depth roundings of its terms; where those cancel u is less certain.
            close = (w.double() - expected).abs() <= 2 * eps * expected.abs() + (2 * depth + 2 * POWER_ULPS) * 4 * eps * moved
            assert close.float().mean() > 0.99
        product = reference.product_of([w.double() for w in own], depth)
        underflow = 1e-30  # below it a power of a small factor has lost digits on the way
        assert bool(((operands.weights[i].double() - product).abs() <= 2 * depth * eps * product.abs() + underflow).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, layout):
    """Any layout gives the contiguous result, and memory that the tensors do not own keeps its bytes."""
    others = [LAYOUTS[(LAYOUTS.index(layout) + k) % len(LAYOUTS)] for k in range(4)]
    values = [random_values((3, 5, 4, 7), torch.float32) for _ in range(5)]
    x, g, *factors = (laid_out(v, at) for v, at in zip(values, (layout, *others), strict=True))
    expected, _, *expected_factors = (v.clone() for v in values)
    written = [x, *factors]
    around = [surroundings(t) for t in written]
    step = options(q=1.5)
    with home_of(home) as backend:
        functional.factor_step([x], [g], [factors], depth=3, **step, backend=backend)
        functional.factor_step([expected], [values[1]], [expected_factors], depth=3, **step, backend=backend)
    assert all(map(same_bits, written, [expected, *expected_factors]))
    assert all(map(torch.equal, around, map(surroundings, written)))
    assert torch.equal(g, values[1])


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", [home for home in FAST_HOMES if home != "numba"])
def test_any_mixture_of_dtypes(home, dtype, gradient_dtype, factor_dtype):
    check_mixture(home, dtype, gradient_dtype, factor_dtype)


def test_mixture_of_dtypes_by_numba():
    """The same code lays them out for every home; a mixture compiles kernels of its own there."""
    check_mixture("numba", torch.bfloat16, torch.float32, torch.float32)


def check_mixture(home, dtype, gradient_dtype, factor_dtype):
    operands = Operands((5, 0, 1000), 2, MOMENTUM, dtype)
    operands.gradients = [g.to(gradient_dtype) for g in operands.gradients]
    operands.factors = [[t.to(factor_dtype) for t in own] for own in operands.factors]
    operands.momenta[0][1] = operands.momenta[0][1].to(factor_dtype)  # a single one unlike the others
    check_bits(home, operands, 4, q=1.5, betas=MOMENTUM)


@pytest.mark.parametrize("home", FAST_HOMES)
def test_thousands_of_tensors_in_a_call(home):
    check_bits(home, Operands([i % 41 for i in range(2500)], 2, special=True), 3, q=1.0)


@pytest.mark.parametrize("home", HOMES)
def test_x_is_written_but_not_read(home):
    operands = Operands((40001, 3), 3)
    expected = operands.clone().step(home, 3)
    for x in operands.weights:
        x.fill_(torch.nan)
    operands.step(home, 3)
    assert all(map(same_bits, operands.written(), expected.written()))


@pytest.mark.parametrize("home", HOMES)
def test_zeros_are_exact(home):
    """A factor of 0 is no division by 0: its own gradient is the product of the others, theirs are 0."""
    factors = [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0]), torch.tensor([5.0, 7.0, 11.0])]
    x = torch.empty(3)
    with home_of(home) as backend:
        functional.factor_step([x], [torch.ones(3)], [factors], depth=3, lr=0.5, q=2.0, backend=backend)
    assert factors[0].tolist() == [2.0, 0.0 - 0.5 * 21.0, 0.0]
    assert factors[1].tolist() == [0.0 - 0.5 * 10.0, 3.0, 0.0]
    assert factors[2].tolist() == [5.0, 7.0, 11.0]
    assert x.tolist() == [2.0 * -5.0 * 5.0, -10.5 * 3.0 * 7.0, 0.0]


@pytest.mark.parametrize("home", HOMES)
def test_0_dim_empty_and_absent(home):
    weights = [torch.tensor(2.0), torch.empty(0), torch.ones(3), torch.empty(0, 4)]
    gradients = [torch.tensor(-3.0), torch.empty(0), None, torch.empty(0, 4)]
    factors = [[w.clone(), torch.ones_like(w)] for w in weights]
    plain = {"lr": 0.5, "weight_decay": 0.0, "coupled_weight_decay": 0.0}
    with home_of(home) as backend:
        functional.factor_step(weights, gradients, factors, depth=2, **plain, backend=backend)
        functional.factor_step([], [], [], depth=2, **plain, backend=backend)
    assert [t.item() for t in factors[0]] == [2.5, 1.5]
    assert weights[0].item() == 2.5 * 1.5
    assert weights[2].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("home", HOMES)
def test_numbers_in_tensors_and_found_inf(home):
    operands = Operands((1000,), 2, MOMENTUM)
    expected = operands.clone().step(home, 4, q=1.5, betas=MOMENTUM)
    scaled = operands.clone()
    scaled.gradients = [g * 1024 for g in scaled.gradients]
    before = scaled.clone()
    step = options(q=1.5, betas=MOMENTUM, lr=torch.tensor(0.05, dtype=torch.float64))
    with home_of(home) as backend:
        for found_inf in (1.0, 0.0):
            functional.factor_step(
                scaled.weights, scaled.gradients, scaled.factors, scaled.momenta, depth=4, **step,
                grad_scale=torch.tensor([1024.0]), found_inf=torch.tensor(found_inf), backend=backend,
            )  # fmt: skip
            wanted = before if found_inf else expected
            assert all(map(same_bits, scaled.written(), wanted.written()))


@pytest.mark.parametrize("kind", [(3, 3), (2, 10)], ids=str)
@pytest.mark.parametrize("home", [home for home in FAST_HOMES if home != "triton"])
def test_number_of_threads_changes_no_bit(home, kind):
    stored, depth = kind
    operands = Operands((100_003, 5, 70_000), stored, MOMENTUM)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(operands.clone().step(home, depth, q=1.5, betas=MOMENTUM).written())
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("home", FAST_HOMES)
def test_weights_large_enough_to_be_written_past_the_caches(home):
    """From 2^20 elements on C++ streams x: its unaligned ends, and no byte outside."""
    n = 2**20 + 77
    owner = torch.full((n + 10,), 7.0)
    x, factors = owner[3 : n + 3], [random_values((n,), torch.float32) for _ in range(2)]
    g, twins = random_values((n,), torch.float32), [t.clone() for t in factors]
    expected = torch.empty(n)
    with home_of(home) as backend:
        functional.factor_step([x], [g], [factors], depth=5, **options(), backend=backend)
    functional.factor_step([expected], [g], [twins], depth=5, **options(), backend="reference")
    assert same_bits(x, expected)
    assert owner[:3].tolist() == [7.0] * 3
    assert owner[n + 3 :].tolist() == [7.0] * 7


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", EXACT_QS)
def test_tied_is_full_with_equal_factors(q, depth):
    """To rounding, over many steps; the equal factors stay equal to rounding as well."""
    first, target = (0.5 * torch.randn(50, dtype=torch.float64) for _ in range(2))
    rest = 0.6 + 0.5 * torch.rand(50, dtype=torch.float64)
    full = [first.clone(), *(rest.clone() for _ in range(depth - 1))]
    tied = [first.clone(), rest.clone()]
    products = [first * rest ** (depth - 1) for _ in range(2)]
    for _ in range(300):
        for x, factors in zip(products, (full, tied), strict=True):
            functional.factor_step([x], [x - target], [factors], depth=depth, **options(q=q, lr=1e-3))
    torch.testing.assert_close(products[0], products[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(full[-1], tied[-1], rtol=1e-9, atol=1e-12)


def test_writing_bumps_versions():
    operands = Operands((4,), 2, MOMENTUM)
    written = operands.written()
    before = [t._version for t in written]
    operands.step("reference", 2, betas=MOMENTUM)
    assert all(t._version > version for t, version in zip(written, before, strict=True))
    assert operands.gradients[0]._version == 0


X, G, F = torch.ones(3), torch.ones(3), [torch.ones(3), torch.ones(3), torch.ones(3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be an int from 1 to 64; got 0"),
        ({"depth": 3.0}, "depth must be an int from 1 to 64; got 3.0"),
        ({"depth": True}, "depth must be an int from 1 to 64; got True"),
        ({"depth": 4}, "factors of param 0 must be 4, or 2 of which the second stands for factors 2 to 4; got 3"),
        ({"depth": 2}, "factors of param 0 must be 2; got 3"),
        ({"factors": []}, "factors must hold one entry for each of the 1 params; got 0"),
        ({"betas": (0.9, 0.9)}, "momenta must be one sequence a param"),
        ({"momenta": [F]}, "momenta must be None or empty"),
        ({"betas": (0.9, 0.9), "momenta": [F[:2]]}, "momenta of param 0 must be one for each of its 3 factors; got 2"),
        ({"factors": [[torch.ones(3), torch.ones(4), torch.ones(3)]]}, "factor 2 of param 0 must have its param's shape"),
        ({"factors": [[torch.ones(3), torch.ones(1).expand(3), torch.ones(3)]]}, "must not share memory"),
        ({"lr": -1.0}, "lr must be a finite number >= 0; got -1.0"),
        ({"q": 3.0}, "q must be a number in"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_input_is_named_and_nothing_written(changes, message):
    arguments = {"params": [X], "grads": [G], "factors": [F], "depth": 3, "lr": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        functional.factor_step(**arguments)
    assert all(bool((t == 1).all()) for t in (X, G, *F))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": [torch.ones(3, dtype=torch.complex64)]}, "param 0 must be real; got torch.complex64"),
        (
            {"factors": [[torch.ones(3), torch.ones(3, dtype=torch.int32), torch.ones(3)]]},
            "factor 2 of param 0 must be float16",
        ),
        ({"grads": [torch.ones(3).to_sparse()]}, "gradient 0 must be dense"),
    ],
    ids=str,
)
def test_wrong_kinds_of_tensors_are_named(changes, message):
    with pytest.raises(TypeError, match=message):
        functional.factor_step(**{"params": [X], "grads": [G], "factors": [F], "depth": 3, "lr": 0.1, **changes})
