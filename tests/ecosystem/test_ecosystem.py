"""SteepestDescent in transformers' Trainer and in Accelerate: options, checkpoints, and the same numbers as a loop by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pysteep import SteepestDescent, gradient_release
from tests.support.cases import same_bits
from tests.support.ecosystem_cases import (
    BATCH,
    OPTIONS,
    STEPS,
    Classifier,
    Texts,
    assert_same,
    batches,
    by_hand,
    optimizer_of,
    parameters,
)

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def forgotten_by_accelerate() -> Iterator[None]:
    """It keeps one state for the process, with the precision of whoever asked first."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class InOrder(transformers.Trainer):
    """Takes the data in their order, so that a loop by hand sees the same."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)


def trainer_of(folder: Path, net: nn.Module, kind: type = InOrder, *, arguments: dict[str, Any], **given: Any) -> Any:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        **arguments,
    }
    return kind(
        model=net,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Texts(),
        **given,
    )


@every_option
@pytest.mark.parametrize(("accumulated", "clip"), [(1, 0.0), (2, 0.3)], ids=["", "accumulated and clipped"])
def test_trainer_is_a_loop_by_hand(tmp_path, options, accumulated, clip):
    net = Classifier()
    arguments = {
        "max_grad_norm": clip,
        "gradient_accumulation_steps": accumulated,
        "per_device_train_batch_size": BATCH // accumulated,
    }
    trainer_of(tmp_path, net, arguments=arguments, optimizers=optimizer_of(net, options)).train()
    assert_same(parameters(net), by_hand(options, accumulated, clip or math.inf))


@every_option
def test_trainer_makes_the_optimiser(tmp_path, options):
    """Of a class and its arguments, for all parameters; Trainer's weight_decay goes to those that are no bias or norm."""
    net = Classifier()
    arguments = {"weight_decay": 0.1, "lr_scheduler_type": "linear", "learning_rate": 1.0, "bf16": False}
    trainer = trainer_of(
        tmp_path, net, arguments=arguments, optimizer_cls_and_kwargs=(SteepestDescent, {"lr": 0.02, **options})
    )
    trainer.train()

    own = Classifier()
    decayed = [own.embedding.weight, own.hidden.weight, own.head.weight]
    others = [param for param in own.parameters() if not any(param is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = SteepestDescent(groups, lr=0.02, **options)
    scheduler = LambdaLR(optimizer, lambda i: max(0.0, (STEPS - i) / STEPS))
    for (part,) in batches(1):
        own(**part)["loss"].backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(parameters(net), parameters(own))


@pytest.mark.parametrize("bf16", [False, True], ids=["", "bf16"])
@every_option
def test_trainer_resumes_bit_exactly(tmp_path, options, bf16):
    """From the checkpoint in the middle, in shuffled order, with everything that Trainer saves."""
    arguments = {"bf16": bf16, "save_strategy": "steps", "save_steps": STEPS // 2, "max_grad_norm": 1.0}
    nets = Classifier(), Classifier()
    nn.init.zeros_(nets[1].head.weight)  # not what the whole run began with
    whole, resumed = (
        trainer_of(tmp_path, net, transformers.Trainer, arguments=arguments, optimizers=optimizer_of(net, options))
        for net in nets
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    assert_same(parameters(nets[0]), parameters(nets[1]))
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        a, b = (trainer.optimizer.optimizer.state[p] for trainer, p in ((whole, ours), (resumed, theirs)))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def accelerated(
    options: dict[str, Any], steps: range, folder: Path | None = None, load: bool = False, **settings: Any
) -> tuple[Any, nn.Module]:
    """Train with two batches a step, clipped; save to, or begin with what lies in, the folder."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False, **settings
    )
    net = Classifier()
    optimizer, scheduler = optimizer_of(net, options)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    if load:
        accelerator.load_state(str(folder))
    for i in steps:
        for part in batches(2)[i]:
            with accelerator.accumulate(net):
                accelerator.backward(net(**part)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.3)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
    if folder is not None and not load:
        accelerator.save_state(str(folder))
    return accelerator, net


@every_option
def test_accelerate(tmp_path, options):
    """A loop by hand, accumulated and clipped; and the same in two parts, with save_state and load_state between."""
    _, net = accelerated(options, range(STEPS))
    assert_same(parameters(net), by_hand(options, 2, 0.3))
    accelerated(options, range(3), tmp_path)
    _, resumed = accelerated(options, range(3, STEPS), tmp_path, load=True)
    assert_same(parameters(resumed), parameters(net))


@every_option
def test_accelerate_in_bf16(tmp_path, options):
    _, net = accelerated(options, range(STEPS), mixed_precision="bf16")
    accelerated(options, range(3), tmp_path, mixed_precision="bf16")
    _, resumed = accelerated(options, range(3, STEPS), tmp_path, load=True, mixed_precision="bf16")
    assert_same(parameters(resumed), parameters(net))
    assert not same_bits(net.head.weight.detach(), by_hand(options, 2, 0.3)[-2])


@every_option
def test_gradient_release_in_trainer(tmp_path, options):
    """Without clipping, which would find no gradients; accumulation that it does not announce is an error."""
    net = Classifier()
    optimizer, scheduler = optimizer_of(net, options)
    gradient_release(net, optimizer)
    trainer_of(tmp_path, net, arguments={}, optimizers=(optimizer, scheduler)).train()
    assert_same(parameters(net), by_hand(options))
    arguments = {"gradient_accumulation_steps": 2}
    with pytest.raises(RuntimeError, match=r"got a second gradient before optimizer\.step"):
        trainer_of(tmp_path, net, arguments=arguments, optimizers=(optimizer, scheduler)).train()


@every_option
def test_gradient_release_in_accelerate(options):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
    net = Classifier()
    bare, scheduler = optimizer_of(net, options)
    release = gradient_release(net, bare)
    net, optimizer, scheduler = accelerator.prepare(net, bare, scheduler)
    for step in batches(2):
        for part in step:
            with accelerator.accumulate(net), nullcontext() if accelerator.sync_gradients else release.accumulating():
                accelerator.backward(net(**part)["loss"])
                assert (net.head.weight.grad is None) == accelerator.sync_gradients
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
    assert_same(parameters(net), by_hand(options, 2))
