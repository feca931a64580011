"""What the handle asks of the controller that moves the thresholds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ._layers import Layer
from ._precision import KeepsPrecision

__all__ = ["Controller"]


class Controller(KeepsPrecision):
    """Moves the thresholds of some layers; what a subclass need not do is done by doing nothing.

    Args:
        layers: The layers, in the model's order; a subclass makes their thresholds.
        target: Zeros among all weights of the layers at the end, as a fraction.

    Attributes:
        exact: Whether the last step leaves exactly the target, held by masks.
        frozen: Whether that is done.
        asleep: Whether `wake` is to be called before the next gradients come.
        threshold_decay: Weight decay of the thresholds that the optimiser trains.
    """

    exact = True
    frozen = False
    asleep = False
    threshold_decay = 0.0

    def __init__(self, layers: Sequence[Layer], target: float) -> None:
        super().__init__()
        self.layers = list(layers)
        self.zeros = round(target * sum(layer.weight.numel() for layer in layers))

    @abstractmethod
    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether the weights are looked at after `step` steps."""

    @abstractmethod
    def step(self, step: int) -> bool:
        """Do what is due after `step` steps; tell whether it waited for the device."""

    @abstractmethod
    def freeze(self) -> None:
        """Prune to the target now, exactly, and hold the zeros by masks."""

    def wake(self, step: int) -> None:
        """Be ready for the gradients of the step after `step`."""

    def refresh(self) -> None:
        """Derive from the state what is not in it, after a state was loaded."""

    def settle(self) -> None:
        """Keep the weights that remain from being zero, so that they do not count as pruned."""
