"""Every home of steepest_step against the definition. The Triton home joins in under TRITON_INTERPRET=1: test_triton.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pysteep import functional
from tests.support.cases import (
    DTYPES,
    EXACT_QS,
    GENERAL_QS,
    LAYOUTS,
    QS,
    cpu_homes,
    float64_step,
    laid_out,
    options,
    random_values,
    same_bits,
    serving,
    special_values,
    surroundings,
)
from tests.support.step_cases import BETAS, check_bounds, cloned, operands
from tests.support.tolerances import POWER_ULPS, SUM_RTOL

HOMES = cpu_homes()
FAST_HOMES = [home for home in HOMES if home != "reference"]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


def check_bits(home, weights, gradients, momenta, step):
    """One step by `home` and by the reference on copies of the same tensors: the same bits in weights and momenta."""
    w, m = cloned(weights, momenta)
    expected, expected_m = cloned(weights, momenta)
    untouched = cloned(gradients)[0]
    with serving(home) as run:
        run(w, gradients, m, **step)
    with serving("reference") as run:
        run(expected, gradients, expected_m, **step)
    assert all(map(same_bits, w, expected))
    assert all(map(same_bits, m or [], expected_m or []))
    assert all(map(same_bits, gradients, untouched))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("q", EXACT_QS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_same_bits_as_the_reference(home, dtype, q, betas):
    step = options(q=q, betas=betas)
    check_bits(home, *operands(dtype=dtype, betas=betas, special=True), step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_same_bits_without_decay(home, dtype):
    """Without coupled decay the weight must not enter the gradient: 0 * inf would."""
    step = options(weight_decay=0.0, coupled_weight_decay=0.0, maximize=True)
    check_bits(home, *operands(dtype=dtype, special=True), step)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_against_float64(home, dtype, q, betas):
    weights, gradients, momenta = operands(dtype=dtype, betas=betas)
    step = options(q=q, betas=betas)
    w, m = cloned(weights, momenta)
    with serving(home) as run:
        run(w, gradients, m, **step)
    check_bounds(weights, gradients, momenta, w, m, step)


@pytest.mark.parametrize("q", [*GENERAL_QS, 1.001, 1.5 + 1e-09, 1.999, 1 + 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_general_power_within_four_ulp(home, dtype, q):
    """From w = 0 with lr = 1 the new weight is -u: over every exponent, subnormals, zeros, infinities and NaN."""
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    largest = torch.tensor(torch.inf, dtype=dtype).view(bits).item()
    c = torch.randint(1, largest, (30000,), dtype=bits).view(dtype)
    c = torch.cat([c, -c, 1 + 1e-3 * torch.randn(5000, dtype=dtype), random_values((5000,), dtype)])
    normal = torch.zeros_like(c)
    c_special = torch.cat([c, special_values(dtype)])
    special = torch.zeros_like(c_special)
    with serving(home) as run:
        run([normal], [c], lr=1.0, q=q, betas=(0.0, 0.0), weight_decay=0.0, coupled_weight_decay=0.0)
        run([special], [c_special], lr=1.0, q=q, betas=(0.0, 0.0), weight_decay=0.0, coupled_weight_decay=0.0)
    assert home == "reference" or same_bits(normal, special[: len(c)])  # torch's own pow depends on an element's place
    exact = np.power(np.abs(c_special.numpy().astype(np.longdouble)), np.longdouble(q) - 1)
    exact = np.where(np.isnan(c_special.numpy()), np.nan, np.copysign(exact, c_special.numpy()))
    u = -special.numpy()
    finite = np.isfinite(exact)
    ulp = np.spacing(np.abs(exact[finite]).astype(u.dtype)).astype(np.longdouble)
    assert float((np.abs(u[finite].astype(np.longdouble) - exact[finite]) / ulp).max()) <= POWER_ULPS
    assert np.array_equal(u[~finite], exact[~finite].astype(u.dtype), equal_nan=True)


def test_general_power_has_the_same_bits_wherever_multiply_add_is_fused():
    c = torch.cat([random_values((20000,), torch.float32, wide=True), special_values(torch.float32)])
    results = {}
    for home in HOMES:
        if home not in ("reference", "cpp-baseline", "cuda-on-host", "triton"):
            results[home] = torch.zeros_like(c)
            with serving(home) as run:
                run([results[home]], [c], **options(q=1.7, weight_decay=0.0, coupled_weight_decay=0.0))
    first = next(iter(results.values()))
    assert all(same_bits(first, other) for other in results.values()), list(results)


@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, layout, gradient_layout):
    """Any layout gives the contiguous result, and memory that the tensors do not own keeps its bytes."""
    values = [random_values((3, 5, 4, 7), torch.float32) for _ in range(3)]
    w, g, m = (laid_out(v, at) for v, at in zip(values, (layout, gradient_layout, gradient_layout), strict=True))
    expected_w, expected_m = values[0].clone(), values[2].clone()
    around = [surroundings(t) for t in (w, m)]
    owned = surroundings(g), g.clone()
    step = options(q=1.5, betas=(0.9, 0.99))
    with serving(home) as run:
        run([w], [g], [m], **step)
        run([expected_w], [values[1]], [expected_m], **step)
    assert same_bits(w, expected_w)
    assert same_bits(m, expected_m)
    assert [torch.equal(a, surroundings(t)) for a, t in zip(around, (w, m), strict=True)] == [True, True]
    assert torch.equal(owned[0], surroundings(g))
    assert torch.equal(owned[1], g)


@pytest.mark.parametrize("momentum_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_any_mixture_of_dtypes(home, dtype, gradient_dtype, momentum_dtype):
    sizes = (5, 0, 1000)
    weights, gradients = operands(sizes, dtype)[0], operands(sizes, gradient_dtype)[1]
    betas = (0.0, 0.0) if momentum_dtype is None else (0.9, 0.99)
    momenta = None if momentum_dtype is None else operands(sizes, momentum_dtype)[0]
    check_bits(home, weights, gradients, momenta, options(q=1.5, betas=betas))


@pytest.mark.parametrize("home", FAST_HOMES)
def test_thousands_of_tensors_of_mixed_dtypes_in_a_call(home):
    dtypes = [DTYPES[i % 4] for i in range(2500)]
    weights = [random_values((i % 41,), dtype) for i, dtype in enumerate(dtypes)]
    gradients = [random_values((i % 41,), dtype) for i, dtype in enumerate(dtypes)]
    check_bits(home, weights, gradients, None, options())


@pytest.mark.parametrize("home", HOMES)
def test_0_dim_empty_and_absent(home):
    weights = [torch.tensor(2.0), torch.empty(0), torch.ones(3), torch.empty(0, 4)]
    gradients = [torch.tensor(-3.0), torch.empty(0), None, torch.empty(0, 4)]
    with serving(home) as run:
        run(weights, gradients, **options(lr=0.5, weight_decay=0.0, coupled_weight_decay=0.0))
        run([], [], **options())
    assert weights[0].item() == 2.5
    assert weights[2].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("home", HOMES)
def test_maximize_is_the_negative_gradient(home):
    weights, gradients, momenta = operands((1000,), betas=(0.9, 0.99))
    step = options(q=1.7, betas=(0.9, 0.99), coupled_weight_decay=0.0)
    (w, m), (expected, expected_m) = cloned(weights, momenta), cloned(weights, momenta)
    with serving(home) as run:
        run(w, gradients, m, **step, maximize=True)
        run(expected, [-g for g in gradients], expected_m, **step)
    assert same_bits(w[0], expected[0])
    assert same_bits(m[0], expected_m[0])


@pytest.mark.parametrize("home", HOMES)
def test_numbers_in_tensors(home):
    """lr, grad_scale and found_inf as tensors, float32 and float64: the same step as with plain numbers."""
    weights, gradients, _ = operands((1000,))
    w, expected = cloned(weights)[0], cloned(weights)[0]
    with serving(home) as run:
        scale, found_inf = torch.tensor([1024.0]), torch.tensor(0.0)
        lr = torch.tensor(0.05, dtype=torch.float64)
        run(w, [g * 1024 for g in gradients], **options(q=1.5, lr=lr), grad_scale=scale, found_inf=found_inf)
        run(expected, gradients, **options(q=1.5))
        assert same_bits(w[0], expected[0])
        run(w, gradients, **options(lr=torch.tensor(0.05)))
        run(expected, gradients, **options(lr=float(torch.tensor(0.05))))
        assert same_bits(w[0], expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_found_inf_writes_nothing(home, layout):
    w, m = (laid_out(random_values((2, 3, 4, 5), torch.float32, special=True), layout) for _ in range(2))
    before = w.clone(), m.clone()
    g = torch.full_like(w, torch.nan)
    with serving(home) as run:
        run([w], [g], [m], **options(betas=(0.9, 0.99)), found_inf=torch.tensor(1.0), grad_scale=torch.tensor(8.0))
    assert same_bits(w, before[0])
    assert same_bits(m, before[1])


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("home", HOMES)
def test_normalize(home, q, betas):
    """The norm is that of the whole group: here of two dtypes, many tensors and a layout that is copied."""
    weights, gradients, momenta = operands((0, 1, 1000, 40001), betas=betas)
    weights.append(random_values((50, 20), torch.float64))
    gradients.append(random_values((20, 50), torch.float64).t())
    if momenta is not None:
        momenta.append(random_values((50, 20), torch.float64))
    step = options(q=q, betas=betas, weight_decay=0.1, normalize=True)
    expected = float64_step(weights, gradients, momenta, **step)
    w, m = cloned(weights, momenta)
    with serving(home) as run:
        run(w, gradients, m, **step)
    for updated, exact, start in zip(w, expected, weights, strict=True):
        moved = (exact - start.double()).abs().max() if start.numel() else torch.tensor(0.0)
        assert bool(((updated.double() - exact).abs() <= SUM_RTOL * moved + 1e-6 * exact.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("q", [1.0, 1.5])
def test_normalize_has_the_same_bits_on_every_cpu(dtype, q):
    """Whatever the width of its vectors: blocks and chunks that end early, tensors shorter than a vector, many chunks."""
    sizes = (0, 1, 3, 513, 16384, 40_001, *[17] * 40, 70_000)
    weights, gradients = ([torch.randn(n, dtype=torch.float64).to(dtype) for n in sizes] for _ in range(2))
    homes = [home for home in cpu_homes() if home.startswith("cpp") or home in ("numba", "reference")]
    results = []
    for home in homes:
        updated = [weight.clone() for weight in weights]
        with serving(home) as step:
            step(updated, gradients, None, **options(q=q, normalize=True, lr=1e-3))
        results.append(updated)
    for home, other in zip(homes[1:], results[1:], strict=True):
        assert all(map(same_bits, results[0], other)), home


@pytest.mark.parametrize("home", [home for home in HOMES if home != "triton"])
def test_number_of_threads_changes_no_bit(home):
    weights, gradients, momenta = operands((100_003, 5, 70_000), betas=(0.9, 0.99))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            w, m = cloned(weights, momenta)
            with serving(home) as run:
                run(w, gradients, m, **options(q=1.5, betas=(0.9, 0.99), normalize=home != "reference"))
            results.append((*w, *m))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("home", HOMES)
def test_complex_numbers_are_pairs_of_real_ones(home):
    w, g, m = (torch.randn(7, 3, dtype=torch.complex64) for _ in range(3))
    pairs = [torch.view_as_real(t).clone() for t in (w, g.conj().resolve_conj(), m)]
    step = options(q=1.5, betas=(0.9, 0.99))
    with serving(home) as run:
        run([w], [g.conj()], [m], **step)
        run([pairs[0]], [pairs[1]], [pairs[2]], **step)
    assert same_bits(torch.view_as_real(w), pairs[0])
    assert same_bits(torch.view_as_real(m), pairs[2])


@pytest.mark.parametrize("shape", [(), (1,), (6,)])
@pytest.mark.parametrize("home", HOMES)
def test_gradient_with_a_lazy_minus_sign(home, shape):
    """The imaginary part of a conjugate is a view of negated memory."""
    lazy = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    w, expected = torch.zeros(shape), torch.zeros(shape)
    with serving(home) as run:
        run([w], [lazy], **options(q=2.0, lr=1.0))
        run([expected], [lazy.clone().resolve_neg()], **options(q=2.0, lr=1.0))
    assert same_bits(w, expected)


@pytest.mark.parametrize("home", ["cpp", "numba"])
@pytest.mark.slow
def test_more_than_two_to_the_31_elements(home):
    n = 2**31 + 12345
    w = torch.zeros(n, dtype=torch.bfloat16)
    g = torch.ones(n, dtype=torch.bfloat16)
    g[::3] = -2.0
    g[-5:] = torch.tensor([1.0, -1.0, 0.0, 3.0, -3.0])
    functional.steepest_step([w], [g], lr=0.5, q=1.0, backend=home)
    for start in range(0, n, 2**28):
        part = slice(start, min(start + 2**28, n))
        assert torch.equal(w[part], -0.5 * g[part].sign())


def test_schema_and_fake_of_the_registered_op():
    """opcheck: schema, mutation, autograd registration, fake tensors, and dynamic shapes under AOTAutograd."""
    buffers = [torch.randn(7), torch.randn(3, 2)]
    for momenta, tensor in (([], None), (buffers, None), (buffers, torch.tensor(0.9))):
        weights = [torch.randn(7, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
        gradients = [torch.randn(7), torch.randn(3, 2)]
        beta1, beta2 = (0.9, 0.99) if momenta else (0.0, 0.0)
        step = {"q": 1.5, "beta1": beta1, "beta2": beta2, "weight_decay": 0.1, "coupled_weight_decay": 0.0, "normalize": False}
        step |= {"beta1_tensor": tensor, "beta2_tensor": tensor}
        step |= {"lr_tensor": torch.tensor(0.1), "lr": 0.0, "maximize": False, "backend": None}
        step |= {"grad_scale": None, "found_inf": None}
        step |= {"rounding": "nearest", "seed": 0, "step_tensor": None, "step": 0.0, "streams": [0, 1]}
        with torch.no_grad():
            torch.library.opcheck(torch.ops.pysteep.steepest_step.default, (weights, gradients, momenta, []), step)


def test_writing_bumps_versions():
    w, g = torch.ones(4), torch.ones(4)
    before, unchanged = w._version, g._version
    functional.steepest_step([w], [g], lr=0.1)
    assert w._version > before
    assert g._version == unchanged
    idle, before = torch.ones(4), w._version
    functional.steepest_step([idle, w], [None, g], lr=0.1)
    assert (idle._version, w._version > before) == (0, True)


def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(w, g, lr):
        functional.steepest_step([w], [g], lr=lr, q=1.5, weight_decay=0.1)
        return w * 2

    w, g = torch.randn(9), torch.randn(9)
    expected = w.clone()
    functional.steepest_step([expected], [g], lr=torch.tensor(0.1), q=1.5, weight_decay=0.1)
    assert torch.equal(step(w, g, torch.tensor(0.1)), expected * 2)
    assert torch.equal(w, expected)
