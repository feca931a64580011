"""Pruning by first-order saliency: at initialisation (SNIP), or gradually (Taylor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl.methods._base import Mode
from torch_adapmtl.layers.gradient_hooks import GradientHooks
from torch_adapmtl.layers.layer import Layer
from torch_adapmtl.methods._masks import Masked, OneShot
from torch_adapmtl.budget.solver import SparsitySchedule

__all__ = ["SNIP", "SNIPMasks", "Taylor", "TaylorMasks"]


@dataclass(frozen=True)
class SNIP(Mode):
    """Single-shot pruning by connection sensitivity (Lee et al., arXiv 1810.02340).

    The score of a weight is `|w * dL/dw|` on the first batch, at initialisation; L is the sum of
    the task losses. The masks are made from it by the first `step()` and stay: the optimiser's
    first step, which comes before it, is still that of the dense model.

    Args:
        batches: How many batches to score; with more than one, the weights train meanwhile.

    Raises:
        ValueError: If `batches` is no integer >= 1.

    Warns:
        UserWarning: When the scores are read, if a tenth of the weights or more score exactly zero,
            as all do in residual branches whose last scale starts at zero (timm's
            `zero_init_last`): they would be pruned whole. Start those scales at 1.

    Example:
        >>> from torch_adapmtl.methods import SNIP
        >>> SNIP()
        SNIP(batches=1)
    """

    batches: int = 1

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> SNIPMasks:
        """Make the controller."""
        return SNIPMasks(layers, target=target, total_steps=total_steps, batches=self.batches)


class SNIPMasks(OneShot):
    """The masks of `SNIP`."""

    def __init__(
        self, layers: Sequence[Layer], *, target: float, total_steps: int, batches: int
    ) -> None:
        super().__init__(layers, target=target, total_steps=total_steps, batches=batches)
        self.store("effect")

    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Add `w * dL/dw`: the effect of scaling each weight."""
        weights = [layer.weight for layer in self.layers]
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            if gradient is not None:
                self.stored("effect", i).add_((weight * gradient).detach().float())

    def scores(self) -> list[Tensor]:
        """The connection sensitivities."""
        return self.unmasked(lambda _, i: self.stored("effect", i).abs())


@dataclass(frozen=True)
class Taylor(Mode):
    """Gradual pruning by first-order Taylor saliency (Molchanov et al., arXiv 1906.10771).

    The score of a weight is `(w * dL/dw)**2`, its effect on the loss when it goes, averaged
    exponentially over the backward passes; gradients that are not finite are left out. Where
    several passes add up to one step, the average sees the sum as it grows.

    Args:
        schedule: How the sparsity rises.
        decay: Share of the average kept from step to step; in [0, 1).

    Raises:
        ValueError: If `decay` is out of range.
        TypeError: If it is no number.

    Example:
        >>> from torch_adapmtl.methods import Taylor
        >>> Taylor().decay
        0.95
    """

    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_numbers(decay=self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def controller(
        self, layers: Sequence[Layer], model: nn.Module, *, target: float, total_steps: int
    ) -> TaylorMasks:
        """Make the controller."""
        return TaylorMasks(
            layers,
            target=target,
            total_steps=total_steps,
            schedule=self.schedule,
            decay=self.decay,
        )


class TaylorMasks(Masked):
    """The masks of `Taylor`."""

    asleep = True  # until the first loss, which comes when the thresholds are attached

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        schedule: SparsitySchedule,
        decay: float,
    ) -> None:
        super().__init__(layers, target=target, total_steps=total_steps, schedule=schedule)
        self.decay = decay
        self.store("saliency")
        self._hooks = GradientHooks(self.layers, self._average)

    def wake(self, step: int) -> None:
        """Be ready for the gradients of the step after `step`."""
        self.asleep = False
        self._hooks.listen(not self.frozen)
        if self.frozen:
            self._hooks.stop()

    @torch.no_grad()
    def _average(self, index: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        effect = (parameter * parameter.grad).float().square_()
        average = self.stored("saliency", index)
        # A gradient scaler leaves out a step whose gradients overflow; so does the average.
        average.lerp_(torch.where(effect.isfinite().all(), effect, average), 1 - self.decay)

    def scores(self) -> list[Tensor]:
        """The averaged saliencies."""
        return self.unmasked(lambda _, i: self.stored("saliency", i))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "asleep": True}
