"""hessian_spectrum leaves the model and the generators as they were, resumes to the same bits, and refuses what is wrong."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pysteep import SteepestDescent, factorize
from pysteep.diagnostics._product_file import ProductFile
from tests.support.spectra import (
    FLOAT64,
    Interrupted,
    batch,
    build_mlp,
    check,
    of_model,
    one_thread,  # noqa: F401
    spectrum_of,
)

# ---- nothing is left changed -------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model):
    def state():
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        flags = [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]
        return [t.detach().clone() for t in tensors], flags, [id(p) for p in model.parameters()], torch.get_rng_state()

    tensors, *others, rng = state()
    yield
    tensors_after, *others_after, rng_after = state()
    assert others == others_after
    assert all(torch.equal(a, b) for a, b in zip([*tensors, rng], [*tensors_after, rng_after], strict=True))


def build_stochastic():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("space", ["weights", "factors"])
def test_model_gradients_statistics_and_generators_stay_bit_for_bit(depth, space):
    model, (x, y) = build_stochastic(), batch()
    optimizer = None
    if depth is not None:
        factorize(model, depth)
    elif space == "factors":
        optimizer = SteepestDescent(model.parameters(), depth=2)
    model[2].eval(), model[0].bias.requires_grad_(False)
    cross_entropy(model(x), y).backward()
    loader = torch.utils.data.DataLoader([*zip(x, y, strict=True)], 6, shuffle=True)
    with unchanged(model):
        spectrum_of(model, cross_entropy, loader, 3, space=space, optimizer=optimizer)


def test_dropout_masks_and_shuffled_batches_are_the_same_in_every_product():
    model, (x, y) = build_stochastic(), batch()
    loader = torch.utils.data.DataLoader([*zip(x, y, strict=True)], 6, shuffle=True)
    spectra = []
    for _ in range(2):
        torch.rand(5)
        spectra.append(spectrum_of(model, cross_entropy, loader, 69, "highest"))
    assert spectra[0].residuals.max() <= FLOAT64
    np.testing.assert_array_equal(spectra[0].values, spectra[1].values)
    assert not np.array_equal(spectrum_of(model, cross_entropy, loader, 69, "highest", seed=1).values, spectra[0].values)


def test_batch_norm_in_training_mode_is_differentiated_through_its_statistics():
    model, data = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double(), batch()
    twin = copy.deepcopy(model)
    twin[1] = nn.BatchNorm1d(4, track_running_stats=False).double()
    twin[1].load_state_dict(dict(model[1].named_parameters()), strict=True)
    check(spectrum_of(model, cross_entropy, data, 5), of_model(twin, *data), 5, "both")


def test_checkpointed_layers_are_differentiated_twice():
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    model, data = build_mlp(), batch()
    check(spectrum_of(Checkpointed(model), cross_entropy, data, 5), of_model(model, *data), 5, "both")


# ---- resuming ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [0, 1, 100])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, torn):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 11), nn.Dropout(0.2), nn.Tanh(), nn.Linear(11, 3))
    data, path = batch(dtype=torch.float32), tmp_path / "products"
    whole = spectrum_of(model, cross_entropy, data, 4)
    first = Interrupted(at=31)
    with pytest.raises(KeyboardInterrupt):
        spectrum_of(model, first, data, 4, resume=path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - torn)
    torch.rand(3)
    second = Interrupted()
    resumed = spectrum_of(model, second, data, 4, resume=path)
    kept = 29 - (torn > 0)  # calls of the first run, but for the loss of its own and the one that was interrupted
    assert second.calls == 1 + whole.products - kept
    for name in ("values", "residuals", "vectors"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert resumed.products == whole.products
    third = Interrupted()
    finished = spectrum_of(model, third, data, 4, resume=str(path))
    assert third.calls == 1
    np.testing.assert_array_equal(finished.vectors, whole.vectors)


def test_a_file_of_another_problem_is_refused_and_left_as_it_is(tmp_path):
    model, data, path = build_mlp(), batch(), tmp_path / "products"
    spectrum_of(model, cross_entropy, data, 2, resume=path)
    content = path.read_bytes()
    others = [
        lambda: spectrum_of(model, cross_entropy, data, 3, resume=path),
        lambda: spectrum_of(model, cross_entropy, data, 2, seed=1, resume=path),
        lambda: spectrum_of(model, cross_entropy, data, 2, params="0.*", resume=path),
        lambda: spectrum_of(model, cross_entropy, batch(), 2, resume=path),
        lambda: spectrum_of(model.eval(), cross_entropy, data, 2, resume=path),
    ]
    for other in others:
        with pytest.raises(ValueError, match=f"resume must be a file of the same .*{path}"):
            other()
    model.train()
    with torch.no_grad():
        model[0].bias[0] += 1e-6
    with pytest.raises(ValueError, match="resume must be a file of the same arguments and parameters"):
        spectrum_of(model, cross_entropy, data, 2, resume=path)
    assert path.read_bytes() == content
    path.write_text("notes")
    with pytest.raises(ValueError, match="resume must be a file of hessian_spectrum or a new one"):
        spectrum_of(model, cross_entropy, data, 2, resume=path)
    assert path.read_text() == "notes"


def test_products_of_other_vectors_are_refused_and_damaged_ones_computed_anew(tmp_path):
    path, vectors, calls = tmp_path / "products", np.random.default_rng(0).standard_normal((3, 7)), []

    def product(v):
        calls.append(v)
        return (2 * v).astype(np.float32)

    def run(vectors):
        with ProductFile(path, "fingerprint", 1.0, product, 7, np.dtype(np.float32), rtol=1e-3) as file:
            return [file(v) for v in vectors]

    first = run(vectors)
    with pytest.raises(ValueError, match=f"the products in {path} are of other vectors"):
        run(vectors[::-1])
    content = bytearray(path.read_bytes())
    content[-3 * 60 + 70] ^= 1  # of the second of three records of 16 + 28 + 16 bytes
    path.write_bytes(content)
    calls.clear()
    np.testing.assert_array_equal(run(vectors), first)
    assert len(calls) == 2
    calls.clear()
    np.testing.assert_array_equal(run(vectors), first)
    assert not calls


# ---- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an int from 1 to 2\\^63 - 1; got 0"),
        ({"k": True}, "k must be an int from 1 to 2\\^63 - 1; got True"),
        ({"k": 40}, "k must be from 1 to n = 39; got 40"),
        ({"which": "largest"}, "which must be one of 'both', 'magnitude', 'lowest', 'highest'; got 'largest'"),
        ({"space": "mirror"}, "space must be one of 'weights', 'factors'; got 'mirror'"),
        ({"reduction": "none"}, "reduction must be one of 'mean', 'sum'; got 'none'"),
        ({"tolerance": 0.0}, "tolerance must be a finite number > 0; got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number > 0; got nan"),
        ({"seed": -1}, "seed must be an int from 0 to 2\\^63 - 1; got -1"),
        ({"params": 3}, "params must be a shell-style pattern"),
        ({"params": "3.*"}, r"params must choose a parameter; '3.\*'"),
        ({"space": "factors"}, "space must be 'weights' for parameters without factors"),
        ({"data": iter([1])}, "data must give its batches again for each product"),
        ({"data": None}, "data must be a DataLoader, a list of batches or one batch; got NoneType"),
        ({"data": []}, "data must hold a batch; it holds none"),
        ({"data": [torch.ones(2)]}, r"data must give pairs \(inputs, targets\) or mappings; batch 0 is a Tensor"),
        ({"loss_fn": lambda out, _: out}, r"loss_fn must return a tensor of one number; got a tensor of shape \(23, 3\)"),
        ({"loss_fn": lambda *_: 1.0}, "loss_fn must return a tensor of one number; got float"),
        ({"loss_fn": lambda out, _: out.sum() * torch.nan}, "loss_fn must give finite losses; got nan for batch 0"),
        ({"loss_fn": lambda out, _: out.detach().sum()}, "loss_fn must depend on the parameters"),
        ({"loss_fn": lambda out, _: (out - out.detach()).abs().sqrt().sum()}, "second derivatives are not finite in 0.weight"),
        ({"model": "net"}, "model must be a torch.nn.Module; got str"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, message):
    defaults = {"model": build_mlp(), "loss_fn": cross_entropy, "data": batch(), "k": 3, "resume": tmp_path / "products"}
    with pytest.raises((ValueError, TypeError), match=message):
        spectrum_of(**{**defaults, **arguments})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_by_the_parameters_name(dtype):
    model = build_mlp(torch.float32)
    model[2].to(dtype)
    with pytest.raises(TypeError, match=r"2.weight must be float32 or float64; got .*: call model.float\(\) before"):
        spectrum_of(model, cross_entropy, batch(), 1)
    with pytest.raises(ValueError, match="params must choose a parameter; those that require a gradient"):
        spectrum_of(nn.ReLU(), cross_entropy, batch(), 1)
    with pytest.raises(ValueError, match="weight must have a shape; it is uninitialised"):
        spectrum_of(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), cross_entropy, batch(), 1)


def test_an_optimizer_of_other_parameters_or_without_depth_is_refused():
    model, data = build_mlp(), batch()
    common = {"space": "factors"}
    deep = SteepestDescent(model.parameters(), depth=2)
    with pytest.raises(ValueError, match=r"optimizer must be a pysteep\.SteepestDescent with space 'factors' or None"):
        spectrum_of(model, cross_entropy, data, 1, optimizer=deep)
    with pytest.raises(ValueError, match=r"optimizer must be a pysteep\.SteepestDescent"):
        spectrum_of(model, cross_entropy, data, 1, optimizer=torch.optim.SGD(model.parameters(), 0.1), **common)
    with pytest.raises(ValueError, match="space must be 'weights' for parameters without factors"):
        spectrum_of(model, cross_entropy, data, 1, optimizer=SteepestDescent(model.parameters()), **common)
    other = SteepestDescent([model[0].weight], depth=2)
    with pytest.raises(ValueError, match=r"optimizer must hold all that params chooses; it does not hold 0\.bias"):
        spectrum_of(model, cross_entropy, data, 1, optimizer=other, **common)
    spectrum_of(model, cross_entropy, data, 1, params="0.weight", optimizer=other, **common)


def test_data_that_change_from_pass_to_pass_are_refused():
    class Noise:
        def __iter__(self):
            yield torch.from_numpy(np.random.default_rng().standard_normal((4, 5))), torch.zeros(4, dtype=torch.long)

    with pytest.raises(ValueError, match="data, model and loss_fn must give the same loss in each pass"):
        spectrum_of(build_mlp(), cross_entropy, Noise(), 2)
