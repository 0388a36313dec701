"""hessian_spectrum against known spectra and dense Hessians; its bar."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from pysteep import SteepestDescent, dense_state_dict, factorize
from pysteep.diagnostics import NoConvergence
from pysteep.diagnostics._lanczos import PATIENCE, eigenpairs
from tests.support.spectra import (
    FLOAT64,
    WHICH,
    Interrupted,
    batch,
    build_mlp,
    check,
    dense_hessian,
    extremes,
    of_model,
    one_thread,  # noqa: F401
    spectrum_of,
)

# ---- known spectra -----------------------------------------------------------------------------------------------------------


def rotated(values, dtype=np.float64):
    """A symmetric matrix of these eigenvalues, as its product: a diagonal between two reflections."""
    u = np.random.default_rng(1).standard_normal(len(values))
    u /= np.linalg.norm(u)
    calls = []

    def product(v):
        calls.append(1)
        v = v.astype(dtype).astype(np.float64)
        v = values * (v - 2 * u * (u @ v))
        return (v - 2 * u * (u @ v)).astype(dtype).astype(np.float64)

    return product, calls


def clustered(n):
    """Three tight clusters of five at each end of a bulk."""
    values = 1e-2 * np.random.default_rng(0).standard_normal(n).clip(-3, 3)
    for i, centre in enumerate([4.0, 2.0, 1.0, -1.5, -0.7, -0.3]):
        values[5 * i : 5 * i + 5] = centre * (1 + 1e-3 * np.arange(5))
    return values


def pairs(n):
    """The spectrum around a saddle: each value with its negative."""
    positive = 3 * 0.9 ** np.arange(n // 2)
    return np.concatenate([positive, -positive])


def check_pairs(pairs, product, expected, rtol=0.0, atol=0.0):
    """Values, orthonormal vectors, and residuals as a product of each vector gives them."""
    values, vectors, residuals = pairs
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), rtol=0, atol=1e-11)
    true = [np.linalg.norm(product(v) - value * v) for value, v in zip(values, vectors.T, strict=True)]
    np.testing.assert_allclose(residuals, true, rtol=1e-3, atol=1e-6 * rtol + atol)


@pytest.mark.parametrize("most", [None, 40])
@pytest.mark.parametrize(
    ("spectrum", "which"),
    [(clustered, "magnitude"), (clustered, "both"), (clustered, "highest"), (pairs, "both"), (pairs, "lowest")],
)
def test_known_spectra_are_found_without_ghosts(spectrum, which, most):
    values = spectrum(20_030)
    product, calls = rotated(values, np.float32)
    k = 14 if spectrum is pairs else 15
    found = eigenpairs(product, len(values), k, which, tolerance=1e-5, seed=0, rounding=2**-23, most=most)
    assert len(calls) <= 400
    assert (found.residuals <= 1e-5 * abs(found.values) + 1e-6).all()
    check_pairs(found, product, extremes(values, k, which), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 20, 21, 41, 42, 60])
@pytest.mark.parametrize("which", WHICH)
def test_every_k_from_1_to_the_dimension_works(n, which):
    values = np.random.default_rng(n).standard_normal(n)
    for k in {1, min(2, n), n // 3 or 1, n - 1 or 1, n}:
        product, calls = rotated(values)
        found = eigenpairs(product, n, k, which, tolerance=1e-10, seed=0)
        assert len(calls) <= n
        check_pairs(found, product, extremes(values, k, which), atol=FLOAT64)
        assert found.vectors.shape == (n, k)


@pytest.mark.parametrize("which", WHICH)
def test_an_operator_that_is_zero_has_zero_eigenvalues(which):
    check_pairs(eigenpairs(np.zeros_like, 300, 7, which, tolerance=1e-4, seed=0), np.zeros_like, np.zeros(7))


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_eigenvalues_than_the_rank_are_found(which, dtype):
    """The rest is 0, to the rounding of the products: no relative residual is asked of it."""
    values = np.zeros(2000)
    values[:9] = [5, 4, 3, 2, 1, -1, -2, -3, -4.5]
    product, _ = rotated(values, dtype)
    rounding = float(np.finfo(dtype).eps)
    found = eigenpairs(product, 2000, 14, which, tolerance=1e-4, seed=0, rounding=rounding)
    check_pairs(found, product, extremes(values, 14, which), atol=5 * rounding * 2000**0.5)  # 5: the largest value


def test_a_continuum_is_refused_with_what_was_found():
    product, calls = rotated(np.linspace(0, 1, 4001) ** 4)
    with pytest.raises(NoConvergence, match=r"k=4 eigenvalues \(both\) do not converge") as caught:
        eigenpairs(product, 4001, 4, "both", tolerance=1e-6, seed=0, most=30)
    values, vectors = caught.value.values, caught.value.vectors
    assert len(calls) == 20 * PATIENCE
    assert vectors.shape == (4001, len(values))
    np.testing.assert_allclose(values, 1 - np.array([0, 1]) / 1000, atol=1e-5)
    assert all(np.linalg.norm(product(v) - x * v) <= 1e-6 for x, v in zip(values, vectors.T, strict=True))


# ---- against the dense Hessian -----------------------------------------------------------------------------------------------


def of_products(model, depths, inputs, targets, factors):
    """The dense Hessian by factors whose products, `depths` at a time, are the parameters of `model`."""

    def f(*tensors):
        left, made = list(tensors), {}
        for (name, _), depth in zip(model.named_parameters(), depths, strict=True):
            parts, left = left[:depth], left[depth:]
            made[name] = torch.stack(parts).prod(0)
        return cross_entropy(functional_call(model, made, (inputs,)), targets)

    return dense_hessian(f, *factors)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3, 39])
def test_spectrum_is_that_of_the_dense_hessian(which, k):
    model, data = build_mlp(), batch()
    check(spectrum_of(model, cross_entropy, data, k, which), of_model(model, *data), k, which)


@pytest.mark.parametrize("which", WHICH)
def test_lanczos_finds_what_the_dense_hessian_has(which):
    model = nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 7)).double()
    data = torch.randn(31, 9, dtype=torch.float64), torch.randn(31, 7, dtype=torch.float64)
    spectrum = spectrum_of(model, mse_loss, data, 5, which)
    check(spectrum, of_model(model, *data, mse_loss), 5, which)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_factorized_model_has_a_spectrum_in_weights_and_one_in_factors(depth):
    plain, data = build_mlp(), batch()
    model = factorize(copy.deepcopy(plain), depth, "lambda", scale=0.4)
    plain.load_state_dict(dense_state_dict(model))
    check(spectrum_of(model, cross_entropy, data, 9), of_model(plain, *data), 9, "both")
    spectrum = spectrum_of(model, cross_entropy, data, 9, space="factors")
    check(spectrum, of_model(model, *data), 9, "both")
    assert spectrum.names == tuple(name for name, _ in model.named_parameters())
    own = spectrum_of(model, cross_entropy, data, 9, space="factors", params="2.weight")
    assert own.names == tuple(f"2.parametrizations.weight.original{i}" for i in range(depth))


@pytest.mark.parametrize("storage", ["tied", "full", "implicit"])
def test_factors_of_the_optimizer_are_independent_variables(storage):
    model, data = build_mlp(), batch()
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    groups = [{"params": weights, "depth": 3}, {"params": biases}]
    optimizer = SteepestDescent(groups, lr=1e-2, storage=storage, init="lambda", scale=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    spectrum = spectrum_of(model, cross_entropy, data, 8, space="factors", optimizer=optimizer)
    factors = [f for p in model.parameters() for f in optimizer.factors(p)]
    check(spectrum, of_products(model, [3, 1, 3, 1], *data, factors), 8, "both")
    assert spectrum.names[:4] == ("0.weight.factor_1", "0.weight.factor_2", "0.weight.factor_3", "0.bias")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_saddle_has_eigenvalues_plus_and_minus_the_gradient():
    """Theorem 4.3: w_1 = w_2 = 0 in a coordinate."""
    model, inputs = nn.Linear(3, 1, bias=False).double(), torch.randn(7, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    targets = torch.randn(7, 1, dtype=torch.float64)
    mse_loss(model(inputs), targets).backward()
    gradient = model.weight.grad.abs().numpy().ravel()
    factorize(model, 2, "saddle", scale=0.1)
    with torch.no_grad():
        for factor in model.parameters():
            factor.zero_()
    spectrum = spectrum_of(model, mse_loss, (inputs, targets), 6, space="factors")
    np.testing.assert_allclose(spectrum.values, np.sort(np.concatenate([gradient, -gradient]))[::-1], rtol=1e-12)
    assert spectrum.negative == 3


def test_eigenvectors_come_by_name_in_the_parameters_shapes():
    model, data = build_mlp(), batch()
    spectrum = spectrum_of(model, cross_entropy, data, 2, "highest")
    vector = spectrum.vector(1)
    assert {name: v.shape for name, v in vector.items()} == {name: p.shape for name, p in model.named_parameters()}
    np.testing.assert_array_equal(torch.cat([v.reshape(-1) for v in vector.values()]).numpy(), spectrum.vectors[:, 1])


# ---- data, losses, models ----------------------------------------------------------------------------------------------------


def test_ragged_batches_are_one_large_batch():
    model, (x, y) = build_mlp(), batch(23)
    data = list(zip(x.split(7), y.split(7), strict=True))
    whole = spectrum_of(model, cross_entropy, (x, y), 6)
    for batches in (data, [list(pair) for pair in data], torch.utils.data.DataLoader([*zip(x, y, strict=True)], 7)):
        parts = spectrum_of(model, cross_entropy, batches, 6)
        np.testing.assert_allclose(parts.values, whole.values, rtol=0, atol=FLOAT64)
    summed = spectrum_of(model, lambda out, t: cross_entropy(out, t, reduction="sum"), data, 6, reduction="sum")
    np.testing.assert_allclose(summed.values, 23 * whole.values, rtol=0, atol=23 * FLOAT64)


def test_a_loss_may_look_at_the_model():
    model, data = build_mlp(), batch()
    model(data[0])
    plain = spectrum_of(model, cross_entropy, data, 39)

    def decayed(outputs, targets):
        return cross_entropy(outputs, targets) + sum((p**2).sum() for p in model.parameters())

    spectrum = spectrum_of(model, decayed, data, 39)
    np.testing.assert_allclose(spectrum.values, plain.values + 2, rtol=0, atol=FLOAT64)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.unused, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
        self.register_buffer("shift", torch.arange(4))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.scale + self.shift


@pytest.mark.parametrize("factorized", [False, True])
def test_tied_parameters_count_once_and_unused_or_linear_ones_are_zero_rows(factorized):
    model = Tied().double()
    data = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    matrix = of_model(model, *data, mse_loss)
    if factorized:
        factorize(model, 2)
    names = dict.fromkeys(["first.weight", "unused", "scale"])
    spectrum = spectrum_of(model, mse_loss, data, 20)
    assert set(spectrum.names) == set(names)
    np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(matrix)[::-1], rtol=0, atol=FLOAT64)
    assert set(spectrum_of(model, mse_loss, data, 1, params="second.*").names) == {"first.weight"}
    linear = spectrum_of(model, lambda out, _: out.sum(), data, 3, params=lambda name, _: name in ("unused", "scale"))
    assert not linear.values.any()


def test_params_choose_what_the_hessian_is_by():
    model, data = build_mlp(), batch()
    matrix = of_model(model, *data)
    model[0].weight.requires_grad_(False)
    check(spectrum_of(model, cross_entropy, data, 5), matrix[20:, 20:], 5, "both")
    check(spectrum_of(model, cross_entropy, data, 5, params="0.*"), matrix[:24, :24], 5, "both")
    weights = np.r_[:20, 24:36]
    chosen = spectrum_of(model, cross_entropy, data, 5, params=lambda name, _: "weight" in name)
    check(chosen, matrix[np.ix_(weights, weights)], 5, "both")
    assert not model[0].weight.requires_grad


def test_transformers_take_mappings_and_attention_is_differentiated_twice():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 3}
    config = BertConfig(vocab_size=7, max_position_embeddings=5, attn_implementation="sdpa", **sizes)
    model = BertForSequenceClassification(config).double()
    data = {
        "input_ids": torch.randint(0, 7, (3, 5)),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "labels": torch.tensor([0, 1, 1]),
    }
    query = model.bert.encoder.layer[0].attention.self.query

    def loss(weight, bias):
        names = ["bert.encoder.layer.0.attention.self.query." + a for a in ("weight", "bias")]
        return functional_call(model, dict(zip(names, (weight, bias), strict=True)), (), data).loss

    model.eval()
    found = spectrum_of(model, lambda out, _: out.loss, [data, data], 6, params="*self.query*")
    model.set_attn_implementation("eager")
    check(found, dense_hessian(loss, query.weight, query.bias), 6, "both")


# ---- the bar -----------------------------------------------------------------------------------------------------------------


def digits_mlp(epochs=4):
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 108), nn.ReLU(), nn.Linear(108, 110), nn.ReLU(), nn.Linear(110, 10))
    optimizer = SteepestDescent(model.parameters(), lr=5e-4)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model, (x, y)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "most"), [("magnitude", 300), ("both", 300), ("highest", 400), ("lowest", 500)])
def test_fifty_eigenvalues_of_twenty_thousand_parameters(which, most):
    model, data = digits_mlp()
    calls = Interrupted()
    spectrum = spectrum_of(model, calls, data, 50, which)
    assert spectrum.dimension == 20_120
    assert spectrum.products == calls.calls - 1 <= most
    assert (spectrum.residuals <= 1e-3 * abs(spectrum.values)).all()
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(50), rtol=0, atol=1e-12)
    assert spectrum.negative == {"magnitude": spectrum.negative, "both": 25, "highest": 0, "lowest": 50}[which]


@pytest.mark.gpu
@pytest.mark.parametrize("space", ["weights", "factors"])
def test_the_spectrum_on_a_gpu_is_that_on_the_cpu(space):
    model, data = factorize(build_mlp(), 2, "balanced"), batch()
    expected = spectrum_of(model, cross_entropy, data, 9, space=space)
    before = torch.cuda.get_rng_state()
    spectrum = spectrum_of(model.cuda(), cross_entropy, data, 9, space=space)
    np.testing.assert_allclose(spectrum.values, expected.values, rtol=0, atol=FLOAT64 * abs(expected.values).max())
    assert torch.equal(before, torch.cuda.get_rng_state())
