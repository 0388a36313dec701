"""A captured step follows lr, found_inf and grad_scale when it is replayed: on a GPU, and on one that is pretended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent
from tests.cases import random_values, same_bits
from tests.pretend_gpu import Graph, OnGpu, elements, pretend_gpu  # noqa: F401

HOMES = ("cuda", "triton")
CASES = {
    "depth 1": {},
    "depth 1, momentum, normalized": {"betas": (0.9, 0.99), "normalize": True, "coupled_weight_decay": 0.05},
    "full": {"depth": 3, "storage": "full", "init": "balanced", "coupled_weight_decay": 0.05},
    "full, momentum": {"depth": 3, "storage": "full", "init": "balanced", "betas": (0.9, 0.99)},
    "tied": {"depth": 5, "init": "lambda", "scale": 0.7},
    "tied, momentum": {"depth": 5, "init": "lambda", "scale": 0.7, "betas": (0.9, 0.99), "maximize": True},
    "implicit": {"depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.7},
}
SHAPES = ((5, 7), (), (300,), (0,), (9001,))
STEPS = 5
RATES = (1 / 16, 3 / 64, 0.0, 1 / 32, 1 / 64)  # exact in float32
SCALES = (8.0, 8.0, 4.0, 4.0, 2.0)
SKIPPED = (0.0, 1.0, 0.0, 0.0, 0.0)


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


def expected_weights(case, backend=None, move=lambda tensor: tensor):
    """Steps without a graph, with plain numbers; those that found infinities are left out."""
    params, optimizer = build(case, move, backend=backend)
    for p, gradient in zip(params, gradients(0), strict=True):
        fill(p.grad, gradient)
    optimizer.step()
    for k in range(STEPS):
        for p, gradient in zip(params, gradients(k), strict=True):
            fill(p.grad, gradient)
        optimizer.param_groups[0]["lr"] = RATES[k]
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
        graph.replay()


def warmed_up(case, move, backend=None, shape=()):
    """An optimiser that made one step, with its numbers on the device."""
    params, optimizer = build(case, move, lr=move(torch.full(shape, RATES[0])), backend=backend)
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
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("home", HOMES)
def test_a_step_waits_for_nothing(home, case):
    _, optimizer = warmed_up(case, on_gpu, home)
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
