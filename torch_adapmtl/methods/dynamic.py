"""Dynamic sparse training: masks that prune and regrow by the dense gradient (RigL, GraNet)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torch_adapmtl._checks import check_count, check_numbers
from torch_adapmtl._distributed import agree, sum_over_processes
from torch_adapmtl.budget.schedule import SparsitySchedule, check_schedule
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import Layer, count_zeros, shaped_like
from torch_adapmtl.methods._base import Method
from torch_adapmtl.methods._drop_and_grow import (
    cosine_share,
    drop_and_grow,
    erk_numbers,
    random_mask,
)
from torch_adapmtl.methods.masks import MaskController, MaskMethod

__all__ = [
    "DynamicController",
    "GraNet",
    "GraNetController",
    "MovingController",
    "RigL",
    "RigLController",
]


class MovingController(MaskController):
    """Prunes by magnitude, by masks that move until the run ends with the present ones."""

    def scores(self) -> list[Tensor]:
        """The magnitude of each weight."""
        return [layer.weight.abs() for layer in self.layers]

    @torch.no_grad()
    def fix(self) -> None:
        """Fix the zeros of the present masks; prune by magnitude first if they are too few."""
        keep = [
            torch.ones(size, dtype=torch.bool, device=layer.weight.device)
            if layer.mask is None
            else layer.mask.flatten()
            for layer, size in zip(self.layers, self.layers.sizes, strict=True)
        ]
        zeros = [len(flat) - int(flat.sum()) for flat in keep]
        if self.layers.meets(zeros, self.budget):
            self.fix_zeros(keep)
        else:
            super().fix()


class DynamicController(MovingController):
    """Moves masks by drop and grow: by magnitudes, and by the dense gradient of one batch.

    Before the steps after which masks move, `observe` computes the gradient of the sum of the task
    losses for all weights, pruned ones included: the gradients in `grad` are those of the
    remaining weights only.
    """

    def __init__(
        self,
        layers: Layers,
        target_sparsity: float,
        total_steps: int,
        schedule: SparsitySchedule,
        seed: int,
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, schedule)
        self.seed = seed
        self._gradients: list[Tensor] = []  # empty unless masks move after this step
        self._observing = False

    @abstractmethod
    def moves(self, step: int) -> bool:
        """Whether masks move by the gradient after `step` steps."""

    def due(self, step: int) -> bool:
        """Whether masks move after `step` steps."""
        return step == self.total_steps or self.moves(step)

    def start(self, budget: float) -> None:
        """Set random masks whose densities are those of the Erdos-Renyi-Kernel rule.

        Args:
            budget: How many weights they prune, or the multiply-adds that these save.
        """
        capacities = [
            size - gone
            for size, gone in zip(self.layers.sizes, self.layers.initial_zeros, strict=True)
        ]
        numbers = erk_numbers(
            [layer.weight.shape for layer in self.layers],
            self.layers.total_cost - max(budget, self._initial),
            capacities,
            self.layers.costs,
        )
        # A generator of its own, so that all processes, and a run that starts again, draw the same.
        generator = torch.Generator().manual_seed(self.seed)
        for layer, number in zip(self.layers, numbers, strict=True):
            allowed = _allowed(layer)
            if number < allowed.numel():
                kept = random_mask(allowed, number, generator)
                layer.threshold.mask = shaped_like(layer.weight, kept)

    def prepare(self, step: int, due: bool) -> None:
        """Observe the gradient of a step after which the masks move."""
        super().prepare(step, due)
        self._observing = not self.fixed and due and self.moves(step + 1)
        self._gradients = []

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Add the dense gradient of a batch, if the masks move after this step."""
        if not self._observing:
            return
        weights = {i: layer.weight for i, layer in enumerate(self.layers)}
        trained = {i: weight for i, weight in weights.items() if weight.requires_grad}
        if not self._gradients:
            self._gradients = [
                torch.zeros_like(w, dtype=torch.float32).flatten() for w in weights.values()
            ]
        total = torch.stack(list(losses.values())).sum()
        found = torch.autograd.grad(
            total, list(trained.values()), retain_graph=True, allow_unused=True
        )
        for i, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                self._gradients[i] += gradient.detach().float().flatten()

    def move(self, share: float) -> None:
        """Drop a share of the weights of each layer, and grow as many.

        Without a gradient, because no loss was passed in this step, the masks stay.
        """
        gradients, self._gradients = self._gradients, []
        seen = torch.ones((), device=self.layers.device) * bool(gradients)
        if self.synchronize:
            sum_over_processes(seen)
        if not bool(seen):
            return
        for i, layer in enumerate(self.layers):
            weight = layer.weight
            gradient = gradients[i] if gradients else weight.new_zeros(weight.numel()).float()
            if self.synchronize:
                gradient = sum_over_processes(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
            if layer.mask is None:
                continue
            kept = layer.mask.flatten()
            new = drop_and_grow(
                weight.detach().abs().flatten(), gradient, kept, _allowed(layer), share
            )
            if self.synchronize:
                agree(new)
            grown = shaped_like(weight, new & ~kept)
            weight.masked_fill_(grown, 0.0)
            layer.threshold.mask = shaped_like(weight, new)


@dataclass(frozen=True)
class RigL(Method):
    r"""Sparse from start to end; masks move by the gradient (Evci et al., arXiv 1911.11134).

    The run starts with random masks. The density of a layer is in proportion to the sum of its
    dimensions divided by their product, and at most 1 (Erdos-Renyi-Kernel, Section 3 of the paper);
    the densities do not change. Every `interval` steps, until `end`, each layer drops the share
    \(\alpha/2 \cdot (1 + \cos(\pi t / T_\mathrm{end}))\) of its remaining weights, those with the
    smallest magnitudes, and grows as many of the others, those with the largest magnitudes of the
    dense gradient (Algorithm 1). A weight that grows starts from zero; one that was dropped in the
    same update and grows again keeps its value.

    The dense gradient is that of the sum of the task losses, before they are weighted, on the
    batches of the step before the update. It takes a second backward pass, in these steps only.
    If no loss is passed to `loss()` in such a step, the masks do not move.

    What differs from the paper: all layers have the density of the rule, the first one too, unless
    it is excluded. The numbers of weights are rounded by the largest remainders, so that the total
    is exact. With `count="macs"`, the densities are scaled to meet the multiply-adds. The
    optimiser goes on after an update: it is not stepped less often, and its momentum stays.

    Args:
        fraction: Share of the remaining weights of a layer that moves at first, \(\alpha\); in
            (0, 1).
        interval: Steps between two updates, \(\Delta T\); 100 as in the paper if None, or a
            fiftieth of a run of fewer than 5000 steps.
        end: When the masks stop moving, \(T_\mathrm{end}\), as a fraction of `total_steps`.
        seed: Seed of the random masks. The global random state is not used.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `fraction` or `end` is not a number.

    Example:
        >>> import torch
        >>> from torch_adapmtl import RigL, apply_adapmtl
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Linear(40, 5))
        >>> pruner = apply_adapmtl(
        ...     model,
        ...     target_sparsity=0.8,
        ...     total_steps=9,
        ...     groups={"main": ["*"]},
        ...     method=RigL(),
        ... )
        >>> pruner.sparsity()  # before the first step
        0.8
        >>> {
        ...     name: round(1 - zeros, 3)
        ...     for name, zeros in pruner.sparsity("layer").items()
        ... }
        {'0.weight': 0.142, '1.weight': 0.43}
    """

    fraction: float = 0.3
    interval: int | None = None
    end: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        check_moves(self.fraction, self.interval, self.seed)
        check_numbers(end=self.end)
        if not 0 <= self.end <= 1:
            raise ValueError(
                f"end must lie in [0, 1], as a fraction of total_steps, got {self.end}"
            )

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> RigLController:
        """Make the controller."""
        return RigLController(self, layers, target_sparsity, total_steps)


class RigLController(DynamicController):
    """Moves random masks by the gradient, at constant densities."""

    def __init__(
        self, method: RigL, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        constant = SparsitySchedule(start=0.0, end=0.0)
        super().__init__(layers, target_sparsity, total_steps, constant, method.seed)
        self.method = method
        self.every = method.interval or default_interval(total_steps)

    def begin(self) -> None:
        """Set the random masks."""
        self.start(self.budget)

    def moves(self, step: int) -> bool:
        """Whether masks move after `step` steps."""
        return step % self.every == 0 and step < self.method.end * self.total_steps

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Drop and grow, by the share that is due after `step` steps."""
        end = self.method.end * self.total_steps
        self.move(cosine_share(self.method.fraction, step, end))


@dataclass(frozen=True)
class GraNet(MaskMethod):
    r"""Gradual pruning with regeneration of pruned weights (Liu et al., arXiv 2106.10404).

    Every `interval` steps from the start of the schedule on, the smallest of the remaining weights
    of the whole model are pruned, as many as the schedule asks for (Zhu and Gupta's cubic one).
    Then each layer regenerates: it drops the share \(r/2 \cdot (1 + \cos(\pi t / T))\) of its
    remaining weights, those with the smallest magnitudes, and grows as many of the others, those
    with the largest magnitudes of the dense gradient, from zero, as in
    [`RigL`][torch_adapmtl.RigL], which says how the gradient is computed. Regeneration goes on
    after the schedule has reached the target, until the last step. If no loss is passed to `loss()`
    in the step before an update, the update only prunes.

    The schedule begins at its sparsity `initial`, with random masks of Erdos-Renyi-Kernel densities
    as in `RigL`; with `initial=0`, the model is dense at first. The defaults are those of the
    authors' code (github.com/VITA-Group/GraNet) for CIFAR: from half of the weights to the target
    in the first 110 of 160 epochs, and r = 0.5.

    What differs from that code: the share of the weights that moves decays to 0 rather than to
    0.005, and is rounded down. The target is exact, and met at the last step in any case.

    Args:
        schedule: How the sparsity rises.
        fraction: Share of the remaining weights of a layer that is regenerated at first, r; in
            (0, 1).
        interval: Steps between two updates; 100 if None, or a fiftieth of a run of fewer than 5000
            steps.
        seed: Seed of the random masks. The global random state is not used.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If `fraction` is not a number, or `schedule` no schedule.

    Example:
        >>> import torch
        >>> from torch_adapmtl import GraNet, SparsitySchedule, apply_adapmtl
        >>> model = torch.nn.Linear(20, 10)
        >>> options = {
        ...     "target_sparsity": 0.9,
        ...     "total_steps": 9,
        ...     "groups": {"main": ["*"]},
        ... }
        >>> pruner = apply_adapmtl(model, method=GraNet(), **options)
        >>> pruner.sparsity()  # before the first step
        0.5
        >>> dense = GraNet(schedule=SparsitySchedule(start=0.1, end=0.5))
        >>> apply_adapmtl(torch.nn.Linear(20, 10), method=dense, **options).sparsity()
        0.0
    """

    schedule: SparsitySchedule = field(
        default_factory=lambda: SparsitySchedule(start=0.0, end=0.6875, initial=0.5)
    )
    fraction: float = 0.5
    interval: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_moves(self.fraction, self.interval, self.seed)

    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> GraNetController:
        """Make the controller."""
        return GraNetController(self, layers, target_sparsity, total_steps)


class GraNetController(DynamicController):
    """Prunes by magnitude along the schedule, and regenerates by the gradient."""

    def __init__(
        self, method: GraNet, layers: Layers, target_sparsity: float, total_steps: int
    ) -> None:
        super().__init__(layers, target_sparsity, total_steps, method.schedule, method.seed)
        self.method = method
        self.every = method.interval or default_interval(total_steps)

    def wanted(self, step: int) -> float:
        """What is to be pruned after `step` steps."""
        sparsity = self.schedule(step, self.total_steps, self.target_sparsity)
        return self.layers.budget(sparsity)

    def begin(self) -> None:
        """Set the random masks, if the schedule begins sparse."""
        if budget := self.wanted(0):
            self.start(budget)

    def moves(self, step: int) -> bool:
        """Whether the masks are updated after `step` steps."""
        began = self.schedule.start * self.total_steps <= step
        return began and step % self.every == 0 and step < self.total_steps

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune to the sparsity of the schedule after `step` steps, and regenerate."""
        budget = self.wanted(step)
        zeros = [count_zeros(layer.mask) for layer in self.layers]
        # What meets the budget stays: to multiply-adds it is met approximately only.
        if self.layers.cost(zeros) < budget and not self.layers.meets(zeros, budget):
            self.prune(budget)
        self.move(cosine_share(self.method.fraction, step, self.total_steps))


def check_moves(fraction: float, interval: int | None, seed: int) -> None:
    """Check the settings of moving masks."""
    check_numbers(fraction=fraction)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if interval is not None:
        check_count("interval", interval)
    check_count("seed", seed, 0)


def default_interval(total_steps: int) -> int:
    """Steps between two updates: 100, or a fiftieth of a shorter run."""
    return max(1, min(100, total_steps // 50))


def _allowed(layer: Layer) -> Tensor:
    """Which weights a mask may keep, flat: all but those that were zero before the run."""
    weight = layer.weight
    if layer.initial_mask is None:
        return torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    return layer.initial_mask.to(weight.device).flatten()
