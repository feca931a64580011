"""The pruner, which `apply_adapmtl` returns: it controls the pruning of one model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_choice, check_fraction, check_steps
from torch_adapmtl.components.find import FROZEN, UNUSED, Components
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import count_zeros
from torch_adapmtl.layers.optimizer_hooks import stop_warning
from torch_adapmtl.layers.sparse_weights import SparseWeights, stop_watching, watch_forward
from torch_adapmtl.methods._base import Controller
from torch_adapmtl.run._graph_module import is_graph, let_pruner_go
from torch_adapmtl.run._model_watch import ModelWatch, watch_unreached, watch_zeros
from torch_adapmtl.run._step_hook import StepHook
from torch_adapmtl.run.checkpoint import load, save, unguard
from torch_adapmtl.run.diagnostics import Watch, signs
from torch_adapmtl.run.history import History, Recorder
from torch_adapmtl.run.parameter_groups import parameter_groups
from torch_adapmtl.run.report import ComponentRow, LayerRow, Report, total_macs
from torch_adapmtl.tensor.torch_prune import SoftThresholdPruning
from torch_adapmtl.weighting._base import LossWeighting
from torch_adapmtl.weighting.stability import StabilityWeighting

__all__ = ["Pruner"]


class Pruner(nn.Module):
    """Weights the losses and moves the sparsity of a model that `apply_adapmtl` has prepared.

    The pruner is the submodule `adapmtl` of the model: it moves to other devices with the model,
    its state is part of the model's `state_dict`, and a copy of the model contains a copy of it. To
    resume a run, save `model.state_dict()` and load it into a newly prepared model.

    Attributes:
        components: The prunable tensors of the model, by component.
        layers: The tensors that are pruned; frozen and unused ones are not.
        tasks: The task names, in order.
        target_sparsity: What is pruned at the end, as a fraction: zeros among all prunable weights,
            or, with `count="macs"`, the share of their multiply-adds that the zeros save.
        total_steps: Number of calls of `step` in the whole run.
        weighting: The loss weighting.
        controller: The object that moves the thresholds, made by the method.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_adapmtl import apply_adapmtl
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(8, 16)
        ...         self.a = nn.Linear(16, 2)
        ...         self.b = nn.Linear(16, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.body(x).relu()
        ...         return {"a": self.a(h), "b": self.b(h)}
        >>> model = Net()
        >>> pruner = apply_adapmtl(
        ...     model,
        ...     target_sparsity=0.75,
        ...     total_steps=20,
        ...     example_inputs=torch.randn(2, 8),
        ... )
        >>> optimizer = torch.optim.SGD(pruner.param_groups(lr=0.1))
        >>> for _ in range(20):
        ...     outputs = model(torch.randn(4, 8))
        ...     losses = {task: out.square().mean() for task, out in outputs.items()}
        ...     pruner.loss(losses).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     pruner.step()
        >>> pruner.sparsity()
        0.75
        >>> model = pruner.finalize()
        >>> layers = model.body, model.a, model.b  # of 176 weights together
        >>> sum(int((layer.weight == 0).sum()) for layer in layers)
        132
    """

    _model: nn.Module
    thresholds: Tensor

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        layers: Layers,
        controller: Controller,
        weighting: LossWeighting,
        *,
        unprunable: Mapping[str, int],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.__dict__["_model"] = model  # not a submodule: the model contains this module
        self.components = components
        self.layers = layers
        self.controller = controller
        self.weighting = weighting
        self.sparse_weights = SparseWeights(layers)
        self.tasks = weighting.tasks
        self.recorder = Recorder(components.names, layers, self.tasks, self.total_steps)
        self._unprunable = dict(unprunable)
        self._config = dict(config)
        self._step = 0
        # The step that the controller is prepared for, and whether an update is due after it.
        self._prepared: tuple[int, bool] | None = None
        self._finalized = False
        self._step_hook: StepHook | None = None
        self._watch = Watch()
        self._model_watch = ModelWatch(model, components, layers)
        self._unreached: object = None
        # Calls of `loss` since the last step, and which warnings about steps have been given.
        self._losses_since_step = 0
        self._warned: set[str] = set()
        # torch.nn.utils.prune.is_pruned(model) looks for a hook of this class.
        self.register_forward_pre_hook(SoftThresholdPruning())
        if any(layer.threshold.trained for layer in layers):
            # Saved for `plain_state_dict`.
            self.register_buffer("thresholds", controller.thresholds())
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    @property
    def target_sparsity(self) -> float:
        """What is pruned at the end, as a fraction: zeros, or the multiply-adds that they save."""
        return self.controller.target_sparsity

    @property
    def step_count(self) -> int:
        """Number of steps taken; at `total_steps` the run is at its end."""
        return self._step

    @property
    def zeros_fixed(self) -> bool:
        """Whether the zeros are fixed, so that the sparsity does not change any more."""
        return self.controller.fixed

    @property
    def total_steps(self) -> int:
        """Number of calls of `step` in the whole run."""
        return self.controller.total_steps

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the pruner, and its submodules with parameters (thresholds that are trained).

        The other submodules hold buffers. If `model.buffers()` contained these, averages of the
        model that were made before the pruner, which pair buffers by position, would raise errors,
        and `DistributedDataParallel` would send them in every step.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is self or module._parameters:
                yield name, module

    def forward(self, *args: Any) -> Any:
        """Return the input unchanged, because a model may call all its child modules in turn."""
        return args[0] if len(args) == 1 else args

    # --- in the training loop ---------------------------------------------------------------------

    def loss(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Weight the task losses, as `weighting` of `apply_adapmtl` says, and sum them.

        Args:
            losses: The loss of each task, a 0-d tensor. A task that is absent or None is skipped. A
                loss of exactly 0 says that the batch has no labels for the task.

        Returns:
            The weighted sum, 0-d, differentiable in the losses. The weights are detached and sum
            to the number of tasks.

        Raises:
            ValueError: If a task is unknown, a loss is not a scalar, there is no loss, or no loss
                requires grad although the model is in training mode with gradients enabled.
            TypeError: If `losses` is not a mapping, or a loss is not a floating-point tensor.
            RuntimeError: After `finalize`.

        Warns:
            UserWarning: Once, if `step` is not called at all between many calls of `loss`.
        """
        self._check_active("loss")
        record = self.weighting.record
        present = record.check(losses)
        learning = torch.is_grad_enabled() and record.note_gradients(present, self.training)
        total = self.weighting.weigh(present)
        if learning and self.training:
            self._prepare()
            self.controller.observe(present)
            self._losses_since_step += 1
            if self._losses_since_step == max(100, min(1000, self.total_steps)):
                self._warn_of_missing_steps()
        return total

    def _warn_of_missing_steps(self) -> None:
        if self._step < self.total_steps:
            self._warn_once(
                "missing",
                f"loss() was called {self._losses_since_step} times without a call of step(), so "
                f"that the sparsity does not change: call step() after each optimizer.step(), or "
                f"attach(optimizer) once",
            )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=4)

    def step(self) -> None:
        """Move the sparsity along its schedule; call it once after each step of the optimiser.

        Most calls only count the step. Every few steps the thresholds are solved from a sample
        of the weights, which waits for the device. When the schedule fixes the zeros (after 90 % of
        the steps by default), the sparse weights are written into the parameters: exactly
        `round(target_sparsity * N)` of them are zero, or, with `count="macs"`, as many as save that
        share of the multiply-adds. From then on masks keep these zeros, and the other weights train
        without a threshold.

        Raises:
            RuntimeError: After `finalize`, or while attached to an optimiser. Also, at an update
                and at the last step, if a loss has been NaN or infinite since the last check, or if
                the model is not the one that was prepared: a pruned layer was replaced, removed,
                masked by `torch.nn.utils.prune`, or got a parametrization that does not keep its
                zeros. The call does not count then.

        Warns:
            UserWarning: Once each: if no weight has changed in the first 50 steps or more, so that
                nothing trains them; if the loop writes weights from a copy in which nothing is
                pruned; if `step` was called more than `total_steps` times; for a task that has had
                no loss for longer than the window of its weight; if weights are pruned while they
                are frozen, or were unfrozen or added after `apply_adapmtl`.
        """
        if self._step_hook is not None:
            raise RuntimeError(
                "step() is called by the optimizer that attach() was given; leave out your own call"
            )
        self._advance()

    def _advance(self, *, in_step: bool = False) -> None:
        self._check_active("step")
        self._reshard()
        if self._step >= self.total_steps:
            self._losses_since_step = 0
            self.sparse_weights.catch_up(in_step=in_step)
            self._warn_once(
                "end",
                f"step() was called more than total_steps={self.total_steps} times. The run is at "
                f"its end, so that further calls do nothing; they are not needed while you train "
                f"on. To prune more slowly, pass a larger total_steps to apply_adapmtl",
            )
            return
        due = self._prepare()
        if due or not self._watch.begun:
            self._check_layers()
        if not self._watch.begun:
            with self.sparse_weights.dense():
                self._watch.begin(self._step, self.layers)
        last = self._step + 1 == self.total_steps
        # The paper's method counts zeros after every step, but must not wait for the device.
        waits = (due and self.controller.exact) or last
        written = self.sparse_weights.left_out()
        if waits:
            if self._subtract_skipped(uncounted=1):
                return  # the step count went back, so the due step comes later
            self.weighting.check_finite()
            self._watch.after(written)
        self._losses_since_step = 0
        self.sparse_weights.catch_up(in_step=in_step)
        # In other steps the controller needs no dense weights.
        with self.sparse_weights.dense() if due or last else nullcontext():
            if waits:
                texts = self._watch.look(self._step, self.layers, self.weighting.unseen())
                for text in texts + self._model_watch.look(self._model, self.layers):
                    warnings.warn(text, stacklevel=3)
            self._step += 1
            self.controller.step(self._step, due)
            self.sparse_weights.fix(self.controller.fixed)
        if self._step % self.controller.interval == 0:
            self.weighting.record.read()
        if (self._prepare() or self._step + 1 == self.total_steps) and written:
            self._watch.before(written)
        if last or self.recorder.due(self._step):
            self._record()

    def _record(self) -> None:
        self.recorder.record(self._step, self.layers, self.controller, self.weighting)

    def _prepare(self) -> bool:
        """Prepare the controller for the next step, once; return whether an update is due after."""
        if self._prepared is None or self._prepared[0] != self._step:
            due = self.controller.due(self._step + 1)
            if self._prepared is None:
                self._check_layers()
            if due or self._prepared is None:
                self.sparse_weights.renew_hooks()
            self.controller.prepare(self._step, due)
            self._prepared = self._step, due
        return self._prepared[1]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser call `step` after each of its steps, until `finalize`.

        Steps that a gradient scaler skips are not counted.

        Args:
            optimizer: The optimiser that trains the model; with several, the one that steps last.

        Raises:
            RuntimeError: If attached already, or after `finalize`.
            TypeError: If `optimizer` is not an optimiser.

        Example:
            >>> import torch
            >>> from torch_adapmtl import apply_adapmtl
            >>> model = torch.nn.Linear(4, 4)
            >>> pruner = apply_adapmtl(
            ...     model, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}
            ... )
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pruner.attach(optimizer)
            >>> pruner.loss({"main": model(torch.randn(2, 4)).square().mean()}).backward()
            >>> optimizer.step()
            >>> pruner.sparsity()
            0.5
        """
        self._check_active("attach")
        if self._step_hook is not None:
            raise RuntimeError(
                "attach() was called already: one optimizer moves the schedule; leave out this call"
            )

        self._step_hook = StepHook(optimizer, lambda: self._advance(in_step=True))

    def detach(self) -> None:
        """Undo `attach`; nothing happens if the pruner is not attached."""
        if self._step_hook is not None:
            self._subtract_skipped()
            self._step_hook.remove()
            self._step_hook = None

    def _subtract_skipped(self, uncounted: int = 0) -> bool:
        """Subtract optimiser steps that a gradient scaler skipped; return whether there were any.

        With a fused optimiser only the device knows the number, so this waits for the device.

        Args:
            uncounted: How many of the optimiser's steps the step count does not include yet.
        """
        skipped = self._skipped()
        if skipped:
            self._reset_skipped()
            self._step += uncounted - skipped
            self._prepare()
        return skipped > 0

    def _skipped(self) -> int:
        return 0 if self._step_hook is None else self._step_hook.skipped()

    def _reset_skipped(self) -> None:
        if self._step_hook is not None:
            self._step_hook.reset()

    def param_groups(
        self, *, threshold_lr: float | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Split the model's parameters into groups for an optimiser.

        The first group holds the model's parameters, with `options`. If `lr` is a mapping, there is
        a group for each component instead. Parameters that are not pruned, such as biases and
        norms, belong to the component of the nearest pruned tensor: the one whose name begins with
        the most equal parts, and of several the last one before it. If thresholds are trained
        (`Paper`, `STR` or `Adaptive(allocation="gradient")`), a last group holds what trains them,
        without weight decay, or with the weight decay of `Paper` or `STR`.

        Args:
            threshold_lr: Learning rate of the thresholds. If None, it is `lr`, or that of the first
                component.
            **options: Settings of the optimiser for each group: `lr`, `weight_decay`, … `lr` can be
                a mapping with a learning rate for each component, such as
                `{"shared": 1e-4, "seg": 1e-3, "depth": 1e-3}`.

        Raises:
            RuntimeError: After `finalize`.
            ValueError: If a learning rate is negative or not finite, or a mapping does not name
                exactly the components.
            TypeError: If a learning rate is not a number, or `options` holds `params`.
        """
        self._check_active("param_groups")
        return parameter_groups(
            self._model,
            self.components,
            self.parameters(),
            threshold_lr=threshold_lr,
            threshold_decay=self.controller.threshold_decay,
            options=options,
        )

    def retarget(self, target_sparsity: float, *, total_steps: int) -> None:
        """Continue to another target, higher or lower, in `total_steps` further steps.

        The schedule starts again, in the same shape, from the present sparsity of the model. If the
        target is higher, fixed zeros stay zero. If it is lower, pruned weights may become nonzero
        again, except those that were zero when the model was prepared.

        A state that is saved afterwards can be loaded only into a model that has been prepared and
        retargeted in the same way. This includes an average of the model.

        Args:
            target_sparsity: What is pruned at the end, as a fraction in [0, 1), of what the run
                counts.
            total_steps: How often `step` will be called from now on.

        Raises:
            ValueError: If an argument is out of range, or the bounds make the target impossible.
            RuntimeError: With a method other than `Adaptive`, the only one that can do this, or
                after `finalize`. After any of these errors the run can continue as before.

        Example:
            >>> import torch
            >>> from torch_adapmtl import apply_adapmtl
            >>> model = torch.nn.Linear(4, 4)
            >>> pruner = apply_adapmtl(
            ...     model, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}
            ... )
            >>> pruner.step()
            >>> pruner.retarget(0.75, total_steps=1)
            >>> pruner.sparsity()
            0.5
            >>> pruner.step()
            >>> pruner.sparsity()
            0.75
        """
        self._check_active("retarget")
        target_sparsity = check_fraction("target_sparsity", target_sparsity)
        total_steps = check_steps(total_steps)
        self._check_layers()
        zeros = self.layers.count_zeros()
        with self.sparse_weights.dense():
            self.controller.retarget(target_sparsity, total_steps, zeros)
            self.sparse_weights.fix(self.controller.fixed)
        self._reset_skipped()
        self.recorder.start += self._step
        self._step, self._prepared = 0, None
        self._prepare()

    # --- reports ----------------------------------------------------------------------------------

    @overload
    def sparsity(self, by: Literal["overall"] = "overall") -> float: ...
    @overload
    def sparsity(self, by: Literal["component", "layer"]) -> dict[str, float]: ...
    def sparsity(
        self, by: Literal["overall", "component", "layer"] = "overall"
    ) -> float | dict[str, float]:
        """Count the zeros in the weights that the model computes with; reads every weight.

        Args:
            by: `"overall"` for one number; `"component"` or `"layer"` for a dict by name.

        Returns:
            Zeros divided by prunable weights, as a fraction.

        Raises:
            ValueError: If `by` is another value.
            RuntimeError: After `finalize`.
        """
        self._check_active("sparsity")
        check_choice("by", by, ("overall", "component", "layer"))
        report = self.report()
        if by == "overall":
            return report.sparsity
        rows: Sequence[ComponentRow | LayerRow] = (
            report.components if by == "component" else report.layers
        )
        return {row.name: row.sparsity for row in rows}

    def report(self) -> Report:
        """Report how sparse every component and layer is now; reads every weight.

        Returns:
            An immutable result. It prints as a table, and a notebook renders it as one.

        Raises:
            RuntimeError: After `finalize`.
        """
        self._check_active("report")
        self._check_layers()
        alphas = self.controller.thresholds().tolist()
        rows = tuple(
            LayerRow(
                layer.name,
                layer.component,
                tuple(layer.weight.shape),
                zeros,
                alpha,
                layer.positions,
            )
            for layer, zeros, alpha in zip(
                self.layers, self.layers.count_zeros(), alphas, strict=True
            )
        )
        by_component = {
            name: [row for row in rows if row.component == name] for name in self.components.names
        }
        dense = [
            (tensor.name, reason, tensor.parameter.numel())
            for reason in (UNUSED, FROZEN)
            for tensor in self.components[reason]
        ]
        dense += [(name, "not prunable", size) for name, size in self._unprunable.items()]
        return Report(
            components=tuple(
                ComponentRow(
                    name,
                    len(members),
                    sum(row.weights for row in members),
                    sum(row.zeros for row in members),
                    total_macs(row.macs for row in members),
                    total_macs(row.macs_left for row in members),
                )
                for name, members in by_component.items()
            ),
            layers=rows,
            target_sparsity=self.target_sparsity,
            step=self._step,
            total_steps=self.total_steps,
            dense=dense,
            task_weights=self.weighting.as_dict(),
            losses=self.weighting.record.last(),
            has_thresholds=self.controller.has_thresholds,
            given=sum(count_zeros(layer.initial_mask) for layer in self.layers),
            count=self.layers.counts,
        )

    @property
    def history(self) -> History:
        """Sparsity, thresholds, task weights and losses over the run, as `step` has recorded them.

        At most 256 rows, which are part of the state dict. Reading them waits for the device;
        recording does not. The history can be read after `finalize` too.
        """
        return self.recorder.history(self.controller, self.layers)

    def postfix(self) -> dict[str, str]:
        """Return the present sparsity, the target and the task weights for a progress bar.

        With tqdm: `bar.set_postfix(pruner.postfix())`. It shows the last row of the history and
        waits for the device only if there is a new row, at most 256 times in a run.

        Returns:
            Short words by name; no words before the first row.

        Example:
            >>> import torch
            >>> from torch_adapmtl import apply_adapmtl
            >>> model = torch.nn.Linear(4, 4)
            >>> pruner = apply_adapmtl(
            ...     model, target_sparsity=0.5, total_steps=1, groups={"main": ["*"]}
            ... )
            >>> pruner.step()
            >>> pruner.postfix()
            {'sparsity': '50.0% of 50.0%', 'weights': 'main 1.00'}
        """
        return self.recorder.postfix(self.controller, self.layers)

    def __repr__(self) -> str:
        # One line in the model's repr, without the submodules.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Show the target and the progress of the run in the repr."""
        return f"target_sparsity={self.target_sparsity}, step={self._step} of {self.total_steps}"

    # --- the end ----------------------------------------------------------------------------------

    def fix_zeros(self) -> None:
        """Prune the model to its target now, independently of the schedule, and fix its zeros.

        `step` does this when the schedule reaches `fix_at`. Call `fix_zeros` to end the run early.
        Afterwards you may train without `step`, to let the remaining weights recover.

        Raises:
            RuntimeError: With `method="paper"`, which has no exact target, or after `finalize`.
        """
        self._check_active("fix_zeros")
        self._check_layers()
        if not self.controller.fixed:
            # The masks stay for training.
            with torch.inference_mode(False), self.sparse_weights.dense():
                self.controller.fix()
                self.sparse_weights.fix()
            self._record()
        # The steps that are left out are not counted in the history.
        self.recorder.start += self._step - self.total_steps
        self._step, self._prepared = self.total_steps, None
        self._warned.add("end")  # this end was called for
        self._reset_skipped()

    def finalize(self) -> nn.Module:
        """Write the zeros into the parameters and remove the pruner and its thresholds.

        The model has its original classes, state-dict keys and parameters again. Its outputs in
        eval mode under `torch.no_grad` stay bit-identical. (Under `torch.inference_mode` torch
        selects other matrix multiplications for some shapes.) Masks that `torch.nn.utils.prune` had
        on tensors before `apply_adapmtl` are restored, with the sparse weight under them.

        Returns:
            The model, changed in place. If `apply_adapmtl` was called on a wrapper of
            `torch.compile` or `DistributedDataParallel`, this is the module inside it.

        Raises:
            RuntimeError: If the zeros are not fixed yet, if the model is sharded, or after an
                earlier `finalize`. `method="paper"` has no exact target: it warns instead.

        Warns:
            UserWarning: If the run went wrong: a layer has no nonzero weight, one task has more
                than 80 % of the task weights, a task never had a loss, or only losses of 0 or
                losses that do not require grad, a loss ended far above its lowest value and near to
                what a guess costs, weights were pruned while they are frozen, or were unfrozen or
                added during the run, or (with `method="paper"`) the target was missed.
        """
        self._check_active("finalize")
        self._reshard()
        self._check_layers()
        if any(layer.sharded for layer in self.layers):
            raise RuntimeError(
                "finalize() was called on a sharded model (fully_shard), which cannot take its "
                "thresholds off in place: gather its state with torch.distributed.checkpoint."
                "state_dict.get_model_state_dict (full_state_dict=True), load that into a model "
                "prepared alike and not sharded, and finalize this one"
            )
        if self.controller.exact and not self.controller.fixed:
            weights, _ = self.layers.units
            raise RuntimeError(
                f"finalize() was called after {self._step} of total_steps={self.total_steps} "
                f"steps, and the zeros are not fixed yet: {self.report().pruned:.2%} of the "
                f"{weights} are pruned now, and {self.target_sparsity:.2%} are to be at the end. "
                f"Call fix_zeros() to prune the model to its target now (and train on to recover), "
                f"call step() after every optimizer step until the end, or call undo() to remove "
                f"the pruner without pruning."
            )
        self._warn()
        if self.controller.fixed:
            self._check_thresholds()
            with self.sparse_weights.dense():
                self.controller.write()
            self._check_exact()
        watch_zeros(self.layers)
        return self._leave(bake=True)

    def undo(self) -> nn.Module:
        """Remove the pruner without pruning: the opposite of `apply_adapmtl`.

        The parameters hold the dense weights that have been trained so far. Zeros that have been
        fixed stay in them, because their weights are not trained any more. After this,
        `apply_adapmtl` can be called again.

        Returns:
            The model, changed in place.

        Raises:
            RuntimeError: After `finalize` or `undo`.

        Example:
            >>> import torch
            >>> from torch_adapmtl import apply_adapmtl
            >>> model = torch.nn.Linear(4, 4)
            >>> pruner = apply_adapmtl(
            ...     model, target_sparsity=0.5, total_steps=9, groups={"main": ["*"]}
            ... )
            >>> pruner.undo() is model, hasattr(model, "adapmtl")
            (True, False)
        """
        self._check_active("undo")
        self.sparse_weights.to_dense()
        return self._leave(bake=False)

    def _begin(self) -> None:
        """Make the parameters sparse, and watch them, now that the model contains the pruner."""
        self.controller.begin()
        self.sparse_weights.attach()
        watch_forward(self._model)
        self._unreached = watch_unreached(self.components)

    def _leave(self, *, bake: bool) -> nn.Module:
        for layer in self.layers:
            layer.remove(bake=bake)
        self.sparse_weights.detach()
        self.detach()
        unguard(self._model, self.layers)
        stop_watching(self._model)
        stop_warning(self._unreached)
        self._model._modules.pop("adapmtl", None)
        if is_graph(self._model):
            let_pruner_go(self._model)
        self._finalized = True
        return self._model

    def _check_thresholds(self) -> None:
        for layer in self.sparse_weights.layers:
            if alpha := layer.threshold.known():
                raise RuntimeError(
                    f"finalize() found the threshold {alpha} on {layer.name!r}, although "
                    f"{type(self.controller).__name__} has fixed the zeros: its thresholds or "
                    f"masks have been changed since. Leave both alone after fix_zeros()"
                )

    def _check_exact(self) -> None:
        zeros, wanted = self.layers.count_zeros(), self.controller.budget
        if not self.layers.meets(zeros, wanted):
            raise RuntimeError(
                f"finalize() found {self.layers.cost(zeros):.12g} {self.layers.units[1]} in place "
                f"of the {wanted:.12g} that {type(self.controller).__name__} has fixed: its "
                f"thresholds or masks have been changed since. Leave both alone after fix_zeros()"
            )

    def _warn(self) -> None:
        """Warn of everything that went wrong in the run."""
        report = self.report()
        for text in self._model_watch.look(self._model, self.layers):
            warnings.warn(text, stacklevel=3)
        adaptive = isinstance(self.weighting, StabilityWeighting)  # others are constant or chosen
        texts = signs(
            report,
            self.weighting.record,
            task_weights=report.task_weights if adaptive else {},
        )
        if reason := self.controller.missed(report.pruned):
            texts.append(
                f"the run ended at a sparsity of {report.pruned:.2%}, not "
                f"{self.target_sparsity:.2%}: {reason}"
            )
        for text in texts:
            warnings.warn(text, stacklevel=3)

    def _check_active(self, method: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{method}() was called after finalize() or undo(): the model is plain again. Call "
                f"apply_adapmtl to prune it further."
            )

    def _reshard(self) -> None:
        """Shard parameters again, which `fully_shard` leaves whole after an evaluation."""
        if self.sparse_weights.sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _check_layers(self) -> None:
        """Raise an error unless the model computes with exactly the layers that are pruned."""
        self._reshard()
        parameters = {id(parameter) for parameter in self._model.parameters()}
        for layer in self.layers:
            if problem := layer.problem(parameters) or self._model_watch.problem(layer):
                raise RuntimeError(f"{layer.name!r} {problem}")
            if not self.controller.shardable and layer.sharded:
                raise RuntimeError(
                    f"{layer.name!r} is sharded (fully_shard), so that neither gradients nor "
                    f"thresholds that gradients train are seen whole: use allocation='lamp' or "
                    f"'common', or DistributedDataParallel"
                )

    # --- state and copies -------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if "thresholds" in self._buffers:
            self.thresholds = self.controller.thresholds()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def get_extra_state(self) -> Tensor:
        """Return the config, the progress and the masks of the run, as a CPU tensor of bytes."""
        progress = {
            **self._aim(),
            "step": self._step - self._skipped(),
            "fixed": self.controller.fixed,
            "initial": self.controller.initial,
            "had": self.weighting.record.had_losses(),
            "history": self.recorder.progress(),
        }
        return save(self._config, progress, self.layers)

    @torch.inference_mode(False)  # so that the loaded masks can be used in training
    def set_extra_state(self, state: Tensor) -> None:
        """Load what `get_extra_state` returned.

        Raises:
            ValueError: If the state is damaged, or comes from another version or from a run with
                another config. Nothing is changed then, because the state dict of a whole model is
                checked before any of it is loaded.
        """
        progress = load(state, self._expected_state(), self.layers)
        self._step = progress["step"]
        self._reset_skipped()
        self.controller.fixed, self.controller.initial = progress["fixed"], progress["initial"]
        self.weighting.record.set_had_losses(progress.get("had", ()))
        self.recorder.set_progress(progress["history"])

    def _expected_state(self) -> dict[str, Any]:
        """The values that a state must have to be loaded: the target and the config."""
        return {**self._aim(), **self._config}

    def _aim(self) -> dict[str, Any]:
        return {"total_steps": self.total_steps, "target_sparsity": self.target_sparsity}

    def __getstate__(self) -> dict[str, Any]:
        # The step hook belongs to an optimiser of the original model. Hooks of the controller on
        # parameters are not copied either, so the copy must be prepared again.
        state = {**self.__dict__, "_step_hook": None, "_prepared": None}
        if is_graph(self._model):  # which sets it again, because it cannot contain itself
            state["_model"] = None
        return state


def _refresh(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, Pruner)
    module.weighting.record.forget()
    module.controller.refresh()
    module.sparse_weights.loaded(module.controller.fixed)
    module._prepared = None
    module._prepare()
