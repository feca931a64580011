"""Candidates for the default method: other shapes of the sparse weight.

They are tried on the choosing half of the suite only. What won became the default of the library;
the others stay here, so that the lines of `docs/results/candidates.jsonl` can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl import Adaptive
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.methods.adaptive import AdaptiveController
from torch_adapmtl.tensor import SoftThreshold
from torch_adapmtl.tensor.shapes import power

__all__ = ["SHAPES", "Shaped"]

# The largest factor.
_MOST = 20.0


def _soft(weight: Tensor, alpha: Tensor) -> Tensor:
    return weight - weight.clamp(-alpha, alpha)


def _rows(weight: Tensor) -> Tensor:
    return weight.reshape(len(weight), -1)


def _shaped_like(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.ndim - 1))


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    return (before / after.clamp(min=1e-12)).clamp(1.0, _MOST)


def _by_layer(weight: Tensor, sparse: Tensor) -> Tensor:
    """The sum of the magnitudes of the layer's kept weights, before and after."""
    return _ratio(weight.abs()[sparse != 0].sum(), sparse.abs().sum())


def _by_layer_squared(weight: Tensor, sparse: Tensor) -> Tensor:
    """The root of the sum of the squares, instead of the sum of the magnitudes."""
    kept = weight.masked_fill(sparse == 0, 0.0)
    return _ratio(kept.norm(), sparse.norm())


def _st3(weight: Tensor, sparse: Tensor) -> Tensor:
    """ST-3's factor, by output channel."""
    every = _rows(weight.abs())
    kept = every.masked_fill(_rows(sparse) == 0, 0.0)
    share = (kept.mean(1) + 1e-6) / (every.mean(1) + 1e-6)
    return _shaped_like(1.01 / (share + 0.01), weight)


def _whole_layer(weight: Tensor, sparse: Tensor) -> Tensor:
    """The norm of all weights of the layer, pruned ones included."""
    return _ratio(weight.norm(), sparse.norm())


def _at_most_2(weight: Tensor, sparse: Tensor) -> Tensor:
    return _by_layer(weight, sparse).clamp(max=2.0)


def _nothing(weight: Tensor, sparse: Tensor) -> Tensor:
    return torch.ones(())


Factor = Callable[[Tensor, Tensor], Tensor]

#: By name: the power of the threshold (1 is soft, infinity hard), and what it is multiplied by.
SHAPES: Mapping[str, tuple[float, Factor]] = {
    "soft, magnitude of the layer": (1.0, _by_layer),
    "soft, magnitude of the layer, at most 2": (1.0, _at_most_2),
    "soft, magnitude of the layer, doubled at most": (1.0, _by_layer),
    "soft, norm of the layer": (1.0, _by_layer_squared),
    "soft, norm of the layer, doubled at most": (1.0, _by_layer_squared),
    "soft, ST-3's factor": (1.0, _st3),
    "soft, norm of all weights": (1.0, _whole_layer),
    "power 3": (3.0, _nothing),
    "power 2, magnitude of the layer": (2.0, _by_layer),
    "power 3, magnitude of the layer": (3.0, _by_layer),
}


def _thresholded(weight: Tensor, alpha: Tensor, shape: str) -> Tensor:
    """The sparse weight before it is multiplied."""
    exponent, _ = SHAPES[shape]
    alpha = alpha.to(weight.dtype)
    return _soft(weight, alpha) if exponent == 1.0 else power(weight, alpha, exponent)


def _sparse_weight(weight: Tensor, alpha: Tensor, shape: str, factor: Tensor | None) -> Tensor:
    """The sparse weight of a shape, with a factor that is known or computed."""
    sparse = _thresholded(weight, alpha, shape)
    sparse = sparse * (SHAPES[shape][1](weight, sparse) if factor is None else factor)
    if shape.endswith("doubled at most"):
        sparse = torch.minimum(sparse.abs(), 2 * weight.abs()).copysign(weight)
    return sparse


class _Apply(torch.autograd.Function):
    """`_sparse_weight`; the gradient passes whole, or to kept weights only."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        alpha: Tensor,
        shape: str,
        factor: Tensor | None,
        straight_through: bool,
    ) -> Tensor:
        sparse = _sparse_weight(weight, alpha, shape, factor)
        ctx.straight_through = straight_through
        if not straight_through:
            ctx.save_for_backward(sparse)
        return sparse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.straight_through:
            (sparse,) = ctx.saved_tensors
            grad = grad.masked_fill(sparse == 0, 0.0)
        return grad, None, None, None, None


class _Threshold(SoftThreshold):
    def __init__(self, shape: str, renewed: str, **options: Any) -> None:
        super().__init__(0.0, **options)
        self.shape, self.renewed = shape, renewed
        self.factor: Tensor | None = None

    def set_threshold(self, value: float) -> None:
        super().set_threshold(value)
        self.factor = None

    def _shrink(self, weight: Tensor, alpha: Tensor, value: float | None) -> Tensor:
        if self.renewed == "updates" and self.factor is None:
            with torch.no_grad():
                dense = weight.detach()
                sparse = _thresholded(dense, alpha, self.shape)
                self.factor = SHAPES[self.shape][1](dense, sparse)
        found: Tensor = _Apply.apply(weight, alpha, self.shape, self.factor, self.straight_through)
        return found


@dataclass(frozen=True)
class Shaped(Adaptive):
    """The default method with another shape of the sparse weights.

    Args:
        shape: A name from `SHAPES`.
        renewed: Whether the factor is computed in each `"step"`, or at `"updates"` of the
            thresholds.
    """

    reach: float | None = math.inf
    shape: str = "soft, magnitude of the layer"
    renewed: str = "step"

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> AdaptiveController:
        """Make the controller, with thresholds of the shape."""
        controller = super().controller(
            layers, model, target_sparsity=target_sparsity, total_steps=total_steps
        )
        for layer in layers:
            threshold = _Threshold(
                self.shape,
                self.renewed,
                straight_through=self.gradient == "straight_through",
                persistent=False,
            )
            threshold.mask = layer.threshold.mask
            layer.threshold = threshold.to(layer.weight.device, layer.weight.dtype)
        return controller
