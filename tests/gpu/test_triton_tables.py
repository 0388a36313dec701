"""Where the tables of the Triton home are kept, without a GPU: not in memory that torch.compile takes back."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from pysteep.kernels.triton import tensor_table  # noqa: E402
from tests.support.pretend_gpu import DEVICE, OnGpu  # noqa: E402


class Stream:
    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Gpu:
    """One whose allocator takes from a private pool what `pool_of`, a thread, allocates."""

    def __init__(self):
        self.default, self.side = Stream(), Stream()
        self.current, self.capturing, self.pool_of = self.default, False, None
        self.uploads, self.in_pool = [], []

    def upload(self, tensor, device, non_blocking=False):
        assert device == DEVICE
        assert non_blocking
        there = tensor.clone()
        there.record_stream = lambda _: None
        self.uploads.append(there)
        if threading.current_thread() is self.pool_of:
            self.in_pool.append(there)
        return there


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    streams = {
        "current_stream": lambda _: gpu.current,
        "default_stream": lambda _: gpu.default,
        "stream": lambda _: nullcontext(),
    }
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(**streams))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *how, **more: gpu.upload(tensor, *how, **more))
    monkeypatch.setattr(tensor_table, "recent", type(tensor_table.recent)())
    monkeypatch.setattr(tensor_table, "captured", [])
    return gpu


def among(tensor, tensors):
    return any(tensor is other for other in tensors)


def test_a_warm_up_in_a_private_pool_leaves_no_table_in_it(gpu):
    x = [OnGpu(torch.zeros(9))]
    gpu.current, gpu.pool_of = gpu.side, threading.current_thread()
    (table,) = tensor_table.tables(x, x)
    assert not gpu.in_pool
    gpu.current, gpu.pool_of = gpu.default, None
    assert tensor_table.tables(x, x)[0].rows is table.rows
    assert gpu.default.waited_for == [gpu.side]
    assert len(gpu.uploads) == 1


def test_a_capture_keeps_nothing_of_its_pool(gpu):
    """What was uploaded before stays, and what its own upload reads on the host."""
    before, during = [OnGpu(torch.zeros(9))], [OnGpu(torch.zeros(9))]
    (early,) = tensor_table.tables(before, before)
    gpu.current, gpu.pool_of, gpu.capturing = gpu.side, threading.current_thread(), True
    assert tensor_table.tables(before, before)[0].rows is early.rows
    (late,) = tensor_table.tables(during, during)
    assert among(late.rows, gpu.in_pool)
    assert among(early.rows, tensor_table.captured)
    assert not among(late.rows, tensor_table.captured)
    assert len(tensor_table.captured) == 2
    assert torch.equal(tensor_table.captured[1], late.rows)
    assert len(tensor_table.recent) == 1


def test_the_default_stream_uploads_by_itself(gpu):
    gpu.pool_of = threading.current_thread()
    x = [OnGpu(torch.zeros(9))]
    (table,) = tensor_table.tables(x, x)
    assert among(table.rows, gpu.in_pool), "another thread costs time"
