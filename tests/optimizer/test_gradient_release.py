"""gradient_release: the ordinary optimiser bit for bit, gradients that are gone at once, and refusals by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

import pysteep
from pysteep import SteepestDescent, gradient_release
from tests.support.cases import same_bits

DEPTHS: dict[str, dict[str, Any]] = {
    "depth 1": {"q": 1.5},
    "depth 1, momentum": {"betas": (0.9, 0.99), "coupled_weight_decay": 0.01},
    "full": {"depth": 3, "storage": "full", "q": 1.5},
    "full, momentum": {"depth": 3, "storage": "full", "betas": (0.9, 0.8), "init": "balanced"},
    "tied": {"depth": 4, "storage": "tied", "coupled_weight_decay": 0.01},
    "tied, momentum": {"depth": 3, "storage": "tied", "betas": (0.9, 0.99), "init": "lambda", "scale": 0.3},
    "implicit": {"depth": 3, "storage": "implicit", "init": "balanced"},
}


class Net(nn.Module):
    """An embedding that is also the last layer, a layer that is used twice, one that is used now and then, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(11, 7)
        self.twice = nn.Linear(7, 7)
        self.now_and_then = nn.Linear(7, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.norm = nn.LayerNorm(7)

    def forward(self, tokens: Tensor, often: bool = False) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.embedding(tokens))))
        x = self.frozen(self.now_and_then(x) if often else x)
        return self.norm(x) @ self.embedding.weight.T


def loss_of(net: nn.Module, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(i)
    tokens = torch.randint(0, 11, (5, 3), generator=generator)
    return nn.functional.cross_entropy(net(tokens, i % 2 == 1).flatten(0, 1), tokens.roll(1).flatten())


def optimizer_of(net: Net, **options: Any) -> SteepestDescent:
    groups = [
        {"params": [*net.embedding.parameters(), *net.twice.parameters(), *net.frozen.parameters()], **options},
        {"params": list(net.now_and_then.parameters()), "q": 1.25, "lr": 0.003},
        {"params": list(net.norm.parameters()), "weight_decay": 0.0},
    ]
    return SteepestDescent(groups, lr=0.02, weight_decay=0.1)


def trained(release: bool, steps: int, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Five steps, of which the fourth is of two backward passes; parameters and the optimiser's state."""
    net = Net()
    optimizer = optimizer_of(net, **options)
    scheduler = CosineAnnealingLR(optimizer, T_max=2 * steps)
    released = gradient_release(net, optimizer) if release else None
    for i in range(steps):
        if i == 3:
            if released is not None:
                with released.accumulating():
                    loss_of(net, 100).backward()
                assert net.twice.weight.grad is not None
            else:
                loss_of(net, 100).backward()
        loss_of(net, i).backward()
        if release:
            assert all(param.grad is None for name, param in net.named_parameters() if "now_and_then" not in name)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [param.detach() for param in net.parameters()], optimizer.state_dict()


def assert_same(a: Any, b: Any) -> None:
    """Nested containers with equal tensors."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("options", DEPTHS.values(), ids=DEPTHS)
def test_it_is_the_ordinary_optimiser_bit_for_bit(options):
    """Shared parameters get their whole sum, the scheduler's lr counts, accumulation too, and so do steps without gradient."""
    params, state = trained(True, 6, **options)
    expected, expected_state = trained(False, 6, **options)
    assert_same(params, expected)
    assert_same(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensor_lr_and_other_dtypes(dtype):
    nets = Net().to(dtype), Net().to(dtype)
    for release, net in zip((True, False), nets, strict=True):
        rate = torch.tensor(0.02)
        optimizer = SteepestDescent(net.parameters(), lr=rate, q=1.5, depth=3, weight_decay=0.1)
        if release:
            gradient_release(net, optimizer)
        for i in range(4):
            loss_of(net, i).backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.mul_(0.7)
    assert_same(*([param.detach() for param in net.parameters()] for net in nets))


def test_a_gradient_is_gone_before_the_next_comes():
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(6)))
    optimizer = SteepestDescent(net.parameters(), lr=0.1)
    gradient_release(net, optimizer)
    alive: list[int] = []
    for layer in net:
        layer.register_full_backward_pre_hook(lambda *_: alive.append(sum(p.grad is not None for p in net.parameters())))
    before = [param.detach().clone() for param in net.parameters()]
    net(torch.randn(3, 5, requires_grad=True)).square().sum().backward()
    assert alive == [0] * 6
    assert not any(torch.equal(param, old) for param, old in zip(net.parameters(), before, strict=True))


def test_a_parameter_used_in_several_places_is_stepped_once_with_the_sum():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    model = nn.ParameterList([weight])
    optimizer = SteepestDescent([weight], lr=0.5, q=2.0)
    gradient_release(model, optimizer)
    (3 * weight + weight * weight.exp().detach() + (weight * 2).sum()).sum().backward()
    expected = torch.tensor([1.0, 2.0]) - 0.5 * (3 + torch.tensor([1.0, 2.0]).exp() + 4)
    torch.testing.assert_close(weight.detach(), expected)


def test_removed_it_leaves_no_trace():
    net = Net()
    optimizer = optimizer_of(net)
    with gradient_release(net, optimizer):
        loss_of(net, 0).backward()
        optimizer.step()
    before = [param.detach().clone() for param in net.parameters()]
    loss_of(net, 1).backward()
    assert_same([param.detach() for param in net.parameters()], before)
    assert net.twice.weight.grad is not None
    optimizer.step(lambda: loss_of(net, 2))
    assert not torch.equal(net.twice.weight, before[1])
    assert net.twice.weight.grad is not None
    assert not net._forward_hooks
    gradient_release(net, optimizer).remove()


def test_gradients_that_no_hook_saw_are_stepped_by_step():
    """Of parameters that were frozen or not in the optimiser at first, and of passes that only accumulated."""
    net = Net()
    optimizer = SteepestDescent([net.twice.weight, net.frozen.weight, net.now_and_then.weight], lr=0.1)
    release = gradient_release(net, optimizer)
    optimizer.add_param_group({"params": [net.norm.weight]})
    net.frozen.weight.requires_grad_(True)
    late = [net.frozen.weight, net.norm.weight, net.now_and_then.weight]
    before = [param.detach().clone() for param in late]
    with release.accumulating():
        loss_of(net, 1).backward()
    loss_of(net, 0).backward()
    assert [param.grad is None for param in late] == [False] * 3
    assert net.twice.weight.grad is None
    optimizer.step()
    for param, old in zip(late, before, strict=True):
        assert param.grad is None
        torch.testing.assert_close((param - old).abs(), torch.full_like(old, 0.1), rtol=1e-4, atol=0)


def test_checkpointing():
    """Recomputed in the backward pass, before the weights of a segment change."""
    results = []
    for release in (True, False):
        torch.manual_seed(2)
        net = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)))
        optimizer = SteepestDescent(net.parameters(), lr=0.1, q=1.5, depth=3, betas=(0.9, 0.99))
        if release:
            gradient_release(net, optimizer)
        for i in range(3):
            x = torch.randn(7, 5, generator=torch.Generator().manual_seed(i))
            for block in net:
                x = checkpoint(block, x, use_reentrant=False)
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach() for param in net.parameters()])
    assert_same(*results)


def test_backward_passes_in_threads():
    """Each over parameters of its own, all with one optimiser."""
    results = []
    for threads in (1, 8):
        torch.manual_seed(2)
        nets = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(16))
        optimizer = SteepestDescent(nets.parameters(), lr=0.1, q=1.5, depth=3, betas=(0.9, 0.99), weight_decay=0.1)
        gradient_release(nets, optimizer)
        x = torch.randn(7, 5)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(4):
                list(pool.map(lambda net, x=x: net(x).square().sum().backward(), nets))
                optimizer.step()
        results.append([param.detach() for param in nets.parameters()])
    assert_same(*results)


def test_loaded_state_and_copies():
    """The groups of a loaded optimiser are new ones; copies of a released model are not released."""
    net = Net()
    optimizer = optimizer_of(net, depth=3, betas=(0.9, 0.99))
    gradient_release(net, optimizer)
    loss_of(net, 0).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save([net, optimizer.state_dict()], file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=False)
    duplicate = copy.deepcopy(net)
    state["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(state)
    before = net.twice.weight.detach().clone()
    loss_of(net, 2).backward()
    assert torch.equal(net.twice.weight, before)
    for other in (saved, duplicate):
        loss_of(other, 2).backward()
        assert_same(other.twice.weight.detach(), before)
        assert other.twice.weight.grad is not None


def test_what_needs_all_gradients_first_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    with pytest.raises(ValueError, match="normalize must be False with gradient_release"):
        gradient_release(net, SteepestDescent(net.parameters(), normalize=True))
    gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="step\\(\\) takes no closure with gradient_release"):
        optimizer.step(lambda: loss_of(net, 0))
    with pytest.raises(RuntimeError, match="step\\(\\) takes no total_norm with gradient_release"):
        optimizer.step(total_norm=torch.tensor(1.0))
    optimizer.param_groups[2]["normalize"] = True
    before = net.norm.weight.detach().clone()
    with pytest.raises(ValueError, match="normalize must be False"):
        loss_of(net, 0).backward()
    assert torch.equal(net.norm.weight, before)


def test_grad_scaler_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    gradient_release(net, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with gradient_release"):
        scaler.step(optimizer)


def test_a_second_gradient_before_step_is_refused():
    """Accumulation that nobody announced, and the two halves of a gradient under reentrant checkpointing."""
    net = Net()
    optimizer = optimizer_of(net)
    gradient_release(net, optimizer)
    loss_of(net, 0).backward()
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(RuntimeError, match=r"norm\.\w+ got a second gradient before optimizer\.step\(\)"):
        loss_of(net, 0).backward()
    assert_same([param.detach() for param in net.parameters()], before)

    layer = nn.Linear(5, 5)
    gradient_release(layer, SteepestDescent(layer.parameters()))
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="got a second gradient"):
        checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum().backward()


def test_other_optimisers_and_models_are_refused():
    net = Net()
    with pytest.raises(TypeError, match=r"optimizer must be a pysteep\.SteepestDescent; got a SGD"):
        gradient_release(net, torch.optim.SGD(net.parameters()))
    with pytest.raises(ValueError, match="optimizer must have parameters of model alone"):
        gradient_release(net.twice, SteepestDescent(net.parameters()))
    optimizer = SteepestDescent(net.parameters())
    pysteep.gradient_release(net, optimizer)
    with pytest.raises(ValueError, match="optimizer must not be released already"):
        pysteep.gradient_release(net, optimizer)


def test_errors_name_the_parameter():
    net = nn.Sequential(nn.Embedding(11, 7, sparse=True))
    gradient_release(net, SteepestDescent(net.parameters()))
    with pytest.raises(TypeError, match="must be dense") as caught:
        net(torch.tensor([1, 2])).sum().backward()
    assert "while 0.weight was stepped" in caught.value.__notes__[0]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    DistributedDataParallel._active_ddp_module = None
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_is_refused():
    """Before, after, and where only the inner module was passed."""
    net = nn.Sequential(nn.Linear(5, 5))
    parallel = DistributedDataParallel(net)
    optimizer = SteepestDescent(net.parameters())
    with pytest.raises(RuntimeError, match=r"model is wrapped by DistributedDataParallel, .*fully_shard"):
        gradient_release(parallel, optimizer)
    with pytest.raises(RuntimeError, match=r"model\.0 is wrapped by DistributedDataParallel"):
        gradient_release(nn.Sequential(parallel), optimizer)
    with gradient_release(net, optimizer), pytest.raises(RuntimeError, match="wrapped by DistributedDataParallel"):
        parallel(torch.randn(2, 5))
    parallel(torch.randn(2, 5)).sum().backward()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("first", [True, False])
def test_replicate_is_refused(first):
    from torch.distributed._composable.replicate import replicate

    net = nn.Sequential(nn.Linear(5, 5))
    if first:
        replicate(net)
    gradient_release(net, SteepestDescent(net.parameters()))
    if not first:
        replicate(net)
    with pytest.raises(RuntimeError, match="wrapped by DistributedDataParallel"):
        net(torch.randn(2, 5))
    other = nn.Linear(5, 5)  # of which torch believes that it is called inside, since that forward pass did not end
    gradient_release(other, SteepestDescent(other.parameters()))
    other(torch.randn(2, 5)).sum().backward()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fsdp_1_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(5, 5), device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="model is wrapped by FullyShardedDataParallel"):
        gradient_release(net, SteepestDescent(net.parameters()))
