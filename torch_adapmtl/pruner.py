"""The handle on a model that is being made sparse."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from torch_adapmtl.run._step_hook import Attachment
from torch_adapmtl._checks import check_fraction, check_rate, check_steps
from torch_adapmtl.methods._base import Controller
from torch_adapmtl.run._guard import unguard
from torch_adapmtl.run.diagnostics import LossTrace, Watch, signs
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.run._measure import measure
from torch_adapmtl.run.checkpoint import load, save
from torch_adapmtl.components.find import Components
from torch_adapmtl.run.report import ComponentRow, LayerRow, Report
from torch_adapmtl.weighting.simple import LossWeighting, StabilityWeighting

__all__ = ["AdapMTL"]


class AdapMTL(nn.Module):
    """The handle that [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] returns.

    It lives in the model as the submodule `adapmtl`: it moves with the model, its state is part of
    the model's `state_dict`, and a copy of the model carries a copy of the handle. Saving
    `model.state_dict()` and loading it into a freshly prepared model resumes a run.

    Attributes:
        components: What was found in the model.
        tasks: The task names, in order.
        target_sparsity: Zeros among all prunable weights at the end, as a fraction.
        total_steps: Number of calls of `step` until then.
        weighting: The loss weighting.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_adapmtl import apply_adapmtl
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 1)
        ...
        ...     def forward(self, x):
        ...         h = self.body(x).relu()
        ...         return {"a": self.a(h), "b": self.b(h)}
        >>> model = Net()
        >>> pruner = apply_adapmtl(
        ...     model, target_sparsity=0.75, total_steps=20, example_inputs=torch.randn(2, 8)
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

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        others: Sequence[tuple[str, int]],
        layers: Sequence[Layer],
        budget: Controller,
        weighting: LossWeighting,
        *,
        target_sparsity: float,
        total_steps: int,
        options: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.__dict__["_model"] = model  # not a submodule: this module is one of the model's
        self.components = components
        self.tasks = weighting.tasks
        self.target_sparsity = target_sparsity
        self.total_steps = total_steps
        self.budget = budget
        self.weighting = weighting
        self._others = tuple(others)
        self._options = dict(options)
        self._layers = list(layers)
        self._step = 0
        self._finalized = False
        self._attached: Attachment | None = None
        self._watch = Watch()
        self.trace = LossTrace(self.tasks).to(weighting.device)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any) -> Any:
        """Return the input: a model that runs its children in a row runs this one too."""
        return args[0] if len(args) == 1 else args

    # --- in the training loop -------------------------------------------------------------------

    def loss(self, losses: Mapping[str, Tensor | None]) -> Tensor:
        """Weight the task losses and sum them (AdapMTL, Section 3, adaptive weighting).

        Args:
            losses: For each task its loss, a 0-d tensor. A task that is absent or None is skipped.

        Returns:
            The weighted sum, 0-d, differentiable in the losses. The weights are detached and sum
            to the number of tasks.

        Raises:
            ValueError: If a task is unknown, a loss is not a scalar, there is none, or none of them
                requires grad while the model trains (in training mode, with gradients enabled).
            TypeError: If `losses` is no mapping, or a loss no floating-point tensor.
            RuntimeError: After `finalize`.
        """
        self._check_active("loss")
        present = self.weighting.check_losses(losses)
        learning = torch.is_grad_enabled() and self.trace.watch(present, self.training)
        total: Tensor = self.weighting(losses)
        if learning:
            if self.budget.asleep:
                self.budget.wake(self._step)
            self.budget.observe(present)
        return total

    def step(self) -> None:
        """Move the sparsity along its schedule; call it once after each step of the optimiser.

        Most calls only count. Every few steps the thresholds are solved for anew, from a sample of
        the weights, which waits for the device. When the schedule says that the zeros are
        settled (after 90 % of the steps by default), the sparse weights are written into the
        parameters, exactly `round(target_sparsity * N)` of them zero, and masks hold these zeros
        from then on, while the other weights train on without a threshold.

        Raises:
            RuntimeError: If called more than `total_steps` times, after `finalize`, while
                attached to an optimiser, or, where an update is due and at the last step, if a
                loss was not finite since the one before. The call does not count then.

        Warns:
            UserWarning: Once, if no weight has changed in the first 50 steps or more: nothing
                trains them.
        """
        if self._attached is not None:
            raise RuntimeError(
                "step() is called by the optimizer that attach() was given; leave out your own call"
            )
        self._advance()

    def _advance(self) -> None:
        self._check_active("step")
        if self._step >= self.total_steps:
            raise RuntimeError(
                f"step() was called more than total_steps={self.total_steps} times. The model is "
                f"at its target and its zeros are held: train on without calling step(), or call "
                f"finalize(). To prune more slowly, pass a larger total_steps to apply_adapmtl."
            )
        self._watch.begin(self._step, self._layers)
        due = self.budget.due(self._step + 1)
        if due:
            self._check_layers()
        # Paper mode looks at the weights after every step, but never waits for the device.
        if (due and self.budget.exact) or self._step + 1 == self.total_steps:
            if self._uncount(1):
                return  # as many steps short of the update
            self.weighting.check_finite()
            for text in self._watch.look(self._step, self._layers, self.weighting.unseen()):
                warnings.warn(text, stacklevel=3)
        self._step += 1
        self.budget.step(self._step)
        if self._step % self.budget.interval == 0 and self.weighting.latest is not None:
            self.trace.read(*self.weighting.latest)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser call `step` after each of its steps, until `finalize`.

        Steps beyond `total_steps` are not counted, nor those that a gradient scaler skips.

        Args:
            optimizer: The optimiser that trains the model; with several, the one that steps last.

        Raises:
            RuntimeError: If attached already, or after `finalize`.
            TypeError: If `optimizer` is none.

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
        if self._attached is not None:
            raise RuntimeError(
                "attach() was called already: one optimizer moves the schedule; leave out this call"
            )

        def after_step() -> None:
            if self._step < self.total_steps:
                self._advance()

        self._attached = Attachment(optimizer, after_step)

    def detach(self) -> None:
        """Undo `attach`; nothing happens if there is nothing to undo."""
        if self._attached is not None:
            self._uncount()
            self._attached.remove()
            self._attached = None

    def _uncount(self, uncounted: int = 0) -> bool:
        """Take back the steps that the optimiser left out, of which so many are not counted yet.

        Which ones it left out only the device may know, so this waits for it.
        """
        skipped = self._skipped()
        if skipped:
            self._settle_skipped()
            self._step += uncounted - skipped
            self.budget.wake(self._step)
        return skipped > 0

    def _skipped(self) -> int:
        return 0 if self._attached is None else self._attached.skipped()

    def _settle_skipped(self) -> None:
        if self._attached is not None:
            self._attached.settle()

    def param_groups(
        self, *, threshold_lr: float | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Split the model's parameters into groups for an optimiser.

        The first group holds the model's own parameters, with `options`. Where thresholds are
        trained (`allocation="gradient"`, `mode="paper"`) a second one holds them, without weight
        decay, or in paper mode with the paper's.

        Args:
            threshold_lr: Learning rate of the thresholds; `lr` if None.
            **options: What the optimiser takes for each group: `lr`, `weight_decay`, …

        Raises:
            RuntimeError: After `finalize`.
            ValueError: If a learning rate is negative or not finite.
            TypeError: If one is no number, or `options` holds `params`.
        """
        self._check_active("param_groups")
        if "params" in options:
            raise TypeError("params must be left out: param_groups puts the parameters in itself")
        check_rate("threshold_lr", threshold_lr)
        check_rate("lr", options.get("lr"))
        learned = {id(p): p for p in self.parameters()}
        own = [p for p in self._model.parameters() if id(p) not in learned]
        groups: list[dict[str, Any]] = [{"params": own, **options}]
        if learned:
            group = {"params": list(learned.values()), **options}
            group["weight_decay"] = self.budget.threshold_decay
            if threshold_lr is not None:
                group["lr"] = threshold_lr
            groups.append(group)
        return groups

    def retarget(self, target_sparsity: float, *, total_steps: int) -> None:
        """Go on to another target, higher or lower, in `total_steps` further steps.

        The schedule starts anew, in the same shape, from the sparsity that the model has. Zeros
        that have settled stay zero if the target is higher; if it is lower, they may return,
        except those that the model had when it was prepared.

        A state that is saved afterwards is loaded into a model that has been prepared and then
        retargeted in the same way, and so is that of an average of the model.

        Args:
            target_sparsity: Zeros among all prunable weights at the end, as a fraction in [0, 1).
            total_steps: How often `step` will be called from now on.

        Raises:
            ValueError: If an argument is out of range, or bounds leave no room for the target.
            RuntimeError: In paper mode and with baselines, which follow no schedule that could be
                changed, or after `finalize`. The run goes on as before then, as after the others.

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
        self.budget.retarget(target_sparsity, total_steps, self.report().zeros)
        self._settle_skipped()
        self.target_sparsity, self.total_steps, self._step = target_sparsity, total_steps, 0

    # --- looking at it --------------------------------------------------------------------------

    @overload
    def sparsity(self, by: Literal["overall"] = "overall") -> float: ...
    @overload
    def sparsity(self, by: Literal["component", "layer"]) -> dict[str, float]: ...
    def sparsity(
        self, by: Literal["overall", "component", "layer"] = "overall"
    ) -> float | dict[str, float]:
        """Count the zeros in the weights as the model sees them now; reads every weight.

        Args:
            by: `"overall"` for one number; `"component"` or `"layer"` for one by name.

        Returns:
            Zeros / prunable weights, as a fraction.

        Raises:
            ValueError: If `by` is none of these.
        """
        self._check_active("sparsity")
        if by not in ("overall", "component", "layer"):
            raise ValueError(f"by must be 'overall', 'component' or 'layer', got {by!r}")
        report = self.report()
        if by == "overall":
            return report.sparsity
        rows: Sequence[ComponentRow | LayerRow] = (
            report.components if by == "component" else report.layers
        )
        return {row.name: row.sparsity for row in rows}

    def report(self) -> Report:
        """Say how sparse every component and layer is now; reads every weight.

        Returns:
            A frozen result that prints as a table and renders as one in a notebook.
        """
        self._check_active("report")
        return measure(
            self._layers,
            self.budget.thresholds(),
            self.components,
            self._others,
            target_sparsity=self.target_sparsity,
            step=self._step,
            total_steps=self.total_steps,
            task_weights=dict(zip(self.tasks, self.weighting.weights().tolist(), strict=True)),
        )

    def __repr__(self) -> str:
        # One line in the model's repr, without the inner workings.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Show where the run stands."""
        return f"target_sparsity={self.target_sparsity}, step={self._step} of {self.total_steps}"

    # --- the end --------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Prune the model to its target now, whatever the schedule says, and hold its zeros.

        `step` does this by itself when the schedule says so. Call it to end early; train on as long
        as you like, without `step`, to let the remaining weights recover.

        Raises:
            RuntimeError: In paper mode, which has no exact target, or after `finalize`.
        """
        self._check_active("freeze")
        self._check_layers()
        if not self.budget.frozen:
            self.budget.freeze()
        self._step = self.total_steps
        self._settle_skipped()

    def finalize(self) -> nn.Module:
        """Leave a plain model: its own classes, keys and parameters, the zeros written in.

        Outputs in eval mode under `torch.no_grad` are bit for bit what they were before (under
        `torch.inference_mode` torch multiplies some shapes otherwise). Masks that
        `torch.nn.utils.prune` had put on tensors before are put back, with the sparse weight
        under them.

        Returns:
            The model, changed in place (without the wrapper of `torch.compile` or
            `DistributedDataParallel`, if it was given with one).

        Raises:
            RuntimeError: If the target is not reached yet, if the model is sharded, or after a
                `finalize` before. Paper mode has no exact target: it warns instead.

        Warns:
            UserWarning: If the run went wrong: all components are equally sparse though they were
                free to differ, a layer has no weight left, one task has nearly all the weight, a
                task never had a loss or one that requires grad, a loss ended far above where it
                began, or (in paper mode) the target was missed.
        """
        self._check_active("finalize")
        if any(layer.sharded for layer in self._layers):
            raise RuntimeError(
                "finalize() was called on a sharded model (fully_shard), which cannot take its "
                "thresholds off in place: gather its state with torch.distributed.checkpoint."
                "state_dict.get_model_state_dict (full_state_dict=True), load that into a model "
                "prepared alike and not sharded, and finalize this one"
            )
        if self.budget.exact and not self.budget.frozen:
            raise RuntimeError(
                f"finalize() was called after {self._step} of total_steps={self.total_steps} "
                f"steps: the model is {self.sparsity():.2%} sparse, and becomes exactly "
                f"{self.target_sparsity:.2%} sparse when its zeros settle. Call freeze() to "
                f"prune it to its target now (and train on to recover), or call step() after every "
                f"optimizer step until the end."
            )
        self._warn()
        self.budget.settle()
        for layer in self._layers:
            layer.remove()
        self.detach()
        unguard(self._model)
        del self._model._modules["adapmtl"]
        self._finalized = True
        return self._model

    def _warn(self) -> None:
        """Warn of what went wrong in the run."""
        report = self.report()
        adaptive = isinstance(self.weighting, StabilityWeighting)  # others are the user's choice
        found = signs(
            report,
            self.trace,
            allocated=self.budget.allocates,
            task_weights=report.task_weights if adaptive else {},
        )
        if reason := self.budget.missed(report.sparsity):
            found.append(
                f"the run ended at a sparsity of {report.sparsity:.2%}, not "
                f"{self.target_sparsity:.2%}: {reason}"
            )
        for text in found:
            warnings.warn(text, stacklevel=3)

    def _check_active(self, method: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{method}() was called after finalize(): the model is plain again. Call "
                f"apply_adapmtl to prune it further."
            )

    def _check_layers(self) -> None:
        for layer in self._layers:
            if not layer.attached:
                raise RuntimeError(
                    f"the soft threshold on {layer.name!r} was removed (by "
                    f"torch.nn.utils.prune.remove, for instance) while the model is being pruned: "
                    f"call finalize() instead of removing thresholds one by one"
                )
            if not self.budget.shardable and layer.sharded:
                raise RuntimeError(
                    f"{layer.name!r} is sharded (fully_shard), so that neither gradients nor "
                    f"thresholds that gradients train are seen whole: use allocation='lamp' or "
                    f"'common', or DistributedDataParallel"
                )

    # --- state and copies -----------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Where the run stands, and the masks, as a tensor of bytes on the CPU."""
        progress = {
            **self._aim(),
            "step": self._step - self._skipped(),
            "frozen": self.budget.frozen,
            "initial": self.budget.initial,
            "had": self.trace.had(),
        }
        return save(self._options, progress, self._layers)

    @torch.inference_mode(False)  # masks are for training, wherever they are loaded
    def set_extra_state(self, state: Tensor) -> None:
        """Load what `get_extra_state` returned.

        Raises:
            ValueError: If it is damaged, or comes from another version or a run with other
                settings. Nothing is changed then: the state dict of a whole model is looked at
                before any of it is loaded.
        """
        loaded = load(state, self._settings(), self._layers)
        self._step = loaded["step"]
        self._settle_skipped()
        self.budget.frozen, self.budget.initial = loaded["frozen"], loaded["initial"]
        self.trace.note(loaded.get("had", ()))

    def _aim(self) -> dict[str, Any]:
        return {"total_steps": self.total_steps, "target_sparsity": self.target_sparsity}

    def _settings(self) -> dict[str, Any]:
        """What a state that is loaded has to agree with."""
        return {**self._aim(), **self._options}

    def __getstate__(self) -> dict[str, Any]:
        # The hook belongs to an optimiser of the original's parameters.
        return {**self.__dict__, "_attached": None}


def _refresh(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, AdapMTL)
    module.weighting.forget()
    module.budget.refresh()
    module.budget.wake(module._step)
