"""A captured step follows lr, found_inf and grad_scale when it is replayed: on a GPU, and on one that is pretended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent
from tests.support.cases import random_values, same_bits
from tests.support.optimizer_cases import CASES
from tests.support.pretend_gpu import Graph, OnGpu, elements, pretend_gpu  # noqa: F401

HOMES = ("cuda", "triton")
WITH_MOMENTUM = [name for name in CASES if "betas" in CASES[name]]
SHAPES = ((5, 7), (), (300,), (0,), (9001,))
STEPS = 5
RATES = (1 / 16, 3 / 64, 0.0, 1 / 32, 1 / 64)  # exact in float32
SCALES = (8.0, 8.0, 4.0, 4.0, 2.0)
SKIPPED = (0.0, 1.0, 0.0, 0.0, 0.0)
BETAS = ((0.5, 0.75), (0.25, 0.5), (0.875, 0.5), (0.0, 0.25), (0.25, 0.0))


def fill(tensor, values):
    """Give a tensor other elements, from outside of any graph."""
    elements(tensor.detach()).copy_(torch.as_tensor(values))


def gradients(step):
    torch.manual_seed(100 + step)
    return [random_values(shape, torch.float32) for shape in SHAPES]


def build(case, move=lambda tensor: tensor, lr=None, **more):
    torch.manual_seed(3)
    params = [move(nn.Parameter(random_values(shape, torch.float32))) for shape in SHAPES]
    for p in params:
        p.grad = move(torch.zeros(p.shape))
    options = {"q": 1.5, "weight_decay": 0.1, **CASES[case], **more}
    return params, SteepestDescent(params, lr=RATES[0] if lr is None else lr, **options)


def expected_weights(case, backend=None, move=lambda tensor: tensor, **more):
    """Steps without a graph, with plain numbers; those that found infinities are left out."""
    params, optimizer = build(case, move, backend=backend, **more)
    for p, gradient in zip(params, gradients(0), strict=True):
        fill(p.grad, gradient)
    optimizer.step()
    for k in range(STEPS):
        for p, gradient in zip(params, gradients(k), strict=True):
            fill(p.grad, gradient)
        optimizer.param_groups[0]["lr"] = RATES[k]
        if "betas" in more:
            optimizer.param_groups[0]["betas"] = BETAS[k]
        if not SKIPPED[k]:
            optimizer.step()
    return params, optimizer


def replay_all(graph, params, optimizer):
    for k in range(STEPS):
        for p, gradient in zip(params, gradients(k), strict=True):
            fill(p.grad, gradient * SCALES[k])
        fill(optimizer.param_groups[0]["lr"], RATES[k])
        fill(optimizer.grad_scale, SCALES[k])
        fill(optimizer.found_inf, SKIPPED[k])
        for beta, value in zip(optimizer.param_groups[0]["betas"], BETAS[k], strict=True):
            if isinstance(beta, torch.Tensor):
                fill(beta, value)
        graph.replay()


def warmed_up(case, move, backend=None, shape=(), **more):
    """An optimiser that made one step, with its numbers on the device."""
    params, optimizer = build(case, move, lr=move(torch.full(shape, RATES[0])), backend=backend, **more)
    optimizer.grad_scale, optimizer.found_inf = move(torch.full(shape, 1.0)), move(torch.full(shape, 0.0))
    for p, gradient in zip(params, gradients(0), strict=True):
        fill(p.grad, gradient)
    return params, optimizer


# ---- on a GPU ----------------------------------------------------------------------------------------------------------------


def on_gpu(tensor):
    there = tensor.detach().cuda()
    return nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there


def captured(optimizer):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("home", HOMES)
def test_replays_follow_lr_grad_scale_and_found_inf(home, case, shape):
    """The bits of the steps taken one by one, but for lr = 0, where a step that is not captured leaves x alone."""
    params, optimizer = warmed_up(case, on_gpu, home, shape)
    graph = captured(optimizer)
    replay_all(graph, params, optimizer)
    others, _ = expected_weights(case, home, on_gpu)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WITH_MOMENTUM)
@pytest.mark.parametrize("home", HOMES)
def test_replays_follow_betas(home, case):
    params, optimizer = warmed_up(case, on_gpu, home, betas=tuple(map(on_gpu, map(torch.tensor, BETAS[0]))))
    replay_all(captured(optimizer), params, optimizer)
    others, _ = expected_weights(case, home, on_gpu, betas=BETAS[0])
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("home", HOMES)
def test_a_step_waits_for_nothing(home, case):
    betas = {"betas": tuple(map(on_gpu, map(torch.tensor, BETAS[0])))} if case in WITH_MOMENTUM else {}
    _, optimizer = warmed_up(case, on_gpu, home, **betas)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["depth 1, momentum, normalized", "full, momentum", "tied", "implicit"])
@pytest.mark.parametrize("home", HOMES)
def test_forward_backward_and_step_in_one_cuda_graph_with_a_grad_scaler(home, case):
    torch.manual_seed(0)
    net = nn.Linear(31, 17).cuda()
    x, y = torch.randn(8, 31, device="cuda"), torch.randn(8, 17, device="cuda")
    lr = torch.tensor(0.02, device="cuda")
    optimizer = SteepestDescent(net.parameters(), lr=lr, q=1.5, weight_decay=0.1, backend=home, **CASES[case])
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)

    def whole():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = (net(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            whole()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    before = net.weight.detach().clone()
    x.fill_(torch.inf)
    graph.replay()
    assert torch.equal(before, net.weight.detach()), "an infinity must stop a captured step"
    x.normal_()
    lr.fill_(0.0)
    graph.replay()
    torch.testing.assert_close(net.weight.detach(), before)
    lr.fill_(0.02)
    graph.replay()
    assert not torch.allclose(net.weight.detach(), before)


# ---- on a GPU that is pretended ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("case", CASES)
def test_what_a_graph_repeats_follows_its_numbers(case, shape, pretend_gpu):  # noqa: F811
    """The same with the reference as the home: nothing of the step is left to the host, and nothing is read by it."""
    params, optimizer = warmed_up(case, pretend_gpu, shape=shape)
    optimizer.step()
    graph = Graph()
    fill(optimizer.found_inf, 1.0)  # a pretended capture takes the step, as a true one does not
    with graph.capture():
        optimizer.step()
    replay_all(graph, params, optimizer)
    assert params[0].requires_grad
    assert isinstance(params[0], OnGpu)
    others, _ = expected_weights(case, "reference")
    for p, q in zip(params, others, strict=True):
        assert same_bits(elements(p.detach()), q.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WITH_MOMENTUM)
def test_what_a_graph_repeats_follows_betas(case, dtype, pretend_gpu):  # noqa: F811
    """All numbers are exact in bfloat16. The host reads none of them."""
    there = [pretend_gpu(torch.full((1,), beta, dtype=dtype)) for beta in BETAS[0]]
    params, optimizer = warmed_up(case, pretend_gpu, betas=tuple(there))
    optimizer.step()
    graph = Graph()
    fill(optimizer.found_inf, 1.0)  # a pretended capture takes the step, as a true one does not
    with graph.capture():
        optimizer.step()
    replay_all(graph, params, optimizer)
    others, _ = expected_weights(case, "reference", betas=BETAS[0])
    for p, q in zip(params, others, strict=True):
        assert same_bits(elements(p.detach()), q.detach())


@pytest.mark.parametrize("case", [name for name in CASES if "normalized" not in name])
def test_replays_draw_new_random_numbers(case, pretend_gpu):  # noqa: F811
    """Those of the steps taken one by one: the count of steps is on the device."""
    results = []
    for replayed in (True, False):
        torch.manual_seed(3)
        params = [pretend_gpu(nn.Parameter(random_values((99,), torch.bfloat16)))]
        params[0].grad = pretend_gpu(torch.ones(99, dtype=torch.bfloat16))
        optimizer = SteepestDescent(params, lr=1e-3, weight_decay=0.1, backend="reference", **CASES[case])
        count = pretend_gpu(torch.zeros((), dtype=torch.float64))
        optimizer.param_groups[0].update({"rounding": "stochastic", "rounding_step": count})
        optimizer.step()
        graph = Graph()
        with graph.capture():
            optimizer.step()
        for _ in range(3):
            graph.replay() if replayed else optimizer.step()
        results.append((elements(params[0].detach()), float(elements(optimizer.param_groups[0]["rounding_step"]))))
    (replays, count), (steps, other_count) = results
    assert same_bits(replays, steps)
    assert count == other_count == 5


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("depth 1", "implicit")])
def test_a_capture_refuses_what_would_be_repeated(case, pretend_gpu):  # noqa: F811
    """State that is made, factors that are made anew, and numbers that the host reads: each replay would do it again."""
    params, optimizer = warmed_up(case, pretend_gpu)
    with pytest.raises(RuntimeError, match="take a step before the capture"), Graph().capture():
        optimizer.step()
    params, optimizer = warmed_up(case, pretend_gpu)
    optimizer.step()
    if "depth" in CASES[case]:
        with torch.no_grad():
            params[0].mul_(0.5)
        with pytest.raises(RuntimeError, match="was written to since its last step"), Graph().capture():
            optimizer.step()
        optimizer.refactor_()
    before = [elements(p.detach()).clone() for p in params]
    betas, on_host = optimizer.param_groups[0]["betas"], torch.tensor(0.5)
    bad = [("lr", {"lr": on_host})]
    if case in WITH_MOMENTUM:
        bad += [("betas\\[0\\]", {"betas": (on_host, 0.5)}), ("betas\\[1\\]", {"betas": (0.5, on_host)})]
    for name, changes in bad:
        optimizer.param_groups[0].update({"lr": 0.1, "betas": betas, **changes})
        message = f"^{name} must be a tensor on cuda:0 or a number when a CUDA graph is captured; got one on cpu"
        with pytest.raises(RuntimeError, match=message), Graph().capture():
            optimizer.step()
    optimizer.param_groups[0].update({"lr": 0.1, "betas": betas})
    optimizer.grad_scale = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="grad_scale must be a tensor on cuda:0 or a number"), Graph().capture():
        optimizer.step()
    assert all(same_bits(elements(p.detach()), old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("case", [name for name in CASES if "depth" in CASES[name]])
def test_refactoring_leaves_the_state_where_a_graph_finds_it(case):
    params, optimizer = build(case)
    optimizer.step()
    state = {(i, name): tensor for i, p in enumerate(params) for name, tensor in optimizer.state[p].items()}
    places = {key: tensor.data_ptr() for key, tensor in state.items()}
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)
    optimizer.refactor_()
    other, fresh = build(case)
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(p)
    fresh.refactor_()
    for i, (p, q) in enumerate(zip(params, other, strict=True)):
        for name, tensor in optimizer.state[p].items():
            assert tensor.data_ptr() == places[i, name]
            assert same_bits(tensor, fresh.state[q][name])


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_balance_decays_as_well_with_found_inf_on_the_device(found, pretend_gpu):  # noqa: F811
    """A factor of float32 would lose half its digits."""
    p = pretend_gpu(nn.Parameter(torch.ones(3)))
    p.grad = pretend_gpu(torch.ones(3))
    optimizer = SteepestDescent([p], 0.05, q=2.0, weight_decay=0.3, depth=3, storage="implicit", init="lambda", scale=0.7)
    optimizer.found_inf = pretend_gpu(torch.tensor(found))
    optimizer.step()
    assert elements(optimizer.state[p]["balance"]).item() == 0.7**2 * (1.0 if found else (1 - 0.05 * 0.3) ** 2)
