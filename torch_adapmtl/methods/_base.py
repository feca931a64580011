"""What the handle asks of the controller that moves the thresholds, and what makes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_adapmtl.layers.layer import Layer, shaped_like
from torch_adapmtl._precision import KeepsPrecision

__all__ = ["Controller", "Mode"]

_GOLDEN = 0.6180339887498949


class Controller(KeepsPrecision):
    """Moves the thresholds of some layers; what a subclass need not do is done by doing nothing.

    Args:
        layers: The layers, in the model's order; a subclass makes their thresholds.
        target: Zeros among all weights of the layers at the end, as a fraction.
        total_steps: Number of steps.

    Attributes:
        zeros: The number of zeros at the end, `round(target * N)`.
        last_update: The step after which nothing is due any more.
        interval: About how many steps lie between two updates.
        exact: Whether the last step leaves exactly that many zeros, held by masks.
        frozen: Whether that is done.
        allocates: Whether components are free to differ in their sparsity, and meant to.
        asleep: Whether `wake` is to be called before the next gradients come.
        threshold_decay: Weight decay of the thresholds that the optimiser trains.
        initial: The sparsity that the schedule starts from, as a fraction.
        synchronize: Whether processes that train together prune alike.
        shardable: Whether it works on weights of which each process holds a part.
    """

    exact = True
    frozen = False
    allocates = False
    asleep = False
    threshold_decay = 0.0
    initial = 0.0
    synchronize = True
    shardable = False

    def __init__(self, layers: Sequence[Layer], target: float, total_steps: int) -> None:
        super().__init__()
        self.layers = list(layers)
        self._sizes = [layer.weight.numel() for layer in layers]
        self._aim(target, total_steps)

    def _aim(self, target: float, total_steps: int) -> None:
        self.target, self.total_steps = target, total_steps
        self.last_update = total_steps
        self.interval = max(1, min(10, total_steps // 50))
        self.zeros = round(target * sum(self._sizes))

    @abstractmethod
    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""

    @abstractmethod
    def freeze(self) -> None:
        """Prune to the target now, exactly, and hold the zeros by masks."""

    def retarget(self, target: float, total_steps: int, zeros: int) -> None:
        """Start anew, from the present number of `zeros` to another target.

        Raises:
            RuntimeError: Unless the subclass can.
        """
        raise RuntimeError(
            "retarget() needs mode='adaptive', whose thresholds follow a schedule: call finalize() "
            "and apply_adapmtl again (its zeros stay zero), or prepare the model with that mode"
        )

    def due(self, step: int) -> bool:
        """Whether the weights are looked at after `step` steps."""
        # No whole number of steps apart, so that batches which take turns are all seen in time.
        spacing = self.interval + _GOLDEN if self.interval > 1 else 1
        turn = step // spacing != (step - 1) // spacing
        return step == self.last_update or (turn and step < self.last_update)

    def step(self, step: int) -> None:
        """Do what is due after `step` steps."""
        if self.due(step) and not self.frozen:
            self.freeze() if step == self.last_update else self.update(step)
        elif step == self.total_steps and self.frozen:
            self.write()  # momentum has moved what the masks hide, or a kept weight onto zero
            self.settle()
        self.wake(step)

    def update(self, step: int) -> None:
        """Move the thresholds to where they should be after `step` steps."""

    def wake(self, step: int) -> None:
        """Be ready for the gradients of the step after `step`."""

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """See the task losses before they are weighted."""

    def missed(self, sparsity: float) -> str:
        """Why a run that is not exact ended at this sparsity and what to do; empty if it is fine.

        Args:
            sparsity: Zeros among all weights of the layers, as a fraction.
        """
        return ""

    def refresh(self) -> None:
        """Derive from the state what is not in it, after a state was loaded."""

    @torch.no_grad()
    def hold(self, keep: Sequence[Tensor]) -> None:
        """Write the sparse weights into the parameters, and keep their zeros by masks from now on.

        Args:
            keep: For each layer which of its weights remain, bool and flat.
        """
        for layer, flat in zip(self.layers, keep, strict=True):
            layer.threshold.mask = shaped_like(layer.weight, flat)
        self.write()
        self.settle()
        self.frozen = True

    @torch.no_grad()
    def write(self) -> None:
        """Write the sparse weights into the parameters."""
        for layer in self.layers:
            layer.assign(layer.sparse())

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the weights that remain from being zero, so that they do not count as pruned.

        A weight may tie with the threshold, or have been zero all along.
        """
        for layer in self.layers:
            mask = layer.threshold.mask
            if mask is not None:
                weight = layer.values()
                layer.assign(weight.masked_fill_((weight == 0) & mask, _smallest(weight.dtype)))


class Mode(ABC):
    """A way of pruning that [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] takes as `mode`."""

    @abstractmethod
    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> Controller:
        """Make the controller; it makes the layers' thresholds and changes nothing else yet."""


def _smallest(dtype: torch.dtype) -> float:
    """A number next to nothing: the smallest that is safe from being flushed to zero."""
    # Half precision has few small numbers, and its subnormals are never flushed.
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
