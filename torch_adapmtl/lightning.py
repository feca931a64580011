"""A callback that prunes a model in a Lightning `Trainer`."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from torch_adapmtl.prepare import apply_adapmtl
from torch_adapmtl.pruner import Pruner

__all__ = ["AdapMTLCallback"]


class AdapMTLCallback(Callback):
    """Prunes a model while its `LightningModule` is trained, and logs how that goes.

    The callback does three things:

    - It prepares the model before the optimisers are made and before a checkpoint is loaded, so
      that `trainer.fit(..., ckpt_path=...)` resumes a run.
    - It moves the schedule after each optimiser step. Steps that mixed precision skips and batches
      that only accumulate gradients do not count.
    - It logs `Report.scalars` as often as the trainer logs, and at the end: sparsities,
      thresholds, task weights and losses.

    In `training_step`, weight the losses by `<model>.adapmtl.loss({task: loss, ...})`.

    After training, call `model.adapmtl.finalize()` to get the plain sparse model. Checkpoints
    written before that hold the prepared model: to test from one in a new process, prepare the
    model by `apply_adapmtl` first.

    List callbacks that average the weights (`EMAWeightAveraging`) or freeze layers for a time
    (`BackboneFinetuning`) after this one. To resume a run with another `max_epochs`, pass the
    `total_steps` of the first run.

    Args:
        model: Name of the attribute of the `LightningModule` that holds the model; None for the
            module itself, which then needs `groups`, or `example_inputs` for its `forward`.
        total_steps: Number of optimiser steps; the trainer's estimate if None. Required if there
            are several optimisers, or if the module makes its data in `setup`.
        **options: Further arguments of [`apply_adapmtl`][torch_adapmtl.apply_adapmtl]:
            `target_sparsity`, which is required, `example_inputs`, `groups`, …

    Raises:
        AttributeError: In `setup`, if the module has no such attribute. A model that is made in
            `configure_model` or `setup` does not exist yet at that time.
        RuntimeError: If the number of steps is needed and the trainer cannot estimate it, or if a
            callback that is listed before has copied the module or frozen layers.

    Warns:
        UserWarning: At the end of the training, if the trainer has made fewer steps than it
            estimated, as after early stopping.

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
        ...         return self.model.adapmtl.loss(
        ...             {"main": self.model(x).square().mean()}
        ...         )
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.model.adapmtl.param_groups(lr=0.1))
        >>> prune = AdapMTLCallback(target_sparsity=0.5, groups={"main": ["*"]})
        >>> quiet = {
        ...     "logger": False,
        ...     "enable_checkpointing": False,
        ...     "enable_progress_bar": False,
        ... }
        >>> quiet["enable_model_summary"] = False
        >>> trainer = pl.Trainer(
        ...     max_steps=3, accelerator="cpu", callbacks=[prune], **quiet
        ... )
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
        self._prepared: nn.Module | None = None
        self._logged = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the model, if it has not been prepared before."""
        model = self._model(pl_module)
        if model is self._prepared or isinstance(getattr(model, "adapmtl", None), Pruner):
            return  # prepared, and perhaps finalized since
        if stage != "fit":
            return  # a plain model can be validated and tested as it is
        self._check_order(trainer, pl_module)
        steps = self._estimate(trainer) if self.total_steps is None else self.total_steps
        apply_adapmtl(model, total_steps=steps, **self.options)
        self._prepared = model

    def _check_order(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise an error if a callback before this one has copied the module or frozen layers."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)] if self in callbacks else ():
            if isinstance(callback, BaseFinetuning):
                raise RuntimeError(
                    f"callbacks: {type(callback).__name__} has frozen layers, which would never be "
                    f"pruned, also after it unfreezes them: list AdapMTLCallback before it, with "
                    f"exclude= for layers that are to stay dense"
                )
            for value in vars(callback).values():
                copied = value.module if isinstance(value, AveragedModel) else value
                if isinstance(copied, type(pl_module)) and copied is not pl_module:
                    raise RuntimeError(
                        f"callbacks: {type(callback).__name__} has copied the module before it was "
                        f"prepared: list AdapMTLCallback before it"
                    )

    def _estimate(self, trainer: pl.Trainer) -> int:
        estimate: object
        try:
            estimate = trainer.estimated_stepping_batches
        except Exception as error:  # from the LightningModule, which may have no data yet
            estimate = f"not known before setup() ({type(error).__name__}: {error})"
        if isinstance(estimate, str) or not 0 < cast(float, estimate) < float("inf"):
            raise RuntimeError(
                f"total_steps: the trainer's estimate of its steps is {estimate}; pass "
                f"total_steps=, or set max_steps or max_epochs in the Trainer"
            )
        return int(cast(float, estimate))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the pruner to the optimiser, the last one if there are several."""
        pruner = self._pruner(pl_module)
        if pruner is None:
            return
        if self.total_steps is None and len(trainer.optimizers) > 1:
            raise RuntimeError(
                f"total_steps: the trainer counts the steps of its {len(trainer.optimizers)} "
                f"optimizers together; pass total_steps=, the number of steps of the last one"
            )
        self._logged = 0
        pruner.detach()
        pruner.attach(trainer.optimizers[-1])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Log the scalars of a report as often as the trainer logs."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # not annotated
        step, pruner = trainer.global_step, self._pruner(pl_module)
        if pruner and step % every == 0:
            self._log(trainer, pruner, step)

    def _log(self, trainer: pl.Trainer, pruner: Pruner, step: int) -> None:
        if step == self._logged or not trainer.loggers:
            return
        self._logged = step  # once a step, even if several batches accumulate in it
        # Written to the loggers directly: `log` would average the values over the epoch.
        scalars = pruner.report().scalars()
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach from the optimiser; warn if the run was shorter than the trainer estimated."""
        if (pruner := self._pruner(pl_module)) is None:
            return
        self._log(trainer, pruner, trainer.global_step)
        pruner.detach()
        if self.total_steps is None and (step := pruner.step_count) < pruner.total_steps:
            rank_zero_warn(
                f"training ended after {step} of total_steps={pruner.total_steps} optimizer steps, "
                f"so the model is not at its target. total_steps was the trainer's estimate: call "
                f"fit again to go on, pruner.fix_zeros() to prune the model to its target now, or "
                f"pass total_steps= to AdapMTLCallback next time"
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach from the optimiser."""
        if (pruner := self._pruner(pl_module)) is not None:
            pruner.detach()

    def _model(self, pl_module: pl.LightningModule) -> nn.Module:
        if (model := self._find(pl_module)) is None:
            raise AttributeError(
                f"model: {type(pl_module).__name__} has no module {self.model!r}; name the "
                f"attribute that holds the model, which has to be made in __init__, or pass "
                f"model=None for the whole"
            )
        return model

    def _find(self, pl_module: pl.LightningModule) -> nn.Module | None:
        model = pl_module if self.model is None else getattr(pl_module, self.model, None)
        return model if isinstance(model, nn.Module) else None

    def _pruner(self, pl_module: pl.LightningModule) -> Pruner | None:
        # Not `_model`: after its error, the trainer calls `on_exception`.
        pruner = getattr(self._find(pl_module), "adapmtl", None)
        return pruner if isinstance(pruner, Pruner) else None
