"""factor_product: every home against the definition, both derivatives, and what torch may do with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from pysteep._ops.dispatch import extension
from pysteep.functional import factor_product
from tests.support.cases import BACKENDS, DTYPES, LAYOUTS, cpu_homes, home_of, laid_out, random_values, same_bits
from tests.support.product_cases import derivatives, leaves
from tests.support.tolerances import EPS

HOMES = [
    home for home in cpu_homes() if home != "cuda-on-host" or hasattr(extension, "factor_product_double_backward_cuda_on_host")
]
FAST_HOMES = [home for home in HOMES if home != "reference"]
SIZES = (0, 1, 3, 8, 15, 17, 33, 65, 513, 4097)
DEPTHS = (1, 2, 3, 5, 10, 64)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


def wide(tensor):
    return tensor.detach().double().numpy().astype(np.longdouble)


def served(home, *operands):
    with home_of(home) as backend:
        return derivatives(*operands, backend)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", FAST_HOMES)
def test_same_bits_as_the_reference(home, dtype, depth):
    for n in (*SIZES, 40001) if depth == 3 else SIZES:
        operands = leaves(depth, (n,), dtype, wide=True, special=True)
        assert all(map(same_bits, served(home, *operands), served("reference", *operands)))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_against_more_digits(home, dtype, depth):
    """Written another way, by division; the error of a sum is relative to the sizes of its terms."""
    factors, gradient, tangents = leaves(depth, (1000,), dtype)
    with torch.no_grad():
        for w in factors:  # no factor near 0, and a product of 64 that float16 holds
            w.copy_(w.sign() * (w.abs() + 0.5).clamp(max=1.5))
    results = [result.detach().double().numpy() for result in served(home, factors, gradient, tangents)]
    w, v = (np.stack([wide(t) for t in tensors]) for tensors in (factors, tangents))
    g, x, ratio = wide(gradient), w.prod(0), v / w
    exact = [x, *(g * x / w), ratio.sum(0) * x, *(g * x / w * (ratio.sum(0) - ratio))]
    ratio = np.abs(ratio)
    sizes = [x, *(g * x / w), ratio.sum(0) * x, *(g * x / w * (ratio.sum(0) - ratio))]
    eps = 3 * depth * EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    info = torch.finfo(dtype)
    for result, expected, size in zip(results, exact, sizes, strict=True):
        slack = eps * np.abs(size) + 2 * EPS[dtype] * np.abs(expected) + info.smallest_normal * info.eps
        assert ((np.abs(result - expected) <= slack) | (np.abs(expected) >= info.max)).all()


@pytest.mark.parametrize("home", HOMES)
def test_zeros_are_exact(home):
    """Small integers: every product is exact, so that the derivatives must be those of the products left over."""
    factors = [torch.randint(-1, 2, (500,)).float().requires_grad_() for _ in range(5)]
    gradient, tangents = torch.randint(-2, 3, (500,)).float().requires_grad_(), [torch.randint(-2, 3, (500,)).float()] * 5
    x, *rest = served(home, factors, gradient, tangents)
    w, g, v = [f.detach() for f in factors], gradient.detach(), tangents[0]
    without = [[k for k in range(5) if k != i] for i in range(5)]

    def product(indices):
        result = torch.ones(500)
        for k in indices:
            result = result * w[k]
        return result

    assert torch.equal(x, product(range(5)))
    for i in range(5):
        assert torch.equal(rest[i], g * product(without[i]))
        assert torch.equal(rest[6 + i], g * v * sum(product([k for k in without[i] if k != j]) for j in without[i]))
    assert torch.equal(rest[5], v * sum(product(indices) for indices in without))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, layout):
    """The result is laid out as the first factor; what is laid out otherwise is copied, and no factor is written to."""
    values = [random_values((3, 5, 4, 6), torch.float32) for _ in range(7)]
    plain = [t.clone().requires_grad_() for t in values[:3]], values[3].clone().requires_grad_(), values[4:]
    expected = served(home, *plain)
    for others in ("contiguous", layout):
        factors = [laid_out(t, layout if i == 0 else others).requires_grad_() for i, t in enumerate(values[:3])]
        gradient = laid_out(values[3], others).requires_grad_()
        results = served(home, factors, gradient, [laid_out(t, layout) for t in values[4:]])
        assert all(map(same_bits, results, expected))
        assert results[0].stride() == torch.empty_like(factors[0]).stride()
        assert all(map(same_bits, factors, values[:3]))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)])
def test_small_shapes(home, shape):
    operands = leaves(3, shape)
    results = served(home, *operands)
    assert all(result.shape == shape for result in results)
    assert all(map(same_bits, results, served("reference", *operands)))


@pytest.mark.parametrize("home", HOMES)
def test_expanded_and_negative_tensors(home):
    w, g = torch.randn(4, 3), torch.ones(())
    row = torch.randn(3, requires_grad=True)
    lazy = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    with home_of(home) as backend:
        x = factor_product([row.expand(4, 3), w, lazy], backend=backend)
        (of_row,) = torch.autograd.grad(x, row, g.expand(4, 3))
    assert torch.equal(x, row * w * lazy)
    torch.testing.assert_close(of_row, (w * lazy).sum(0))


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("home", HOMES)
def test_derivatives_are_those_of_the_product(home, depth):
    factors, _, _ = leaves(depth, (2, 2), torch.float64)
    with torch.no_grad():
        for w in factors:
            w[torch.rand(2, 2) < 0.3] = 0.0
    with home_of(home) as backend:

        def f(*tensors):
            return factor_product(tensors, backend=backend)

        assert gradcheck(f, factors, check_forward_ad=True)
        assert gradgradcheck(f, factors, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_there_is_no_third_derivative():
    for product in (factor_product, lambda factors: torch.ops.pysteep.factor_product(factors, None)):
        factors, _, _ = leaves(3, (4,))
        first = torch.autograd.grad((product(factors) ** 3).sum(), factors, create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), factors, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable twice, not three times"):
            torch.autograd.grad(sum((t**2).sum() for t in second), factors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_factors_are_kept(backend):
    saved: list[int] = []
    factors, _, _ = leaves(6, (100,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        x = factor_product(factors, backend=backend)
        assert sorted(saved) == sorted(w.data_ptr() for w in factors)
        saved.clear()
        gradient = torch.ones(100, requires_grad=True)
        torch.autograd.grad(x, factors, gradient, create_graph=True)
        assert sorted(saved) == sorted(t.data_ptr() for t in (gradient, *factors))
    x = factor_product(factors, backend=backend)
    with torch.no_grad():
        factors[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_registered_ops():
    factors, gradient, tangents = leaves(3, (4, 3))
    with torch.no_grad():
        factors[1] = factors[1].t().contiguous().t().requires_grad_()
    torch.library.opcheck(torch.ops.pysteep.factor_product, (factors, None))
    torch.library.opcheck(torch.ops.pysteep.factor_product_backward, (gradient, factors, None))
    # the fourth check differentiates, which a second derivative refuses
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.pysteep.factor_product_double_backward, (gradient, factors, tangents, None), test_utils=checks
    )
    plain = [w.detach() for w in factors]
    torch.library.opcheck(torch.ops.pysteep.factor_product_double_backward, (gradient.detach(), plain, tangents, None))


def test_op_and_eager_give_the_same_derivatives():
    factors, gradient, tangents = leaves(4, (50,))
    x = torch.ops.pysteep.factor_product(factors, None)
    first = torch.autograd.grad(x, factors, gradient, create_graph=True)
    second = torch.autograd.grad(first[1:], [gradient, *factors], tangents[1:])
    tangents[0].zero_()
    assert all(map(same_bits, [x, *first, *second], derivatives(factors, gradient, tangents, None)))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(compiler):
    def f(factors, t):
        return (factor_product(factors) * t).sum()

    factors, _, (t, *_) = leaves(3, (17,))
    expected = torch.autograd.grad(f(factors, t), factors)
    torch._dynamo.reset()
    torch.compile(f, fullgraph=True, backend=compiler)(factors, t).backward()
    assert all(map(same_bits, (w.grad for w in factors), expected))


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, a, b):
            return factor_product([a, b]).sum()

    a, b = torch.randn(3), torch.randn(3)
    program = torch.export.export(Model(), (a, b))
    assert any("factor_product" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(a, b), (a * b).sum())


def test_who_watches_ops_sees_the_op():
    """A kernel called past the dispatcher would be a constant in a traced graph, and read memory that a fake tensor lacks."""
    a, b = torch.randn(3), torch.randn(3)
    graph = make_fx(lambda x, y: factor_product([x, y]))(a, b)
    assert torch.equal(graph(b, b), b * b)
    with FakeTensorMode():
        fake = [torch.empty(3, 4, requires_grad=True) for _ in range(2)]
        x = factor_product(fake)
        assert isinstance(x, FakeTensor)
        assert torch.autograd.grad(x.sum(), fake)[0].shape == (3, 4)
    assert factor_product([torch.empty(2, device="meta")] * 2).is_meta


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_transforms(backend):
    """torch.func's grad, jvp, vmap and Hessian-vector products, forward over reverse and reverse over reverse."""
    w = tuple(torch.randn(5, dtype=torch.float64) for _ in range(3))
    v = tuple(torch.randn(5, dtype=torch.float64) for _ in range(3))

    def ours(*w):
        return (factor_product(w, backend=backend) ** 3).sum()

    def theirs(*w):
        return ((w[0] * w[1] * w[2]) ** 3).sum()

    def everything(f):
        every = (0, 1, 2)
        grad = torch.func.grad(f, every)
        batch = tuple(torch.stack([t, 2 * t, 3 * t]) for t in w)
        return [
            *grad(*w),
            *torch.func.jvp(grad, w, v)[1],
            *torch.autograd.functional.vhp(f, w, v)[1],
            *torch.func.vmap(grad)(*batch),
            *torch.func.vmap(grad, in_dims=(1, None, 1))(batch[0].T, w[1], batch[2].T),
            *(t for row in torch.func.hessian(f, every)(*w) for t in row),
        ]

    torch.testing.assert_close(everything(ours), everything(theirs))


BAD_FACTORS = [
    ([], ValueError, "factors must hold 1 to 64 tensors; got 0"),
    ([torch.ones(2)] * 65, ValueError, "factors must hold 1 to 64 tensors; got 65"),
    (torch.ones(2, 3), TypeError, "factors must be a sequence of tensors; got one torch.Tensor"),
    ([torch.ones(2), 3.0], TypeError, r"factor 1 must be a torch.Tensor; got 3\.0"),
    ([torch.ones(2), torch.ones(2).to_sparse()], TypeError, "factor 1 must be dense"),
    ([torch.ones(2, dtype=torch.complex64)], TypeError, "factor 0 must be float16.*got torch.complex64"),
    ([torch.ones(2, dtype=torch.int32)], TypeError, "factor 0 must be float16.*got torch.int32"),
    ([torch.ones(2), torch.ones(2).half()], TypeError, "factor 1 must have factor 0's dtype torch.float32; got torch.float16"),
    ([torch.ones(2), torch.ones(1)], ValueError, r"factor 1 must have factor 0's shape \(2,\); got \(1,\)"),
    ([torch.ones(2), torch.ones(2, device="meta")], ValueError, "factor 1 must be on factor 0's device cpu; got meta"),
]


@pytest.mark.parametrize(("factors", "error", "message"), BAD_FACTORS, ids=[case[2] for case in BAD_FACTORS])
def test_bad_factors_are_named(factors, error, message):
    with pytest.raises(error, match=message):
        factor_product(factors)


def test_bad_backends_are_named():
    with pytest.raises(ValueError, match="backend must be one of"):
        factor_product([torch.ones(2)], backend="fast")
    with pytest.raises(RuntimeError, match="serves cpu tensors, not meta ones"):
        factor_product([torch.ones(2, device="meta")], backend="numba")
