"""AC/DC: phases in which the model is sparse alternate with phases in which it is dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from torch_adapmtl._checks import check_numbers
from torch_adapmtl.budget.schedule import SparsitySchedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.optimizer_hooks import forget_momentum
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods.dynamic import MovingController

__all__ = ["ACDC", "ACDCController"]


@dataclass(frozen=True)
class ACDC(Method):
    """Alternating compressed and decompressed training (Peste et al., arXiv 2106.12379).

    After a dense warm-up, compressed and decompressed phases alternate (Algorithm 1). When a
    compressed phase begins, the smallest weights of the whole model are set to zero, as many as the
    target asks for; they get no gradient in this phase. When a decompressed phase begins, the masks
    are lifted: all weights train again, the pruned ones from zero, and the momentum of the
    optimiser is set to zero. The run ends with a compressed phase.

    The defaults are those of the paper for 100 epochs on ImageNet: a warm-up of 10 epochs, phases
    of 5 epochs, a last decompressed phase of 10 and a last compressed phase of 15. The time between
    the warm-up and these two is divided into an odd number of equal phases, which begin and end
    compressed.

    What differs from the paper: phases are counted in steps, not in epochs. The momentum of every
    `torch.optim.Optimizer` that trains a pruned layer is set to zero, for all its parameters:
    `momentum_buffer`, and the first moment of Adam, `exp_avg`, whose second moment stays. An
    optimiser whose step is compiled keeps it. The learning rate is left to the training loop.

    Args:
        warmup: Length of the dense warm-up, as all others as a fraction of `total_steps`.
        phase: Approximate length of a phase.
        last_decompressed: Length of the last decompressed phase.
        last_compressed: Length of the last compressed phase.

    Raises:
        ValueError: If a length is not in (0, 1), or the phases do not fit into the run.
        TypeError: If a length is not a number.

    Example:
        >>> from torch_adapmtl import ACDC
        >>> phases = ACDC().phases(total_steps=100)
        >>> len(phases), phases[:4]
        (16, [(0, False), (10, True), (15, False), (20, True)])
    """

    warmup: float = 0.1
    phase: float = 0.05
    last_decompressed: float = 0.1
    last_compressed: float = 0.15

    def __post_init__(self) -> None:
        for name in ("warmup", "phase", "last_decompressed", "last_compressed"):
            value = getattr(self, name)
            check_numbers(**{name: value})
            if not 0 < value < 1:
                raise ValueError(
                    f"{name} must lie in (0, 1), as a fraction of total_steps, got {value}"
                )
        if self._between < self.phase * (1 - 1e-9):
            raise ValueError(
                f"phase={self.phase}: no compressed phase fits between warmup={self.warmup} and "
                f"the last two, last_decompressed={self.last_decompressed} and "
                f"last_compressed={self.last_compressed}: let the four sum to at most 1"
            )

    @property
    def _between(self) -> float:
        return 1 - self.warmup - self.last_decompressed - self.last_compressed

    def phases(self, total_steps: int) -> list[tuple[int, bool]]:
        """Return the step at which each phase begins, and whether the model is sparse in it."""
        # The largest odd number of phases that are not shorter.
        count = max(1, int(self._between / self.phase * (1 + 1e-9)))
        count -= 1 - count % 2
        length = self._between / count
        begins = [self.warmup + k * length for k in range(count)]
        begins += [self.warmup + self._between, 1 - self.last_compressed]
        steps = [round(total_steps * begin) for begin in begins]
        return [(0, False), *((step, k % 2 == 0) for k, step in enumerate(steps))]

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> ACDCController:
        """Make the controller."""
        return ACDCController(self, layers, target_sparsity, total_steps)


class ACDCController(MovingController):
    """Sets masks at the beginning of each compressed phase, and lifts them at its end."""

    def __init__(
        self, method: ACDC, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, SparsitySchedule())
        self.method = method
        self.phases = method.phases(total_steps)

    def compressed(self, step: int) -> bool:
        """Whether the model is sparse after `step` steps."""
        return [sparse for begin, sparse in self.phases if begin <= step][-1]

    def due(self, step: int) -> bool:
        """Whether a phase begins after `step` steps, or the run ends."""
        return step == self.total_steps or self.compressed(step) != self.compressed(step - 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Begin a phase."""
        if self.compressed(step):
            self.prune(self.budget)
            self._clear()
        else:
            self._clear()  # the optimiser may have moved them, by its momentum
            for layer in self.layers:
                layer.threshold.mask = layer.initial_mask
            forget_momentum({id(layer.weight) for layer in self.layers})

    def _clear(self) -> None:
        """Set the pruned weights to zero, so that they start from there when the mask is lifted."""
        for layer in self.layers:
            if layer.mask is not None:
                layer.weight.masked_fill_(~layer.mask, 0.0)
