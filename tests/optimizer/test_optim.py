"""SteepestDescent as a torch.optim.Optimizer: real peers, real checkpoints, real processes, and bad input."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from pysteep import SteepestDescent
from tests.support.cases import BACKENDS, same_bits
from tests.support.tolerances import PEER_RTOL


def build_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    return net.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 5, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    largest = max(float(t.abs().max()) for t in b)
    return all(float((x - y).abs().max()) <= PEER_RTOL * largest for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_q_2_is_torch_sgd(backend):
    """Coupled decay is SGD's weight_decay. Two runs of training, so that errors have every chance to grow."""
    ours, theirs = build_net(), build_net()
    a = train(ours, SteepestDescent(ours.parameters(), lr=0.05, q=2.0, coupled_weight_decay=0.01, backend=backend), 20)
    b = train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, weight_decay=0.01), 20)
    assert close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_q_1_is_torch_adam_without_betas(backend):
    """Adam with beta1 = beta2 = eps = 0 divides g by |g|: the same but at g = 0, where it is NaN."""
    w = torch.randn(1000)
    p, r = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    ours = SteepestDescent([p], lr=0.01, weight_decay=0.1, backend=backend)
    theirs = torch.optim.AdamW([r], lr=0.01, betas=(0.0, 0.0), eps=0.0, weight_decay=0.1)
    for _ in range(5):
        g = torch.randn(1000)
        p.grad, r.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    assert close([p.detach()], [r.detach()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.95)])
def test_q_1_with_momentum_is_lion(backend, betas):
    """Rounding may turn a sign where c is near 0; such weights then differ by 2 lr, and few do."""
    w = torch.randn(5000)
    p, r = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    ours = SteepestDescent([p], lr=1e-3, betas=betas, weight_decay=0.1, backend=backend)
    theirs = Lion([r], lr=1e-3, betas=betas, weight_decay=0.1)
    for _ in range(20):
        g = torch.randn(5000)
        p.grad, r.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    flipped = (p - r).abs() > 1e-3
    assert int(flipped.sum()) <= 5
    assert close([p.detach()[~flipped]], [r.detach()[~flipped]])
    state = theirs.state[r]["exp_avg"]
    assert close([ours.state[p]["momentum"]], [state])


def test_no_state_without_betas():
    net = build_net()
    optimizer = SteepestDescent(net.parameters(), lr=1e-3, q=1.5, weight_decay=0.1)
    train(net, optimizer, 2)
    assert not optimizer.state
    saved = optimizer.state_dict()["state"]  # an entry for each, which torch.distributed.checkpoint asks for
    assert [[*own] for own in saved.values()] == [["placeholder"]] * len([*net.parameters()])
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


def test_groups_schedulers_closures_and_hooks():
    net = build_net()
    optimizer = SteepestDescent([{"params": net[0].parameters(), "q": 1.0}, {"params": net[1].parameters(), "lr": 0.0}], q=2.0)
    optimizer.add_param_group({"params": net[4].parameters(), "q": 1.5, "betas": (0.5, 0.9)})
    frozen = [p.detach().clone() for p in net[1].parameters()]
    scheduler = CosineAnnealingLR(optimizer, T_max=10)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 5, (8,))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    for _ in range(9):
        last = optimizer.step(closure)
        scheduler.step()
    assert last < first
    assert len(steps) == 10
    assert all(map(torch.equal, frozen, (p.detach() for p in net[1].parameters())))
    assert set(optimizer.state) == set(net[4].parameters())
    assert optimizer.param_groups[0]["lr"] < 1e-5


def test_one_cycle_schedule_and_tensor_lr():
    p = nn.Parameter(torch.zeros(3))
    optimizer = SteepestDescent([p], lr=torch.tensor(1e-3))
    OneCycleLR(SteepestDescent([nn.Parameter(torch.zeros(3))], lr=0.1), max_lr=1.0, total_steps=10, cycle_momentum=False)
    p.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.param_groups[0]["lr"].fill_(0.5)
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_as_they_are(backend):
    p = nn.Parameter(torch.randn(50))
    p.grad = torch.randn(50)
    before = p.grad.clone()
    SteepestDescent([p], lr=0.1, q=1.7, coupled_weight_decay=0.5, maximize=True, backend=backend).step()
    assert torch.equal(p.grad, before)


def test_zero_grad_variants_and_params_without_gradient():
    p, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SteepestDescent([p, idle], lr=0.1, betas=(0.9, 0.9))
    p.grad = torch.ones(3)
    optimizer.step()
    assert idle not in optimizer.state
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0, 0.0]
    optimizer.zero_grad()
    assert p.grad is None
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert idle.tolist() == [1.0, 1.0, 1.0]


class _Subclass(torch.Tensor):
    pass


def _change(what: str, optimizer: SteepestDescent, p: nn.Parameter) -> None:
    """What a training loop may do between two steps."""
    assert p.grad is not None
    if what == "no gradient":
        p.grad = None
    elif what == "gradient in another layout":
        p.grad = p.grad.t().contiguous().t()
    elif what == "gradient of a subclass":
        p.grad = p.grad.as_subclass(_Subclass)
    elif what == "other memory":
        p.data = (2 * p.data.t()).contiguous().t()
    elif what == "no state":
        optimizer.state.pop(p, None)
    elif what == "other state":
        optimizer.state[p] = {name: tensor.clone() for name, tensor in optimizer.state[p].items()}
    elif what == "a write":
        with torch.no_grad():
            p[0] *= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.9, 0.99)}, {"depth": 3}, {"depth": 3, "betas": (0.9, 0.99), "init": "balanced"}],
    ids=["plain", "momentum", "depth", "depth and momentum"],
)
def test_what_changes_between_steps_counts(options, backend):
    """Many parameters in one optimiser against an optimiser for each, on the definition."""
    changes = ["no gradient", "gradient in another layout", "gradient of a subclass", "other memory", "no state", "other state"]
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(6)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    together = SteepestDescent(params, lr=0.01, backend=backend, **options)
    alone = [SteepestDescent([p], lr=0.01, backend="reference", **options) for p in copies]
    for what in (None, None, *changes, "a write", None):
        for p, other in zip(params, copies, strict=True):
            p.grad = torch.randn(3, 4)
            other.grad = p.grad.clone()
        if what is not None:
            _change(what, together, params[2])
            _change(what, alone[2], copies[2])
        together.step()
        for optimizer, other in zip(alone, copies, strict=True):
            optimizer.factors(other)  # looks for writes on another way than a step of many
            optimizer.step()
        assert all(map(same_bits, params, copies)), what


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(remake):
    p = nn.Parameter(torch.randn(20))
    optimizer = SteepestDescent([p], lr=0.1, q=1.5, betas=(0.9, 0.99), backend=BACKENDS[0])
    p.grad = torch.randn(20)
    optimizer.step()
    other = remake(optimizer)
    twin = other.param_groups[0]["params"][0]
    twin.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert other.backend == BACKENDS[0]
    assert same_bits(p.detach(), twin.detach())


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_keeps_the_dtype_of_the_state_or_widens_it(dtype, saved_dtype):
    p = nn.Parameter(torch.randn(30).to(dtype))
    optimizer = SteepestDescent([p], lr=0.1, betas=(0.9, 0.99))
    p.grad = torch.randn(30).to(dtype)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["momentum"] = torch.randn(30).to(saved_dtype)
    fresh = SteepestDescent([nn.Parameter(p.detach().clone())], lr=0.5, betas=(0.9, 0.99))
    fresh.load_state_dict(saved)
    (loaded,) = (state["momentum"] for state in fresh.state.values())
    wide = torch.promote_types(dtype, saved_dtype)
    assert loaded.dtype == wide
    assert torch.equal(loaded, saved["state"][0]["momentum"].to(wide))
    assert fresh.param_groups[0]["lr"] == 0.1
    twin = fresh.param_groups[0]["params"][0]
    twin.grad = p.grad.clone()
    fresh.step()
    (state,) = fresh.state.values()
    assert state["momentum"] is loaded
    with pytest.raises(ValueError, match="doesn't match the size"):
        fresh.load_state_dict({"state": {}, "param_groups": [{**saved["param_groups"][0], "params": [0, 1]}]})


def test_load_hooks_see_and_change_what_is_loaded():
    p = nn.Parameter(torch.randn(4))
    optimizer = SteepestDescent([p], lr=0.1, betas=(0.9, 0.9))
    p.grad = torch.ones(4)
    optimizer.step()
    saved = optimizer.state_dict()

    def widen(_, state_dict):
        state = {0: {"momentum": state_dict["state"][0]["momentum"].double() + 1}}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(widen)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["momentum"].dtype == torch.float64
    assert torch.equal(optimizer.state[p]["momentum"], saved["state"][0]["momentum"].double() + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_in_a_new_process_is_exact(tmp_path, backend):
    """Three steps and a checkpoint; three more here, and three in another process."""
    script = f"import sys; from {__name__} import resume; resume(*sys.argv[1:])"
    net = build_net()
    optimizer = of_backend(net, backend)
    for seed in range(3):
        train(net, optimizer, 1, seed)
    save(tmp_path / "three", net, optimizer)
    command = [sys.executable, "-c", script, str(tmp_path / "three"), str(tmp_path / "six"), backend]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2])
    for seed in range(3, 6):
        train(net, optimizer, 1, seed)
    there = torch.load(tmp_path / "six")
    assert all(torch.equal(value, there["net"][name]) for name, value in net.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum"], there["optimizer"]["state"][i]["momentum"])


def of_backend(net, backend):
    return SteepestDescent(net.parameters(), lr=0.01, q=1.25, betas=(0.9, 0.99), weight_decay=0.1, backend=backend)


def save(path, net, optimizer):
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, path)


def resume(path, result, backend):
    """What another process does."""
    net = build_net()
    optimizer = of_backend(net, backend)
    saved = torch.load(path)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        train(net, optimizer, 1, seed)
    save(result, net, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_around_forked_data_loader_workers(backend):
    """Workers forked from a process whose kernels have run threads, a fresh set every epoch."""
    script = textwrap.dedent(
        """
        import sys, torch
        from pysteep import SteepestDescent
        data = torch.utils.data.TensorDataset(torch.randn(64, 300))
        model = torch.nn.Linear(300, 300)
        optimizer = SteepestDescent(model.parameters(), lr=1e-3, q=1.7, betas=(0.9, 0.99), backend=sys.argv[1])
        for epoch in range(3):
            loader = torch.utils.data.DataLoader(data, 16, num_workers=2, multiprocessing_context="fork")
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        print("done")
        """
    )
    result = subprocess.run([sys.executable, "-c", script, backend], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.99)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend, betas):
    """Scaled gradients step as unscaled ones; an infinity skips the step, lowers the scale, and touches nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    p, plain = nn.Parameter(torch.randn(40)), nn.Parameter(torch.zeros(40))
    plain.data.copy_(p.data)
    ours = SteepestDescent([p], lr=0.1, q=1.5, betas=betas, backend=backend)
    bare = SteepestDescent([plain], lr=0.1, q=1.5, betas=betas, backend=backend)
    target = torch.randn(40)
    for unscale in (False, True):
        for optimizer, q in ((ours, p), (bare, plain)):
            optimizer.zero_grad()
            loss = (q - target).square().sum()
            (scaler.scale(loss) if optimizer is ours else loss).backward()
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        bare.step()
        assert same_bits(p.detach(), plain.detach())
    before = p.detach().clone()
    p.grad = torch.full((40,), torch.inf)
    scaler.scale(torch.tensor(1.0))
    scaler.step(ours)
    scaler.update()
    assert torch.equal(p.detach(), before)
    assert scaler.get_scale() == 512.0


def test_nothing_is_kept_of_an_optimizer_that_is_gone():
    """Nor of the tensors among its options, though each step remembers which values were right."""
    param, beta = nn.Parameter(torch.ones(3)), torch.tensor(0.9)
    optimizer = SteepestDescent([param], lr=1e-3, betas=(beta, beta))
    param.grad = torch.ones(3)
    optimizer.step()
    gone = [weakref.ref(param), weakref.ref(beta), weakref.ref(optimizer)]
    del optimizer, param, beta
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
