"""SteepestDescent on 16-bit parameters: rounding, the dtype of its state, and what a checkpoint keeps of both."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, functional
from pysteep.kernels.reference.rounding import widen_compensated
from tests.support.cases import BACKENDS, same_bits

STORAGES = [
    {},
    {"betas": (0.9, 0.99)},
    {"depth": 3, "storage": "full", "betas": (0.9, 0.99)},
    {"depth": 10, "init": "lambda", "scale": 0.5},
    {"depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.5},
]
MODES = ("nearest", "stochastic", "compensated")
DECAY = {"lr": 1e-3, "weight_decay": 0.1}


def parameters(dtype=torch.bfloat16, count=2):
    torch.manual_seed(5)
    return [nn.Parameter((0.5 + torch.randn(37, 5).abs()).to(dtype)) for _ in range(count)]


def train(params, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
def test_decay_survives_bfloat16_where_that_of_torch_does_not(mode, backend):
    """Decoupled decay of a ten-thousandth a step, 1000 steps from 1.0: 0.905."""
    ours, theirs = (nn.Parameter(torch.ones(2000, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = SteepestDescent([ours], **DECAY, rounding=mode, backend=backend), torch.optim.AdamW([theirs], **DECAY)
    ours.grad, theirs.grad = torch.zeros_like(ours), torch.zeros_like(theirs)
    for _ in range(1000):
        for optimizer in optimizers:
            optimizer.step()
    assert abs(float(ours.detach().double().mean()) - 0.905) <= 0.002
    assert (theirs == 1).all()


@pytest.mark.parametrize("storage", ["full", "tied", "implicit"])
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
def test_decay_survives_at_depth(mode, storage):
    """Each factor decays: x^(1/3) is what becomes 0.905 of itself. To the nearest x stays."""
    ends = {}
    for rounding in ("nearest", mode):
        p = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = SteepestDescent([p], **DECAY, depth=3, storage=storage, init="balanced", rounding=rounding)
        p.grad = torch.zeros_like(p)
        for _ in range(1000):
            optimizer.step()
        ends[rounding] = float(p.detach().double().mean())
    assert ends["nearest"] == 1.0
    assert abs(ends[mode] ** (1 / 3) - 0.905) <= 0.002


def test_compensated_bfloat16_takes_the_steps_of_float32():
    """The same gradients, with momentum kept in float32: parameter and compensation are the float32's bits."""
    narrow, wide = parameters(), [nn.Parameter(p.detach().float()) for p in parameters()]
    options = {"lr": 1e-3, "q": 1.5, "betas": (0.9, 0.99), "weight_decay": 0.1, "coupled_weight_decay": 0.01}
    ours = SteepestDescent(narrow, **options, rounding="compensated", state_dtype=torch.float32)
    theirs = SteepestDescent(wide, **options)
    for _ in range(50):
        for p, r in zip(narrow, wide, strict=True):
            p.grad = torch.randn_like(p)
            r.grad = p.grad.float()
        ours.step()
        theirs.step()
    for p, r in zip(narrow, wide, strict=True):
        low = ours.state[p]["compensation"].view(torch.int16)[..., 0]
        assert torch.equal(widen_compensated(p.detach(), low), r.detach())


@pytest.mark.parametrize("mode", MODES)
def test_wider_parameters_are_stored_as_computed(mode):
    options = {"lr": 0.1, "weight_decay": 0.1, "q": 1.5}
    mixed, alone = [*parameters(), *parameters(torch.float32)], parameters(torch.float32)
    a = train(mixed, SteepestDescent(mixed, **options, rounding=mode), 0)
    for p in mixed:
        p.grad = torch.ones_like(p)
    for p in alone:
        p.grad = torch.ones_like(p)
    optimizer = SteepestDescent(mixed, **options, rounding=mode)
    optimizer.step()
    SteepestDescent(alone, **options).step()
    assert all(map(torch.equal, mixed[2:], alone))
    assert not any(map(torch.equal, mixed[:2], a[:2]))
    assert not any(optimizer.state[p] for p in mixed[2:])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(storage, mode, state_dtype):
    """Through a file, into an optimiser that was built with other options of rounding: the checkpoint's are taken."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "q": 1.5, "rounding": mode, "seed": 3, "state_dtype": state_dtype, **storage}
    straight = parameters()
    expected = train(straight, optimizer := SteepestDescent(straight, **options), 4)
    expected = train(straight, optimizer, 4, seed=1)

    broken = parameters()
    optimizer = SteepestDescent(broken, **options)
    train(broken, optimizer, 4)
    file = io.BytesIO()
    torch.save((broken, optimizer.state_dict()), file)
    file.seek(0)
    values, saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in values]
    fresh = SteepestDescent(resumed, **{**options, "seed": 4, "lr": 1.0})
    fresh.load_state_dict(saved)
    again = train(resumed, fresh, 4, seed=1)
    assert all(map(same_bits, expected, again))


@pytest.mark.parametrize("mode", MODES)
def test_storages_convert_with_their_compensations(mode):
    """Tied to full and back: the same bits go on, where every factor of "full" draws numbers of its own, but for stochastic."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "depth": 4, "rounding": mode}
    tied = parameters()
    optimizer = SteepestDescent(tied, **options)
    train(tied, optimizer, 3)
    full = [nn.Parameter(p.detach().clone()) for p in tied]
    other = SteepestDescent(full, **options, storage="full")
    other.load_state_dict(optimizer.state_dict())
    for p, r in zip(tied, full, strict=True):
        for a, b in zip(optimizer.factors(p), other.factors(r), strict=True):
            assert torch.equal(a, b)
    if mode == "compensated":
        assert torch.equal(optimizer.state[tied[0]]["compensation_rest"], other.state[full[0]]["compensation_4"])
        back = [nn.Parameter(p.detach().clone()) for p in full]
        third = SteepestDescent(back, **options)
        third.load_state_dict(copy.deepcopy(other.state_dict()))
        assert all(map(same_bits, train(back, third, 3, seed=2), train(tied, optimizer, 3, seed=2)))


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_written_to_from_outside_starts_again_there(mode):
    """Factors and compensations are made anew in the coordinates that changed, and stay in the others."""
    params = parameters(count=1)
    optimizer = SteepestDescent(params, lr=1e-3, weight_decay=0.1, depth=3, rounding=mode)
    train(params, optimizer, 5)
    before = [w.clone() for w in optimizer.factors(params[0])]
    with torch.no_grad():
        params[0][3] = 0.0
    after = optimizer.factors(params[0])
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:3], new[:3])
        assert torch.equal(old[4:], new[4:])
    assert (after[0][3] == 0).all()
    if mode == "compensated":
        low = optimizer.state[params[0]]["compensation_1"]
        assert (low[3] == 0).all()
        assert (low[:3] != 0).any()


def test_the_random_numbers_of_a_step_at_rate_0_are_not_used_up():
    """torch's distributed checkpoints make state by such a step."""
    runs = []
    for idle in (0, 1):
        params = parameters()
        optimizer = SteepestDescent(params, lr=1e-3, weight_decay=0.1, rounding="stochastic")
        before = [p.detach().clone() for p in params]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(idle):
            train(params, optimizer, 1)
            assert all(map(torch.equal, params, before))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        runs.append(train(params, optimizer, 3))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_state_of_float32_beside_bfloat16(storage):
    params = [*parameters(), *parameters(torch.float32)]
    optimizer = SteepestDescent(params, lr=1e-3, state_dtype=torch.float32, **storage)
    train(params, optimizer, 2)
    for p in params:
        for name, tensor in optimizer.state[p].items():
            assert tensor.dtype == (torch.float64 if name == "balance" else torch.float32)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
@pytest.mark.parametrize("kind", [float, torch.as_tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_in_the_pass_of_the_step_is_that_of_clip_grad_norm(storage, grad_scale, kind, max_norm):
    """At q = 2; the product with the coefficient is rounded once more where the gradients are multiplied first."""
    results = []
    for fused in (True, False):
        params = parameters(torch.float64)
        optimizer = SteepestDescent(params, lr=1e-2, q=2.0, weight_decay=0.1, **storage)
        if grad_scale is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(grad_scale), torch.zeros(())
        torch.manual_seed(0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p) * (grad_scale or 1.0)
            if fused:
                norm = torch.nn.utils.get_total_norm([p.grad for p in params])
                optimizer.step(total_norm=kind(norm), max_norm=max_norm)
            else:
                torch.nn.utils.clip_grad_norm_(params, max_norm * (grad_scale or 1.0))
                optimizer.step()
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)  # the 1e-6 beside the norm is not scaled


def test_rounding_that_is_set_later_counts_from_then_on():
    results = []
    for later in (True, False):
        params = parameters()
        options = DECAY if later else {**DECAY, "rounding": "stochastic"}
        optimizer = SteepestDescent(params, **options)
        optimizer.step()  # without gradients nothing is done
        optimizer.param_groups[0]["rounding"] = "stochastic"
        if not later:
            optimizer.param_groups[0]["rounding_step"].zero_()
        results.append(train(params, optimizer, 3))
        assert float(optimizer.param_groups[0]["rounding_step"]) == 3
    assert all(map(torch.equal, *results))


def test_an_optimiser_of_copied_groups_counts_alone():
    params = parameters()
    first = SteepestDescent(params, **DECAY, rounding="stochastic")
    train(params, first, 2)
    second = SteepestDescent([dict(group) for group in first.param_groups])
    train(params, second, 3)
    assert [float(optimizer.param_groups[0]["rounding_step"]) for optimizer in (first, second)] == [2, 5]


BAD = [
    ({"rounding": "up"}, "rounding must be one of nearest, stochastic, compensated; got 'up'"),
    ({"seed": 1.0}, "seed must be an int from 0"),
    ({"state_dtype": torch.bfloat16}, "state_dtype must be None, the parameter's, or torch.float32"),
]


@pytest.mark.parametrize(("option", "message"), BAD, ids=str)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        SteepestDescent(parameters(), **option)


def test_no_state_of_float32_beside_float64():
    with pytest.raises(ValueError, match=r"state_dtype must be None for param 0, which is torch.float64"):
        SteepestDescent(parameters(torch.float64), state_dtype=torch.float32)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"total_norm": 1.0}, "max_norm must be given"),
        ({"max_norm": 1.0}, "total_norm must be given"),
        ({"total_norm": 1.0, "max_norm": 0.0}, "max_norm must be a number > 0; got 0.0"),
        ({"total_norm": torch.ones(2), "max_norm": 1.0}, "total_norm must be a number or a tensor of one element"),
    ],
)
def test_bad_norms(norms, message):
    params = parameters()
    optimizer = SteepestDescent(params, lr=1.0)
    params[0].grad = torch.ones_like(params[0])
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.step(**norms)
    assert torch.equal(params[0], before)


def test_the_optimiser_draws_what_the_op_draws():
    """Stream i is that of parameter i in the order of the optimiser, over its groups."""
    params, copies = parameters(count=3), parameters(count=3)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2.0**-8}]
    optimizer = SteepestDescent(groups, lr=2.0**-8, rounding="stochastic", seed=11)
    grads = [torch.randn_like(p) for p in params]
    for k in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        functional.steepest_step(copies, grads, lr=2.0**-8, rounding="stochastic", seed=11, step=k)
    assert all(map(torch.equal, params, copies))


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
NARROWER = [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float64"), ("float32", "float64")]


def saved_run(narrow, **options):
    """A few steps, and what a file then holds of them."""
    params = parameters(DTYPES[narrow])
    optimizer = SteepestDescent(params, lr=0.01, **options)
    train(params, optimizer, 3)
    return params, copy.deepcopy(optimizer.state_dict())


def loaded(params, saved, wide, **options):
    """Parameters of the same values in another dtype, and their optimizer with what was saved."""
    wider = [nn.Parameter(p.detach().to(DTYPES[wide])) for p in params]
    optimizer = SteepestDescent(wider, lr=0.01, **options)
    optimizer.load_state_dict(copy.deepcopy(saved))
    return wider, optimizer


@pytest.mark.parametrize(("narrow", "wide"), NARROWER)
@pytest.mark.parametrize("storage", STORAGES[1:4], ids=str)
def test_a_narrower_state_is_widened_on_loading(storage, narrow, wide):
    """Nothing of it changes, and factors are not made anew because x was rounded to the narrower dtype."""
    params, saved = saved_run(narrow, **storage)
    wider, optimizer = loaded(params, saved, wide, **storage)
    for p, own in zip(wider, saved["state"].values(), strict=True):
        state = optimizer.state[p]
        assert {t.dtype for t in state.values()} == {p.dtype}
        assert all(torch.equal(state[name], t.to(p.dtype)) for name, t in own.items())
        if "depth" in storage:
            optimizer.factors(p)
        assert all(torch.equal(state[name], t.to(p.dtype)) for name, t in own.items())
    train(wider, optimizer, 1)
    assert {t.dtype for p in wider for t in optimizer.state[p].values()} == {wider[0].dtype}


def test_a_float16_state_of_bfloat16_parameters_gets_a_dtype_that_holds_both():
    params, saved = saved_run("float16", betas=(0.9, 0.99))
    wider, optimizer = loaded(params, saved, "bfloat16", betas=(0.9, 0.99))
    for p, own in zip(wider, saved["state"].values(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], own["momentum"].float())


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_training_does_not_stall_on_what_a_narrower_run_saved(wide):
    """Momentum reaches 1 - 0.999^2000 of a gradient of 1, and factors move by steps below a unit of bfloat16."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    for options in ({"betas": (0.9, 0.999)}, {"depth": 2}):
        narrow = SteepestDescent([p], lr=0.0, **options)
        p.grad = torch.zeros_like(p)
        narrow.step()
        (twin,), optimizer = loaded([p], narrow.state_dict(), wide, **options)
        optimizer.param_groups[0]["lr"] = 1e-4
        for _ in range(2000):
            twin.grad = torch.ones_like(twin)
            optimizer.step()
        if "betas" in options:
            assert abs(float(optimizer.state[twin]["momentum"][0]) - 0.865) < 1e-3
        else:
            assert [round(float(w[0]), 3) for w in optimizer.factors(twin)] == [0.8, 0.8]


@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("storage", ["full", "tied"])
def test_compensations_of_factors_are_added_in_on_loading(storage, wide):
    options = {"depth": 3, "storage": storage, "rounding": "compensated", "betas": (0.9, 0.99)}
    params, saved = saved_run("bfloat16", **options)
    wider, optimizer = loaded(params, saved, wide, **options)
    for p, own in zip(wider, saved["state"].values(), strict=True):
        optimizer.factors(p)
        state = optimizer.state[p]
        assert not any(name.startswith("compensation") for name in state)
        for name in (name for name in own if name.startswith("factor")):
            low = own[name.replace("factor", "compensation")].view(torch.int16)[..., 0]
            assert torch.equal(state[name], widen_compensated(own[name], low).to(p.dtype))
    train(wider, optimizer, 1)


@pytest.mark.parametrize("storage", [{}, {"depth": 3, "storage": "implicit", "init": "balanced"}], ids=str)
def test_the_compensation_of_a_parameter_that_is_wider_now_is_refused(storage):
    params, saved = saved_run("bfloat16", **storage, rounding="compensated")
    wider = [nn.Parameter(p.detach().float()) for p in params]
    fresh = SteepestDescent(wider, lr=0.01, **storage, rounding="compensated")
    with pytest.raises(ValueError, match=r"param 0 must be of 16 bits, as its compensation .* torch.float32 now"):
        fresh.load_state_dict(saved)
    assert not fresh.state
    optimizer = SteepestDescent(params, lr=0.01, **storage, rounding="compensated")
    optimizer.load_state_dict(saved)
    params[0].data = params[0].data.float()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"a parameter of shape \(37, 5\) must be of 16 bits, as its compensation"):
        optimizer.step()
    del optimizer.state[params[0]]["compensation"]
    optimizer.step()


def test_what_a_wider_run_saved_keeps_its_dtype():
    params, saved = saved_run("bfloat16", betas=(0.9, 0.99), depth=2, state_dtype=torch.float32)
    saved["param_groups"][0]["state_dtype"] = None
    same, optimizer = loaded(params, saved, "bfloat16", betas=(0.9, 0.99), depth=2)
    train(same, optimizer, 1)
    assert {t.dtype for p in same for t in optimizer.state[p].values()} == {torch.float32}


def test_what_state_dtype_asks_widens_the_state_of_the_same_parameters():
    params, saved = saved_run("bfloat16", betas=(0.9, 0.99), depth=2)
    saved["param_groups"][0].pop("state_dtype")  # so that this optimizer's stays
    same, optimizer = loaded(params, saved, "bfloat16", betas=(0.9, 0.99), depth=2, state_dtype=torch.float32)
    assert {t.dtype for p in same for t in optimizer.state[p].values()} == {torch.float32}


@pytest.mark.parametrize(("narrow", "wide"), NARROWER)
@pytest.mark.parametrize("storage", STORAGES[1:4], ids=str)
def test_a_model_that_is_widened_between_steps_widens_its_state(storage, narrow, wide):
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(DTYPES[narrow])
    params = list(model.parameters())
    optimizer = SteepestDescent(params, lr=0.01, **storage)
    train(params, optimizer, 3)
    before = [copy.deepcopy(optimizer.state[p]) for p in params]
    model.to(DTYPES[wide])
    if "depth" in storage:
        for p, own in zip(params, before, strict=True):
            optimizer.factors(p)
            assert all(torch.equal(optimizer.state[p][name], t.to(p.dtype)) for name, t in own.items())
    for p in params:
        p.grad = None
    train(params, optimizer, 1)
    assert {t.dtype for p in params for t in optimizer.state[p].values()} == {DTYPES[wide]}


def test_one_widened_parameter_of_many_is_found_within_a_round():
    params = parameters(count=5)
    optimizer = SteepestDescent(params, lr=0.01, betas=(0.9, 0.99))
    train(params, optimizer, 2)
    params[3].data = params[3].data.float()
    params[3].grad = None
    train(params, optimizer, 5)
    assert [optimizer.state[p]["momentum"].dtype for p in params] == [p.dtype for p in params]
