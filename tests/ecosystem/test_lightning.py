"""SteepestDescent in Lightning: automatic and manual optimisation, and its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pysteep import SteepestDescent, gradient_release
from tests.support.ecosystem_cases import (
    BATCH,
    OPTIONS,
    STEPS,
    Classifier,
    Texts,
    assert_same,
    by_hand,
    optimizer_of,
    parameters,
)

lightning = pytest.importorskip("lightning")

EPOCH = STEPS // 2

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Automatic(lightning.LightningModule):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.options = Classifier(), options

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = optimizer_of(self.net, self.options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.net(**batch)["loss"]


class Manual(Automatic):
    """Two batches a step, clipped."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], i: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.net(**batch)["loss"] / 2)
        if i % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Released(Automatic):
    """Steps in the backward pass; step() of the optimiser itself, as Lightning's own hands it a closure."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        gradient_release(self.net, self.optimizers(use_pl_optimizer=False))

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.manual_backward(self.net(**batch)["loss"])
        assert all(param.grad is None for param in self.net.parameters())
        self.optimizers(use_pl_optimizer=False).step()
        self.lr_schedulers().step()


def in_groups(_: nn.Module, optimizer: SteepestDescent) -> list[Tensor]:
    """As Lightning clips them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def fitted(module: Any, folder: Path, accumulated: int = 1, checkpoint: Path | None = None, **settings: Any) -> list[Tensor]:
    """The parameters after two epochs of STEPS steps together, of which the first ends in a checkpoint."""
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    data = Subset(Texts(), range(EPOCH * BATCH))
    trainer.fit(module, DataLoader(data, batch_size=BATCH // accumulated), ckpt_path=checkpoint, weights_only=False)
    return parameters(module.net)


@every_option
@pytest.mark.parametrize(("accumulated", "clip"), [(1, None), (2, 0.3)], ids=["", "accumulated and clipped"])
def test_automatic_optimisation_is_a_loop_by_hand(tmp_path, options, accumulated, clip):
    settings = {"accumulate_grad_batches": accumulated, "gradient_clip_val": clip}
    params = fitted(Automatic(options), tmp_path, accumulated, **settings)
    assert_same(params, by_hand(options, accumulated, clip or math.inf, EPOCH, in_groups))


@every_option
def test_manual_optimisation_is_a_loop_by_hand(tmp_path, options):
    assert_same(fitted(Manual(options), tmp_path, 2), by_hand(options, 2, 0.3, EPOCH, in_groups))


class Clipped(Automatic):
    """Lightning clips nothing in mixed precision for an optimiser that divides gradients by GradScaler's scale itself."""

    def configure_optimizers(self) -> dict[str, Any]:
        configured = super().configure_optimizers()
        configured["optimizer"]._step_supports_amp_scaling = False
        return configured


@every_option
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_checkpoint_resumes_bit_exactly(tmp_path, options, precision):
    modules = Clipped(options), Clipped(options)
    nn.init.zeros_(modules[1].net.head.weight)  # not what the whole run began with
    settings = {"precision": precision, "gradient_clip_val": 0.5}
    whole = fitted(modules[0], tmp_path / "whole", **settings)
    resumed = fitted(modules[1], tmp_path / "resumed", checkpoint=tmp_path / "whole" / "epoch=0.ckpt", **settings)
    assert whole[0].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert modules[1].trainer.global_step == STEPS
    assert_same(whole, resumed)
    states = [list(module.trainer.optimizers[0].state.values()) for module in modules]
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_clipping_in_mixed_precision_is_refused_by_name(tmp_path):
    """What Lightning says, so that the line which lifts it is not forgotten when it no longer does."""
    with pytest.raises(RuntimeError, match="SteepestDescent, does not allow for gradient clipping"):
        fitted(Automatic({}), tmp_path, precision="bf16-mixed", gradient_clip_val=0.5)


@every_option
def test_gradient_release_in_manual_optimisation(tmp_path, options):
    assert_same(fitted(Released(options), tmp_path), by_hand(options, epoch=EPOCH))
