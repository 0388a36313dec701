"""gradient_release under FSDP2, in two real processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

FSDP = """
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from pysteep import SteepestDescent, gradient_release
    from tests.support.cases import same_bits

    DEPTHS = [
        {"q": 1.5}, {"betas": (0.9, 0.99)}, {"depth": 3, "storage": "full", "betas": (0.9, 0.8)},
        {"depth": 4, "storage": "tied", "q": 1.5}, {"depth": 3, "storage": "implicit", "init": "balanced"},
    ]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=int(sys.argv[2]), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    for options in DEPTHS:
        results = []
        for release in (True, False):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3))
            for layer in net[::2]:
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)
            optimizer = SteepestDescent(net.parameters(), lr=0.02, weight_decay=0.1, **options)
            released = gradient_release(net, optimizer) if release else None
            for i in range(5):
                generator = torch.Generator().manual_seed(10 * i + rank)
                x, y = torch.randn(4, 7, generator=generator), torch.randn(4, 3, generator=generator)
                if i == 2:  # two passes, of which the first is reduced and kept
                    if released is None:
                        (net(x) + y).square().mean().backward()
                    else:
                        with released.accumulating():
                            (net(x) + y).square().mean().backward()
                if i == 3:  # and of which the first is not even reduced
                    net.set_requires_gradient_sync(False)
                    (net(x) + y).square().mean().backward()
                    net.set_requires_gradient_sync(True)
                (net(x) - y).square().mean().backward()
                if release:
                    assert all(param.grad is None for param in net.parameters())
                optimizer.step()
                optimizer.zero_grad()
            results.append([param.full_tensor().detach() for param in net.parameters()])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), options
    print("the same", flush=True)
    torch.distributed.barrier()  # a rank that ends while another still talks to it breaks it
    torch.distributed.destroy_process_group()
"""


def test_fsdp_steps_with_the_averaged_gradient(tmp_path):
    """Two processes, uneven shards, every storage: the step in backward() is the ordinary one bit for bit."""
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", f"import sys; sys.path.append({str(root)!r})\n" + textwrap.dedent(FSDP), str(tmp_path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    workers = [subprocess.Popen([*run, str(rank)], **pipes) for rank in range(2)]
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert output == "the same\n", errors
