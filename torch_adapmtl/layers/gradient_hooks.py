"""Seeing the gradients of the layers' weights as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torch_adapmtl.layers.collection import Layers

__all__ = ["GradientHooks"]


class GradientHooks:
    """Calls a function when a layer's parameter has received its gradient, while it is listening.

    Args:
        layers: The layers.
        function: Takes the index of the layer and the parameter, whose `grad` is not None.
    """

    def __init__(self, layers: Layers, function: Callable[[int, nn.Parameter], None]) -> None:
        self._layers, self._function = layers, function
        self._listening = False
        self._hooked: list[tuple[nn.Parameter, Any]] = []

    def listen(self, listening: bool) -> None:
        """Call the function from now on, or stop calling it."""
        self._listening = listening
        if listening:
            weights = [layer.weight for layer in self._layers]
            # Loading a state dict or unfreezing a layer may have brought other parameters.
            wanted = [(id(w), w.requires_grad) for w in weights]
            if wanted != [(id(w), handle is not None) for w, handle in self._hooked]:
                self.remove()
                self._listening = True
                self._hooked = [(w, self._hook(i, w)) for i, w in enumerate(weights)]

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for _, handle in self._hooked:
            if handle is not None:
                handle.remove()
        self._hooked, self._listening = [], False

    def _hook(self, index: int, weight: nn.Parameter) -> Any:
        if not weight.requires_grad:
            return None

        def call(parameter: Tensor) -> None:
            if self._listening and parameter.grad is not None:
                assert isinstance(parameter, nn.Parameter)
                self._function(index, parameter)

        return weight.register_post_accumulate_grad_hook(call)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the parameters of this very model; a copy makes its own when it listens.
        return {**self.__dict__, "_listening": False, "_hooked": []}
