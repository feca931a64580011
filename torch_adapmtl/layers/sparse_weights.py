"""Parameters that hold the sparse weights, except during an optimiser's step."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from torch_adapmtl._distributed import is_sharded, local, local_mask, sharded_like
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.gradient_hooks import GradientHooks, in_backward, registered
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.layers.optimizer_hooks import (
    follow,
    followers,
    kept_parameters,
    running_steps,
    unfollow,
)
from torch_adapmtl.tensor._kernels import Shrinkage, batches, drop_zeros_, mask_, shrink_

__all__ = [
    "SparseWeights",
    "forget_residual",
    "pruned_parameter",
    "stop_watching",
    "watch_forward",
]


class SparseWeights(nn.Module):
    """Keeps the sparse weights of the layers in their parameters, so that modules stay plain.

    A layer's parameter holds the sparse weight. The residual, which is the dense weight minus the
    sparse weight, is stored here. Just before an optimiser's step the residual is added to the
    parameter, so that the optimiser updates the dense weight. Just after the step the threshold and
    the mask are applied to the new dense weight. All other code that reads or writes the parameter,
    forward and backward passes included, sees the sparse weight. No rounding error arises.

    The gradient of the sparse weight is used for the dense weight (it is straight-through). Hooks
    on the parameters set the gradients of pruned weights to zero if these must not be trained; just
    before an optimiser's step this is done for gradients that no backward pass has accumulated.

    Torch calls hooks before and after the step of any `torch.optim.Optimizer`. If a loop updates
    the parameters in another way, `catch_up` applies the thresholds later. Such an update is one of
    the sparse weights; the result differs only if it depends on the weights themselves, as weight
    decay does.

    Layers whose threshold is trained are left out. They have a parametrization, through which the
    gradient reaches the threshold. So have layers whose sparse weight is another function than the
    soft threshold: the residual could not be added again without a rounding error.

    Args:
        layers: The layers.
        fixed: Whether the zeros are fixed from the start, so that no residuals are needed.

    Attributes:
        layers: The layers, without those whose threshold is trained.
        fixed: Whether the zeros are fixed. Masks hold them then, and all residuals are zero.
        sharded: Whether residuals are sharded, as their parameters are (`fully_shard`).
    """

    def __init__(self, layers: Layers, *, fixed: bool = False) -> None:
        super().__init__()
        self.fixed, self.sharded = fixed, False
        self.layers = [layer for layer in layers if not layer.threshold.trained]
        # As submodules, the thresholds move to other devices with the model.
        self.thresholds = nn.ModuleList(layer.threshold for layer in self.layers)
        with torch.inference_mode(False):
            for i, layer in enumerate(() if fixed else self.layers):
                self.register_buffer(f"residual_{i}", torch.zeros_like(layer.weight.detach()))
        # Layers whose residual may not be zero.
        self._shrunk: set[int] = set()
        self._start()

    def attach(self) -> None:
        """Apply the thresholds from now on."""
        follow(self)
        self.to_sparse()
        self.renew_hooks()  # before other hooks, which see the gradients that the optimiser uses

    def release(self) -> None:
        """Write the zeros a last time, and undo `attach` and the attachment of the layers."""
        self.to_sparse()
        for layer in self.layers:
            layer.remove()
        self.detach()

    def _start(self) -> None:
        """Set what a copy does not share with its original."""
        # The layers that each running step has made dense. An optimiser can have several: its class
        # may call the step of its base class, and torch calls the hooks for both.
        self._stepping: weakref.WeakKeyDictionary[Optimizer, list[set[int]]]
        self._stepping = weakref.WeakKeyDictionary()
        # The parameters that the thresholds were applied to last.
        self._used: dict[int, weakref.ref[nn.Parameter]] = {}
        # Layers that no optimiser has updated since the last call of `catch_up`.
        self._behind = self._all()
        # The gradient of each layer that was masked last.
        self._masked: dict[int, TensorWeakRef] = {}
        self._hooks = GradientHooks(self.layers, self._mask_gradient)

    # --- dense and sparse weights -----------------------------------------------------------------

    @torch.no_grad()
    def to_dense(self, indices: Iterable[int] | None = None) -> set[int]:
        """Write the dense weights into the parameters of these layers, or of all.

        Returns:
            The indices of the layers that were sparse before.
        """
        wanted, layers = self._all() if indices is None else indices, self.layers
        changed = {i for i in wanted if not layers[i].dense and layers[i].held is not None}
        for i in changed:
            layers[i].dense = True
        shrunk = sorted(changed & self._shrunk)
        if shrunk:
            weights = [local(layers[i].weight) for i in shrunk]
            torch._foreach_add_(weights, [local(self._residual(i)) for i in shrunk])
        return changed

    @torch.no_grad()
    def to_sparse(self, indices: Iterable[int] | None = None) -> None:
        """Apply the thresholds and masks to the dense weights of these layers, or of all."""
        wanted = self._all() if indices is None else set(indices)
        self.to_dense(wanted)
        present = [i for i in sorted(wanted) if self.layers[i].held is not None]
        shrinkages = {i: s for i in present if (s := self._shrinkage(i)) is not None}
        for batch in batches(shrinkages):
            shrink_(list(batch.values()))
            for i in batch:  # at once: the next batch may be interrupted
                self.layers[i].dense = False
        for i in present:
            layer = self.layers[i]
            layer.dense = False
            if self.fixed and (mask := layer.threshold.mask) is not None:
                mask_(local(layer.weight), local_mask(mask, layer.weight))

    def _ours(self, index: int, weight: nn.Parameter) -> bool:
        """Whether this is the parameter that the threshold was applied to last."""
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return False
        used = self._used.get(index)
        return used is None or used() is weight

    def _all(self) -> set[int]:
        return set(range(len(self.layers)))

    def _shrinkage(self, index: int) -> Shrinkage | None:
        """What the threshold and the mask do with a layer; None for nothing, or a fixed mask."""
        threshold, weight = self.layers[index].threshold, self.layers[index].weight
        self._used[index] = weakref.ref(weight)
        if self.fixed:
            return None
        alpha, mask = threshold.known(), threshold.mask
        residual = local(self._residual(index))
        if alpha > 0.0 or mask is not None:
            self._shrunk.add(index)
            mask = None if mask is None else local_mask(mask, weight)
            return Shrinkage(local(weight), residual, alpha, threshold.reach, mask, threshold.scale)
        if index in self._shrunk:
            residual.zero_()
            self._shrunk.remove(index)
        return None

    def _residual(self, index: int) -> Tensor:
        name, weight = f"residual_{index}", self.layers[index].weight
        residual = self._buffers[name]
        assert residual is not None
        if is_sharded(weight) and not is_sharded(residual):  # `fully_shard` was called in between
            with torch.inference_mode(False), torch.no_grad():
                residual = self._buffers[name] = sharded_like(weight, residual)
            self.sharded = True
        return residual

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let all parameters hold the dense weights, and the sparse weights again afterwards."""
        self.to_dense()
        try:
            yield
        finally:
            self.to_sparse()

    def left_out(self) -> list[Layer]:
        """Return the sparse layers that no optimiser has updated since the last `catch_up`."""
        left_out = (self.layers[i] for i in sorted(self._behind))
        return [layer for layer in left_out if not layer.dense and layer.held is not None]

    def catch_up(self, *, in_step: bool = False) -> None:
        """Apply the thresholds of the layers that no optimiser has updated since the last call.

        Also of those that are dense because an optimiser's step has raised an error.

        Args:
            in_step: Whether an optimiser's step calls this, at whose end its layers follow.
        """
        if in_step:
            running = [indices for steps in self._stepping.values() for indices in steps]
            self.to_sparse(self._behind.difference(*running))
        else:
            dense = {i for i, layer in enumerate(self.layers) if layer.dense}
            self.to_sparse(self._behind | dense)
            self._stepping.clear()
        self._behind = self._all()

    @torch.no_grad()
    def fix(self, fixed: bool = True) -> None:
        """Let masks hold the zeros from now on, without residuals; or undo this."""
        self.fixed = fixed
        if fixed:
            for i in sorted(self._shrunk):
                local(self._residual(i)).zero_()
            self._shrunk = set()

    def loaded(self, fixed: bool) -> None:
        """Use the parameters and residuals of a state dict that was loaded."""
        for layer in self.layers:
            layer.dense = False
        self._shrunk = self._all()
        self.fix(fixed)
        self.to_sparse()  # changes nothing if the weights were loaded with the residuals

    @torch.no_grad()
    def before_forward(self) -> None:
        """Make sure that a forward pass uses the sparse weights, whoever has written to them.

        An optimiser's step that raises an error leaves dense weights. An average of the weights,
        or an earlier state, may have been copied into the parameters after the zeros were fixed.
        """
        if dense := {i for i, layer in enumerate(self.layers) if layer.dense}:
            self.to_sparse(dense)
        elif self.fixed:
            for i, layer in enumerate(self.layers):
                mask, weight = layer.threshold.mask, layer.held
                # Another tensor can be in its place for the time of a `functional_call`.
                if mask is not None and weight is not None and self._ours(i, weight):
                    # Through `.data`, because the weight may be part of a graph, whose backward
                    # pass checks the version. If the zeros are there, nothing changes.
                    mask_(local(weight.data), local_mask(mask, weight))

    # --- optimisers -------------------------------------------------------------------------------

    def kept(self) -> set[int]:
        """Return the `id` of each parameter that is kept sparse."""
        return {id(layer.held) for layer in self.layers}

    def begin_step(
        self, optimizer: Optimizer, parameters: Collection[int], *, closure: bool
    ) -> bool:
        """Make the layers dense whose parameters, given by `id`, the optimiser is about to update.

        Args:
            optimizer: The optimiser.
            parameters: The `id` of each of its parameters.
            closure: Whether it has a closure, which computes the gradients.

        Returns:
            Whether there are any.
        """
        indices = [i for i, layer in enumerate(self.layers) if id(layer.held) in parameters]
        if indices:
            if not self._hooks.registered:  # in a copy
                self.renew_hooks()
            self._mask_gradients(indices)
            if not closure:
                self._show_gradients(indices)
            changed, steps = self._to_step(indices), self._stepping.setdefault(optimizer, [])
            if steps:
                outer = running_steps(optimizer) - 1
                changed = changed.union(*steps[outer:])  # of steps that have raised an error
                del steps[outer:]
            steps.append(changed)
        return bool(indices)

    def _to_step(self, indices: Iterable[int]) -> set[int]:
        """Make layers dense for an optimiser's update, and return those that were sparse before.

        The step of an optimiser such as AdaHessian differentiates the gradients again. Their graph
        holds the sparse weights, which must not be written to before. So layers whose gradient has
        a graph are updated as sparse weights, and the residual is added after the step.
        """
        sparse = {i for i in indices if not self.layers[i].dense}
        self.to_dense(i for i in sparse if not _has_graph(self.layers[i].held))
        return sparse

    def end_step(self, optimizer: Optimizer) -> None:
        """Apply the thresholds of the layers that `begin_step` was called with."""
        if steps := self._stepping.get(optimizer):
            indices = steps.pop()
            self._behind -= indices
            self.to_sparse(indices)

    @contextmanager
    def paused_step(self) -> Iterator[None]:
        """Make the layers sparse during a step, while the optimiser calls its closure."""
        indices = {i for i, layer in enumerate(self.layers) if layer.dense}
        self.to_sparse(indices)
        try:
            yield
        finally:
            self._mask_gradients(indices)
            self._show_gradients(indices)
            self._to_step(indices)

    # --- gradients of pruned weights --------------------------------------------------------------

    def renew_hooks(self) -> None:
        """Register the hooks on the gradients again if parameters were replaced or unfrozen."""
        self._hooks.listen(True)

    def _show_gradients(self, indices: Iterable[int]) -> None:
        """Show gradients to others that use them and that no backward pass shows them to."""
        others = [hooks for hooks in registered() if hooks is not self._hooks]
        if others:
            parameters = {id(self.layers[i].held) for i in indices}
            for hooks in others:
                hooks.before_step(parameters)

    def _mask_gradients(self, indices: Iterable[int]) -> None:
        """Mask the gradients that no hook has masked.

        A loop has put them into `grad`; or the optimiser steps in the backward pass, which may have
        added to a gradient that was masked in an earlier one.
        """
        adding = in_backward()
        for i in indices:
            weight, masked = self.layers[i].held, self._masked.get(i)
            if weight is None or weight.grad is None or self.layers[i].dense:
                continue
            if adding or masked is None or masked() is not weight.grad:
                with torch.set_grad_enabled(weight.grad.requires_grad):
                    self._mask_gradient(i, weight)

    def _mask_gradient(self, index: int, weight: nn.Parameter) -> None:
        # This runs between the kernels of the backward pass, where each operation counts.
        layer, gradient = self.layers[index], weight.grad
        threshold = layer.threshold
        mask = threshold.mask
        if threshold.gradient_mask is not None and not self.fixed:
            mask = threshold.gradient_mask
        regrows = self.fixed or threshold.straight_through or threshold.known() == 0.0
        # A mask that was set in this step acts from the next on.
        acts = self.fixed or index in self._shrunk
        if gradient is None or not acts or (regrows and mask is None):
            return
        if gradient.layout != torch.strided:
            return
        kept = local_mask(mask, weight) if regrows else None
        if gradient.requires_grad:  # backward(create_graph=True)
            keep = weight.detach() != 0 if kept is None else kept
            weight.grad = gradient = torch.where(keep, gradient, 0.0)
        elif kept is None:
            drop_zeros_(local(gradient), local(weight))
        else:
            mask_(local(gradient), kept)
        self._masked[index] = TensorWeakRef(gradient)

    def forget(self, module: nn.Module, name: str) -> None:
        """Set the residual of `module.<name>` to zero."""
        for i, layer in enumerate(self.layers):
            held = any(owner is module and tensor == name for owner, tensor in layer.owners)
            if held and f"residual_{i}" in self._buffers:
                # Not in place: the state dict that is being loaded may be the model's own.
                with torch.inference_mode(False):
                    self._buffers[f"residual_{i}"] = torch.zeros_like(self._residual(i))

    def detach(self) -> None:
        """Undo `attach`."""
        self._hooks.remove()
        unfollow(self)

    # --- copies -----------------------------------------------------------------------------------

    def _load_from_state_dict(self, *args: Any) -> None:
        for i in range(len(self._buffers)):
            self._residual(i)  # sharded, if the weight is
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for i in range(len(self._buffers)):
            self._residual(i)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for i, layer in enumerate(self.layers):
            # In an optimiser's step, or after one that raised an error.
            if layer.dense and layer.held is not None:
                self._save_dense(i, destination, f"{prefix}residual_{i}", keep_vars)

    @torch.no_grad()
    def _save_dense(
        self, index: int, destination: dict[str, Any], key: str, keep_vars: bool
    ) -> None:
        """Put copies of the sparse weight and the residual of a dense layer into a state dict."""
        threshold, weight = self.layers[index].threshold, self.layers[index].weight.detach()
        sparse, residual = weight.clone(), torch.zeros_like(weight)
        if not keep_vars:  # else the state dict holds the parameter itself
            mask = None if threshold.mask is None else local_mask(threshold.mask, weight)
            alpha, reach = threshold.known(), threshold.reach
            shrink_(
                [Shrinkage(local(sparse), local(residual), alpha, reach, mask, threshold.scale)]
            )
            for name, value in destination.items():  # under several names if the weight is tied
                if isinstance(value, Tensor) and _same_memory(value, weight):
                    destination[name] = sparse
        if key in destination:
            destination[key] = residual

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {"_stepping": None, "_masked": None, "_hooks": None, "_used": {}}
        return {**self.__dict__, **own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()
        follow(self)


def _has_graph(weight: nn.Parameter | None) -> bool:
    return weight is not None and weight.grad is not None and weight.grad.requires_grad


def _same_memory(one: Tensor, other: Tensor) -> bool:
    one, other = local(one), local(other)
    alike = (one.dtype, one.device, one.layout) == (other.dtype, other.device, other.layout)
    return alike and one.is_set_to(other)


def pruned_parameter(model: nn.Module) -> str | None:
    """Return the name of the first parameter of a model that is kept sparse, or None."""
    kept = kept_parameters()
    return next((name for name, p in model.named_parameters() if id(p) in kept), None)


def forget_residual(module: nn.Module, name: str) -> None:
    """Set the residual of `module.<name>` to zero, because the tensor gets a new dense weight."""
    for weights in followers():
        weights.forget(module, name)


def _before_forward(model: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    for name in ("adapmtl", "kept_zeros"):
        weights = getattr(model._modules.get(name), "sparse_weights", None)
        if isinstance(weights, SparseWeights):
            weights.before_forward()


def watch_forward(model: nn.Module) -> None:
    """Look at the weights before each forward pass of a model, from now on."""
    model.register_forward_pre_hook(_before_forward)


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_forward`."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_forward]:
        del hooks[key]
