"""Hooks that call a function with each gradient of the layers' weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl.layers.layer import Layer

__all__ = ["GradientHooks", "in_backward", "registered"]

_registered: weakref.WeakSet[Any] = weakref.WeakSet()


def registered() -> list[GradientHooks]:
    """Return all hooks that are registered on parameters."""
    return list(_registered)


def in_backward() -> bool:
    """Whether a backward pass is running, in one of whose hooks this is called."""
    return torch._C._current_graph_task_id() != -1


class GradientHooks:
    """Calls a function when a layer's weight has received its gradient; can be switched off.

    Args:
        layers: The layers.
        function: Called with the index of the layer and its weight, whose `grad` is not None.
    """

    def __init__(
        self, layers: Sequence[Layer], function: Callable[[int, nn.Parameter], None]
    ) -> None:
        self._layers, self._function = layers, function
        self._listening = False
        self._updates_without: int | None = 0  # None from the first call of the function on
        self._hooked: list[tuple[nn.Parameter, Any]] = []
        # Layers whose gradients backward passes show.
        self._shown: set[int] = set()
        # For other layers, the backward pass in which an optimiser's step showed the gradient.
        self._stepped: dict[int, int] = {}

    def listen(self, listening: bool, *, renew: bool = True) -> None:
        """Call the function from now on, or stop calling it.

        Args:
            listening: Whether to call the function.
            renew: Whether to look for parameters that were replaced (by loading a state dict, for
                instance), frozen or unfrozen since the last call, which takes time.
        """
        renew |= not self._hooked
        if listening and renew:
            weights = [layer.weight for layer in self._layers]
            wanted = [(id(w), w.requires_grad) for w in weights]
            if wanted != [(id(w), handle is not None) for w, handle in self._hooked]:
                self.remove()
                self._hooked = [(w, self._hook(i, w)) for i, w in enumerate(weights)]
                _registered.add(self)
        self._listening = listening

    @property
    def registered(self) -> bool:
        """Whether hooks are registered; never in a copy that has just been made."""
        return bool(self._hooked)

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for _, handle in self._hooked:
            if handle is not None:
                handle.remove()
        self._hooked, self._listening = [], False
        self._shown, self._stepped = set(), {}
        _registered.discard(self)

    def before_step(self, parameters: Collection[int]) -> None:
        """Call the function with gradients that backward passes do not show.

        A loop may put them into `grad`. Or a hook on the parameter that was registered earlier
        calls the optimiser in the backward pass, and then clears them.

        Args:
            parameters: The `id` of each parameter that an optimiser is about to update. The layers
                must be sparse.
        """
        for i, layer in enumerate(self._layers):
            if i in self._shown or layer.dense or (weight := layer.held) is None:
                continue
            if weight.grad is not None and id(weight) in parameters:
                self._stepped[i] = torch._C._current_graph_task_id()  # -1 outside of one
                self._call(i, weight)

    def note_update(self, who: str) -> None:
        """Warn, once, if gradients are used for the second time and there were none.

        Not for the first time, because a loop may have begun before the hooks were registered.

        Args:
            who: What uses the gradients, at the beginning of a sentence.
        """
        if self._updates_without is None:
            return
        self._updates_without += 1
        if self._updates_without == 2:
            self._updates_without = None
            warnings.warn(
                f"{who} needs the gradients of the weights, and has not seen any: they must be in "
                f"`grad` after the backward pass, or when the step of a torch.optim.Optimizer "
                f"begins. If a hook updates weights in the backward pass and clears their "
                f"gradients, let it call the step of such an optimizer, or register it after the "
                f"first call of pruner.loss()",
                stacklevel=2,
            )

    def _after_backward(self, index: int, weight: nn.Parameter) -> None:
        if self._stepped.get(index) != torch._C._current_graph_task_id():
            self._shown.add(index)
            self._call(index, weight)

    def _call(self, index: int, weight: nn.Parameter) -> None:
        if self._listening:
            self._updates_without = None
            self._function(index, weight)

    def _hook(self, index: int, weight: nn.Parameter) -> Any:
        if not weight.requires_grad:
            return None

        # The garbage collector does not see hooks of this kind, so that a strong reference from one
        # would keep the whole model in memory.
        owner = weakref.ref(self)

        def call(parameter: Tensor) -> None:
            hooks = owner()
            if hooks is not None and parameter.grad is not None:
                hooks._after_backward(index, parameter)  # type: ignore[arg-type]  # it is a parameter

        return weight.register_post_accumulate_grad_hook(call)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the parameters of this model; a copy registers new ones in `listen`.
        own = {"_listening": False, "_hooked": [], "_shown": set(), "_stepped": {}}
        return {**self.__dict__, **own}
