"""transformers' Trainer under FSDP2, in two processes: depth by `create_optimizer`, and a resume from its own checkpoint.

Accelerate shards on accelerators only. Here the processes call theirs an XPU, while all tensors stay on the CPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from pysteep import SteepestDescent, param_groups
from tests.support import processes
from tests.support.ecosystem_cases import BATCH, OPTIONS, STEPS, Classifier, Texts, assert_same
from tests.support.sharded_nets import whole

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

CASES = processes.Cases(__name__)
HALF = STEPS // 2


class WithDepth(transformers.Trainer):
    """As docs/training.md shows it."""

    depth: int
    options: dict[str, Any]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = param_groups(self.model if model is None else model, depth=self.depth)
            self.optimizer = SteepestDescent(groups, lr=self.args.learning_rate, weight_decay=0.1, **self.options)
        return self.optimizer


def shard_on_cpus() -> None:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    begin = accelerate.state.PartialState.__init__

    def begin_as_xpu(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if self._shared_state["distributed_type"] == accelerate.DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_XPU

    accelerate.state.PartialState.__init__ = begin_as_xpu


def trainer_of(net: nn.Module, options: dict[str, Any], folder: str) -> WithDepth:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    arguments = transformers.TrainingArguments(
        output_dir=str(processes.folder() / folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        learning_rate=0.02,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=HALF,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={"fsdp_version": 2, "version": 2, "auto_wrap_policy": "NO_WRAP"},
    )
    trainer = WithDepth(model=net, args=arguments, train_dataset=Texts())
    trainer.depth = options.get("depth", 1)
    trainer.options = {name: value for name, value in options.items() if name != "depth"}
    return trainer


@CASES.add
def depth_by_create_optimizer_and_a_resume() -> None:
    shard_on_cpus()
    for name, options in OPTIONS.items():
        nets = Classifier(), Classifier()
        nn.init.zeros_(nets[1].head.weight)  # not what the whole run began with
        first, second = (trainer_of(net, options, name) for net in nets)
        first.train()
        assert isinstance(first.model.head.weight, DTensor)
        optimizer = first.optimizer.optimizer
        assert isinstance(optimizer, SteepestDescent)
        assert [group["depth"] for group in optimizer.param_groups] == [options.get("depth", 1), 1]
        dist.barrier()
        second.train(resume_from_checkpoint=str(processes.folder() / name / f"checkpoint-{HALF}"))
        assert second.state.global_step == STEPS
        assert_same(*([whole(param) for param in trainer.model.parameters()] for trainer in (first, second)))


results = CASES.fixture(ranks=2)
test_in_two_processes = pytest.mark.slow(CASES.test())
