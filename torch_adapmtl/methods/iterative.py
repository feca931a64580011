"""Iterative magnitude pruning, with or without rewinding (the lottery ticket)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_flag
from torch_adapmtl.budget.schedule import SparsitySchedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods.magnitude import MagnitudeController

__all__ = ["IterativeController", "IterativeMagnitude"]


@dataclass(frozen=True)
class IterativeMagnitude(Method):
    """Iterative magnitude pruning: train, prune the smallest weights, repeat (arXiv 1506.02626).

    The run is divided into `rounds + 1` phases of equal length. After phase k, global magnitude
    pruning reduces the density to `(1 - target_sparsity) ** (k / rounds)` (Han et al.). With
    `rewind`, the remaining weights and all other parameters and buffers are then reset to their
    initial values: the lottery ticket (Frankle and Carbin, arXiv 1803.03635). The optimiser and its
    learning-rate schedule should be restarted in every phase. The training loop must do this;
    `phases` returns the steps.

    Args:
        rounds: How many times weights are pruned.
        rewind: Whether the remaining weights are reset to their initial values.

    Raises:
        ValueError: If `rounds` is not an integer >= 1.

    Example:
        >>> from torch_adapmtl import IterativeMagnitude
        >>> IterativeMagnitude(rounds=4).phases(total_steps=500)
        [0, 100, 200, 300, 400]
    """

    rounds: int = 4
    rewind: bool = False

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        check_flag("rewind", self.rewind)

    def phases(self, total_steps: int) -> list[int]:
        """Return the steps at which the phases begin."""
        return [round(total_steps * k / (self.rounds + 1)) for k in range(self.rounds + 1)]

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> IterativeController:
        """Make the controller."""
        return IterativeController(self, layers, model, target_sparsity, total_steps)


class IterativeController(MagnitudeController):
    """Prunes at the end of each phase, and rewinds.

    Args:
        method: The settings.
        layers: See `MaskController`.
        model: The model; its other parameters and its buffers are rewound too.
        target_sparsity: See `MaskController`.
        total_steps: See `MaskController`.
    """

    _model: nn.Module

    def __init__(
        self,
        method: IterativeMagnitude,
        layers: Layers,
        model: nn.Module,
        target_sparsity: float,
        total_steps: int,
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, SparsitySchedule())
        self.method = method
        self.__dict__["_model"] = model  # not a submodule: the model contains this module
        pruned = {id(layer.weight) for layer in layers}
        for layer in layers:  # earlier masks move into the layer, and are not trained
            pruned |= {id(module._buffers.get(name + "_mask")) for module, name in layer.owners}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._unpruned = [name for name, tensor in tensors if id(tensor) not in pruned]
        if method.rewind:
            for i, tensor in enumerate(self._tensors()):
                self.register_buffer(f"initial_{i}", tensor.detach().clone())

    def _tensors(self) -> list[Tensor]:
        """All tensors that training changes, always in the same order."""
        named: dict[str, Tensor] = dict(self._model.named_parameters())
        named.update(self._model.named_buffers())
        return [layer.weight for layer in self.layers] + [named[name] for name in self._unpruned]

    def due(self, step: int) -> bool:
        """Whether weights are pruned after `step` steps: at the end of each phase."""
        return step == self.total_steps or step in self.method.phases(self.total_steps)[1:]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune to the density of the next phase, and rewind."""
        rounds = self.method.rounds
        phase = self.method.phases(self.total_steps).index(step)
        density = (1 - self.target_sparsity) ** (phase / rounds)
        budget = min(self.budget, self.layers.budget(1 - density))
        self.prune(self.budget if phase == rounds else budget)
        if self.method.rewind:
            for i, tensor in enumerate(self._tensors()):
                tensor.copy_(self.get_buffer(f"initial_{i}"))
