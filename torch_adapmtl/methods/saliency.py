"""Pruning by first-order saliency: at initialisation (SNIP), or gradually (Taylor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods.masks import MaskController, MaskMethod, OneShotController

__all__ = ["SNIP", "SNIPController", "Taylor", "TaylorController"]


@dataclass(frozen=True)
class SNIP(Method):
    """Single-shot pruning by connection sensitivity (Lee et al., arXiv 1810.02340).

    The score of a weight is `|w * dL/dw|` on the first batch, at initialisation; L is the sum of
    the task losses. The first call of `loss()` computes the scores and sets the masks, which stay.
    The first optimiser step still uses the gradients of the dense model.

    Args:
        batches: How many batches to score. With more than one, the weights train in between.

    Raises:
        ValueError: If `batches` is not an integer >= 1.

    Warns:
        UserWarning: When the masks are set, if a tenth or more of the weights have a score of
            exactly zero. This is so in residual branches whose last scale starts at zero (timm's
            `zero_init_last`), which would be pruned entirely. Initialise those scales to 1.

    Example:
        >>> from torch_adapmtl import SNIP
        >>> SNIP()
        SNIP(batches=1)
    """

    batches: int = 1

    def __post_init__(self) -> None:
        check_count("batches", self.batches)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> SNIPController:
        """Make the controller."""
        return SNIPController(layers, target_sparsity, total_steps, self.batches)


class SNIPController(OneShotController):
    """Prunes the weights with the smallest connection sensitivities, after the first batches."""

    def __init__(
        self, layers: Layers, target_sparsity: float, total_steps: int, batches: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, batches)
        self.store("effect")

    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Add `w * dL/dw`, the effect on the loss of scaling each weight."""
        weights = [layer.weight for layer in self.layers]
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        for effect, weight, gradient in zip(self.stored("effect"), weights, gradients, strict=True):
            if gradient is not None:
                effect.add_((weight * gradient).detach().float())

    def scores(self) -> list[Tensor]:
        """The connection sensitivity of each weight."""
        return [effect.abs() for effect in self.stored("effect")]


@dataclass(frozen=True)
class Taylor(MaskMethod):
    """Gradual pruning by first-order Taylor saliency (Molchanov et al., arXiv 1906.10771).

    The score of a weight is `(w * dL/dw)**2`: to first order, the squared change of the loss if the
    weight is pruned. It is averaged exponentially over the backward passes; a pass with gradients
    that are not finite is skipped. Under gradient accumulation, each backward pass of a step enters
    the average with the gradient accumulated so far.

    Args:
        schedule: How the sparsity rises.
        decay: Share of the average that remains after each backward pass; in [0, 1).

    Raises:
        ValueError: If `decay` is out of range.
        TypeError: If `decay` is not a number.

    Example:
        >>> from torch_adapmtl import Taylor
        >>> Taylor().decay
        0.95
    """

    schedule: SparsitySchedule = field(default_factory=SparsitySchedule)
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_numbers(decay=self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> TaylorController:
        """Make the controller."""
        return TaylorController(self, layers, target_sparsity, total_steps)


class TaylorController(MaskController):
    """Prunes the weights with the smallest averaged saliencies."""

    def __init__(
        self, method: Taylor, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, method.schedule)
        self.method = method
        self.store("saliency")

    @torch.no_grad()
    def on_gradient(self, index: int, weight: nn.Parameter) -> None:
        """Add the saliency of a backward pass to the average."""
        assert weight.grad is not None
        effect = (weight * weight.grad).float().square_()
        average = self.stored_at("saliency", index)
        # Gradients that overflow are skipped, as a gradient scaler skips their step.
        new = torch.where(effect.isfinite().all(), effect, average)
        average.lerp_(new, 1 - self.method.decay)

    def scores(self) -> list[Tensor]:
        """The averaged saliency of each weight."""
        return self.stored("saliency")
