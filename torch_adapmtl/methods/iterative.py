"""Iterative magnitude pruning, with rewinding (the lottery ticket) or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count
from torch_adapmtl.methods._base import Mode
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.methods.magnitude import MagnitudeMasks
from torch_adapmtl.budget.solver import SparsitySchedule

__all__ = ["IterativeMagnitude", "IterativeMasks"]


@dataclass(frozen=True)
class IterativeMagnitude(Mode):
    """Train, prune the smallest weights of the model, and again (Han et al., arXiv 1506.02626).

    The run is cut into `rounds + 1` phases of equal length. After phase k the density becomes
    `(1 - target) ** (k / rounds)`, by global magnitude. With `rewind`, the weights that remain then
    go back to their initial values, with all other parameters and buffers: the lottery ticket
    (Frankle and Carbin, arXiv 1803.03635). The optimiser and its schedule should begin anew in
    every phase, which is the training loop's part: `phases` says where.

    Args:
        rounds: Number of times that weights are pruned.
        rewind: Whether the rest goes back to its initial values.

    Raises:
        ValueError: If `rounds` is no integer >= 1.

    Example:
        >>> from torch_adapmtl.methods import IterativeMagnitude
        >>> IterativeMagnitude(rounds=4).phases(total_steps=500)
        [0, 100, 200, 300, 400]
    """

    rounds: int = 4
    rewind: bool = False

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)

    def phases(self, total_steps: int) -> list[int]:
        """The steps at which phases begin."""
        return [round(total_steps * k / (self.rounds + 1)) for k in range(self.rounds + 1)]

    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> IterativeMasks:
        """Make the controller."""
        return IterativeMasks(layers, model, target=target, total_steps=total_steps, mode=self)


class IterativeMasks(MagnitudeMasks):
    """The masks of `IterativeMagnitude`."""

    _model: nn.Module

    def __init__(
        self,
        layers: Sequence[Layer],
        model: nn.Module,
        *,
        target: float,
        total_steps: int,
        mode: IterativeMagnitude,
    ) -> None:
        unused = SparsitySchedule()
        super().__init__(layers, target=target, total_steps=total_steps, schedule=unused)
        self.mode = mode
        self.__dict__["_model"] = model  # not a submodule: this module is one of the model's
        held = {id(layer.weight) for layer in layers}
        for layer in layers:  # the masks of torch.nn.utils.prune are taken over, and do not train
            held |= {id(module._buffers.get(name + "_mask")) for module, name in layer.owners}
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._others = [name for name, tensor in tensors if id(tensor) not in held]
        if mode.rewind:
            for i, tensor in enumerate(self._tensors()):
                self.register_buffer(f"initial_{i}", tensor.detach().clone())

    def _tensors(self) -> list[Tensor]:
        """All that training changes, in an order that stays."""
        named: dict[str, Tensor] = dict(self._model.named_parameters())
        named.update(self._model.named_buffers())
        return [layer.weight for layer in self.layers] + [named[name] for name in self._others]

    def due(self, step: int) -> bool:
        """Whether the weights are looked at after `step` steps: at the end of each phase."""
        return step == self.total_steps or step in self.mode.phases(self.total_steps)[1:]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune to the density of the phase that begins, and rewind."""
        phase = self.mode.phases(self.total_steps).index(step)
        density = (1 - self.target) ** (phase / self.mode.rounds)
        zeros = min(self.zeros, round((1 - density) * sum(self._sizes)))
        if phase == self.mode.rounds:
            zeros = self.zeros
        self.mask(self.chosen(max(zeros, self._least)))
        if self.mode.rewind:
            for i, tensor in enumerate(self._tensors()):
                initial = self._buffers[f"initial_{i}"]
                assert initial is not None
                tensor.copy_(initial)
