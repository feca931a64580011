"""Pruning by first-order saliency: at initialisation (SNIP), or gradually (Taylor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl.budget.schedule import SparsitySchedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods.masks import MaskController, MaskMethod, OneShotController

__all__ = ["SNIP", "SNIPController", "Taylor", "TaylorController"]


@dataclass(frozen=True)
class SNIP(Method):
    """Single-shot pruning by connection sensitivity (Lee et al., arXiv 1810.02340).

    The score of a weight is `|w * dL/dw|` on the first batch, at initialisation; L is the sum of
    the task losses. The masks are made from it by the first `loss()` and stay: the first optimiser
    step, which uses the gradients of that batch, is still that of the dense model.

    Args:
        batches: How many batches to score; with more than one, the weights train meanwhile.

    Raises:
        ValueError: If `batches` is no integer >= 1.

    Warns:
        UserWarning: When the scores are read, if a tenth of the weights or more score exactly zero,
            as all do in residual branches whose last scale starts at zero (timm's
            `zero_init_last`): they would be pruned whole. Start those scales at 1.

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
    """Masks the weights of the smallest connection sensitivity, after the first batches."""

    def __init__(
        self, layers: Layers, target_sparsity: float, total_steps: int, batches: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, batches)
        self.store("effect")

    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Add `w * dL/dw`: the effect of scaling each weight."""
        weights = [layer.weight for layer in self.layers]
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
        for effect, weight, gradient in zip(self.stored("effect"), weights, gradients, strict=True):
            if gradient is not None:
                effect.add_((weight * gradient).detach().float())

    def scores(self) -> list[Tensor]:
        """The connection sensitivities."""
        return [effect.abs() for effect in self.stored("effect")]


@dataclass(frozen=True)
class Taylor(MaskMethod):
    """Gradual pruning by first-order Taylor saliency (Molchanov et al., arXiv 1906.10771).

    The score of a weight is `(w * dL/dw)**2`, the squared change of the loss when it is pruned,
    averaged exponentially over the backward passes; gradients that are not finite are skipped.
    Under gradient accumulation, the average sees the sum of the gradients as it grows.

    Args:
        schedule: How the sparsity rises.
        decay: Share of the average kept from one backward pass to the next; in [0, 1).

    Raises:
        ValueError: If `decay` is out of range.
        TypeError: If it is no number.

    Example:
        >>> from torch_adapmtl import Taylor
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
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> TaylorController:
        """Make the controller."""
        return TaylorController(self, layers, target_sparsity, total_steps)


class TaylorController(MaskController):
    """Masks the weights of the smallest averaged saliency."""

    def __init__(
        self, method: Taylor, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, method.schedule)
        self.method = method
        self.store("saliency")

    @torch.no_grad()
    def on_gradient(self, index: int, weight: nn.Parameter) -> None:
        """Take the saliency of a backward pass into the average."""
        assert weight.grad is not None
        effect = (weight * weight.grad).float().square_()
        average = self.get_buffer(f"saliency_{index}")
        # A gradient scaler skips a step whose gradients overflow; so does the average.
        new = torch.where(effect.isfinite().all(), effect, average)
        average.lerp_(new, 1 - self.method.decay)

    def scores(self) -> list[Tensor]:
        """The averaged saliencies."""
        return self.stored("saliency")
