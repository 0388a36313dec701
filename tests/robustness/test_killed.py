"""Trainings killed at random moments and resumed from their last checkpoint end where one that was never killed ends."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import killed_training
from tests.support.cases import same_bits


def tensors_of(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a checkpoint by where it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{at}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{at}[{index}]")
    else:
        yield at, value


def same(a: Any, b: Any) -> bool:
    return same_bits(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b


def check_killed(tmp_path, kills, steps, width):
    processes = multiprocessing.get_context("forkserver")  # has read torch once for all of them
    processes.set_forkserver_preload(["tests.support.killed_training"])

    def started(folder):
        folder.mkdir(exist_ok=True)
        process = processes.Process(target=killed_training.train, args=(str(folder), steps, width))
        process.start()
        return process

    undisturbed = started(tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    paths = [tmp_path / "killed" / f"{name}.pt" for name in killed_training.OPTIONS]
    moments, reached = random.Random(time.time_ns()), []
    for _ in range(kills):
        before = [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]
        process = started(tmp_path / "killed")
        while process.is_alive() and not all(
            path.exists() and path.stat().st_mtime_ns > time_ns for path, time_ns in zip(paths, before, strict=True)
        ):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training ended before it was killed: give it more steps"
        reached.append(torch.load(paths[0], weights_only=True)["steps"])
    assert reached == sorted(set(reached)), "every process must have gone on from the one before"
    last = started(tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    for path in paths:
        saved = [torch.load(tmp_path / run / path.name, weights_only=True) for run in ("undisturbed", "killed")]
        expected, found = (dict(tensors_of(part)) for part in saved)
        assert expected[".steps"] == steps
        assert expected.keys() == found.keys()
        assert [name for name in expected if not same(expected[name], found[name])] == [], path.name


def test_killed_and_resumed(tmp_path):
    check_killed(tmp_path, kills=2, steps=20, width=3)


@pytest.mark.slow
def test_killed_often_and_resumed(tmp_path):
    check_killed(tmp_path, kills=20, steps=300, width=33)
