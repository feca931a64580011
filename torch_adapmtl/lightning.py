"""AdapMTL in a Lightning `Trainer`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from torch_adapmtl import AdapMTL, apply_adapmtl

__all__ = ["AdapMTLCallback"]


class AdapMTLCallback(Callback):
    """Prunes a model in the training of its `LightningModule`, and logs how.

    It prepares the model before the optimisers are made and before a checkpoint is loaded, so that
    `trainer.fit(..., ckpt_path=...)` resumes; moves the schedule after each step of the optimiser
    (not after those that mixed precision skips, nor between accumulated batches); and logs
    `sparsity/overall`, `sparsity/<component>` and `task_weight/<task>` as often as the trainer
    logs. `training_step` weights the losses by `<model>.adapmtl.loss({task: loss, ...})`.

    After training call `model.adapmtl.finalize()` for the plain sparse model. Checkpoints that were
    written before are those of the prepared one.

    Args:
        model: Name of the attribute of the `LightningModule` that holds the model; None for the
            module itself, which then needs `groups`, or `example_inputs` for its `forward`.
        total_steps: Number of optimiser steps; the trainer's estimate if None.
        **options: What [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] takes besides:
            `target_sparsity`, which is required, `example_inputs`, `groups`, …

    Raises:
        AttributeError: At the start of training, if the module has no such attribute.
        RuntimeError: At the start of training, if the trainer cannot tell how many steps it takes.

    Example:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> from torch_adapmtl.lightning import AdapMTLCallback
        >>> class Module(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(4, 4)
        ...
        ...     def training_step(self, x, _):
        ...         return self.model.adapmtl.loss({"main": self.model(x).square().mean()})
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.model.adapmtl.param_groups(lr=0.1))
        >>> prune = AdapMTLCallback(target_sparsity=0.5, groups={"main": ["*"]})
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> quiet["enable_model_summary"] = False
        >>> trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[prune], **quiet)
        >>> module = Module()
        >>> trainer.fit(module, torch.randn(3, 2, 4))
        >>> int((module.model.adapmtl.finalize().weight == 0).sum())
        8
    """

    def __init__(
        self, model: str | None = "model", *, total_steps: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.model, self.total_steps, self.options = model, total_steps, options
        self._logged = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the model, if it has not been prepared before."""
        model = self._model(pl_module)
        if stage != "fit" or isinstance(getattr(model, "adapmtl", None), AdapMTL):
            return
        steps = self.total_steps
        if steps is None:
            estimate = trainer.estimated_stepping_batches
            if not 0 < estimate < float("inf"):
                raise RuntimeError(
                    f"total_steps: the trainer's estimate of its steps is {estimate}; set "
                    f"max_steps or max_epochs in the Trainer, or pass total_steps="
                )
            steps = int(estimate)
        apply_adapmtl(model, total_steps=steps, **self.options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the schedule with the optimiser, the last one if there are several."""
        handle = self._handle(pl_module)
        handle.detach()
        handle.attach(trainer.optimizers[-1])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log sparsities and task weights as often as the trainer logs."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # not annotated
        step = trainer.global_step
        if trainer.loggers and step % every == 0 and step != self._logged:
            self._logged = step  # only once where batches accumulate
            # To the loggers themselves: `log` would average over the epoch what is a state.
            scalars = self._handle(pl_module).report().scalars()
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimiser."""
        self._handle(pl_module).detach()

    def _model(self, pl_module: pl.LightningModule) -> nn.Module:
        model = pl_module if self.model is None else getattr(pl_module, self.model, None)
        if not isinstance(model, nn.Module):
            raise AttributeError(
                f"model: {type(pl_module).__name__} has no module {self.model!r}; name the "
                f"attribute that holds the model, or pass model=None for the whole"
            )
        return model

    def _handle(self, pl_module: pl.LightningModule) -> AdapMTL:
        handle = self._model(pl_module).adapmtl
        assert isinstance(handle, AdapMTL)
        return handle
