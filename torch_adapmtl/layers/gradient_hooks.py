"""Hooks that call a function with each gradient of the layers' weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.layers.layer import Layer

__all__ = ["GradientHooks"]


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
        self._hooked: list[tuple[nn.Parameter, Any]] = []

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

    def _hook(self, index: int, weight: nn.Parameter) -> Any:
        if not weight.requires_grad:
            return None

        # The garbage collector does not see hooks of this kind, so that a strong reference from one
        # would keep the whole model in memory.
        owner = weakref.ref(self)

        def call(parameter: Tensor) -> None:
            hooks = owner()
            if hooks is not None and hooks._listening and parameter.grad is not None:
                hooks._function(index, parameter)  # type: ignore[arg-type]  # it is a parameter

        return weight.register_post_accumulate_grad_hook(call)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the parameters of this model; a copy registers new ones in `listen`.
        return {**self.__dict__, "_listening": False, "_hooked": []}
