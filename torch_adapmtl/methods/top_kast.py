"""Top-KAST: the largest weights are used, and some more are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl._distributed import agree
from torch_adapmtl.budget.schedule import SparsitySchedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import shaped_like
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods._lowest import lowest
from torch_adapmtl.methods.dynamic import MovingController, default_interval
from torch_adapmtl.methods.magnitude import MagnitudeController

__all__ = ["TopKAST", "TopKASTController"]


@dataclass(frozen=True)
class TopKAST(Method):
    """Sparse forward passes, and gradients for more weights (Jayakumar et al., arXiv 2106.03517).

    In each layer, the forward pass uses the largest weights by magnitude, the set A, from the first
    step on. All layers have the sparsity of the target. The optimiser trains a larger set B, the
    `widening` times as many largest weights (Section 2.1): those outside A get the gradient that
    they would have as zeros, and move to A when they have become larger than others. Weights
    outside B do not change. Every `interval` steps both sets are chosen anew; those of the last
    update stay until the end.

    What is left out: the paper's exploration regularisation penalises B, and the part of it outside
    A more, by a factor of the inverse density (Section 2.3). Here the weight decay of the optimiser
    penalises all of B alike; without it there is no penalty. The backward pass computes dense
    gradients, of which those outside B are dropped, so that no computation is saved. The
    optimiser's momentum of weights outside B stays, and acts when they return to B.

    The controller holds a copy of the dense weights, and a mask, for each layer; both are part of
    the checkpoint.

    Processes that train together start from the dense weights of the first, which takes an exchange
    in `apply_adapmtl`: move the model to its device before.

    Args:
        widening: How many times as many weights are trained as are used; at least 1. The paper has
            sparsities of 90 % forward and 80 % backward, or 95 % and 90 %: 2.
        interval: Steps between two choices; 100 if None, as in the paper's cheaper variant, or a
            fiftieth of a run of fewer than 5000 steps.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `widening` is not a number.

    Example:
        >>> import torch
        >>> from torch_adapmtl import TopKAST, apply_adapmtl
        >>> model = torch.nn.Linear(20, 10)
        >>> pruner = apply_adapmtl(
        ...     model,
        ...     target_sparsity=0.9,
        ...     total_steps=9,
        ...     groups={"main": ["*"]},
        ...     method=TopKAST(),
        ... )
        >>> pruner.sparsity()  # before the first step
        0.9
        >>> pruner.loss({"main": model(torch.randn(4, 20)).square().mean()}).backward()
        >>> int((model.weight.grad != 0).sum())  # of 200
        40
    """

    widening: float = 2.0
    interval: int | None = None

    def __post_init__(self) -> None:
        check_numbers(widening=self.widening)
        if not 1 <= self.widening < float("inf"):
            raise ValueError(f"widening must be at least 1 and finite, got {self.widening}")
        if self.interval is not None:
            check_count("interval", self.interval)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> TopKASTController:
        """Make the controller."""
        return TopKASTController(self, layers, target_sparsity, total_steps)


class TopKASTController(MovingController, MagnitudeController):
    """Chooses the weights that are used and those that are trained, by magnitude in each layer."""

    def __init__(
        self, method: TopKAST, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        constant = SparsitySchedule(start=0.0, end=0.0)
        super().__init__(layers, target_sparsity, total_steps, constant, uniform=True)
        self.method = method
        self.every = method.interval or default_interval(total_steps)
        for i, layer in enumerate(layers):
            weight = layer.weight.detach()
            # Which weights are trained, and all weights as they were when this was chosen: momentum
            # and weight decay would move the others too.
            self.register_buffer(f"trained_{i}", torch.ones_like(weight, dtype=torch.bool))
            self.register_buffer(f"chosen_{i}", weight.clone())

    def due(self, step: int) -> bool:
        """Whether the sets are chosen after `step` steps, or the run ends."""
        return step == self.total_steps or step % self.every == 0

    @torch.no_grad()
    def begin(self) -> None:
        """Choose the sets for the first step."""
        for layer in self.layers:
            if self.synchronize:  # values under masks are no parameters, which others would send
                values = layer.weight.detach().contiguous()
                layer.weight.copy_(agree(values.view(-1)).view_as(values))
        self._select()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Choose the sets again."""
        for i, layer in enumerate(self.layers):
            chosen, trained = self.stored_at("chosen", i), self.stored_at("trained", i)
            layer.weight.copy_(torch.where(trained, layer.weight, chosen))
            layer.threshold.mask = layer.initial_mask
        self._select()

    def _select(self) -> None:
        scores = self.open_scores()
        self.prune(self.budget)
        for i, (layer, score) in enumerate(zip(self.layers, scores, strict=True)):
            trained = ~lowest([score], len(score) - self._number(i, score))[0]
            if self.synchronize:
                agree(trained)
            self.stored_at("trained", i).copy_(shaped_like(layer.weight, trained))
            self.stored_at("chosen", i).copy_(layer.weight)
        self._show()

    def _number(self, index: int, score: Tensor) -> int:
        """How many weights of a layer are trained."""
        mask = self.layers[index].mask
        used = len(score) if mask is None else int(mask.sum())
        return min(round(self.method.widening * used), int((score > -torch.inf).sum()))

    def _show(self) -> None:
        for i, layer in enumerate(self.layers):
            layer.threshold.gradient_mask = self.stored_at("trained", i)

    def refresh(self) -> None:
        """Use the sets of the loaded state."""
        super().refresh()
        self._show()
