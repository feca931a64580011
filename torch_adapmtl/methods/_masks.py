"""Hard masks on exactly as many weights as asked: what the baselines share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torch_adapmtl.methods._base import Controller
from torch_adapmtl._distributed import agree
from torch_adapmtl.layers.layer import Layer, count_gone, shaped_like
from torch_adapmtl.budget.solver import SparsitySchedule
from torch_adapmtl.tensor.soft_threshold import SoftThreshold

__all__ = ["Masked", "OneShot", "lowest", "task_gradients"]


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` lowest of all scores together; of equal ones the first in order.

    Args:
        scores: Any shapes; -inf, for what is gone already, comes first, then NaN.
        count: How many to mark.

    Returns:
        Boolean tensors, flat, one for each of `scores`.
    """
    flat = torch.cat([part.flatten() for part in scores])
    # Above -inf, or a NaN could take the place of a weight that is gone, which would return.
    least = torch.finfo(flat.dtype).min
    flat = flat.nan_to_num(nan=least, posinf=torch.inf, neginf=-torch.inf)
    if count == 0:
        marked = torch.zeros_like(flat, dtype=torch.bool)
    else:
        level = flat.kthvalue(count).values
        marked = flat < level
        ties = (flat == level).nonzero().squeeze(1)
        marked[ties[: count - int(marked.sum())]] = True
    return list(marked.split([part.numel() for part in scores]))


def task_gradients(
    losses: Mapping[str, Tensor], layers: Sequence[Layer]
) -> dict[str, list[Tensor | None]]:
    """The gradient of each task's loss for each layer's weight; None where a task has none."""
    weights = [layer.weight for layer in layers]
    return {
        task: list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
        for task, loss in losses.items()
    }


class Masked(Controller):
    """Prunes by masks, along a schedule, the weights with the lowest scores.

    Args:
        layers: The layers, in the model's order; their thresholds (zero) are made here.
        target: Zeros among all weights of the layers at the end, as a fraction.
        total_steps: Number of steps.
        schedule: How the sparsity gets there.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        target: float,
        total_steps: int,
        schedule: SparsitySchedule,
    ) -> None:
        super().__init__(layers, target, total_steps)
        self.schedule = schedule
        self._least = sum(layer.masked for layer in layers)
        if self._least > self.zeros:
            raise ValueError(
                f"target_sparsity={target} asks for {self.zeros} zeros, but masks that are there "
                f"already hold {self._least}: raise the target or remove the masks"
            )
        for layer in layers:
            weight = layer.weight
            layer.threshold = SoftThreshold(0.0, persistent=False).to(weight.device, weight.dtype)

    def thresholds(self) -> Tensor:
        """The thresholds: none."""
        return torch.zeros(len(self.layers), device=self.layers[0].weight.device)

    @abstractmethod
    def scores(self) -> list[Tensor]:
        """What each weight is worth, by layer; -inf for what a mask has taken already."""

    def choose(self, zeros: int) -> list[Tensor]:
        """Mark the weights that are pruned when `zeros` are, by layer, bool and flat."""
        return lowest(self.scores(), zeros)

    def chosen(self, zeros: int) -> list[Tensor]:
        """The same, alike in all processes that train together: each has seen other batches."""
        found = self.choose(zeros)
        return [agree(flat) for flat in found] if self.synchronize else found

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Prune to where the schedule is after `step` steps."""
        wanted = round(self.schedule(step, self.total_steps, self.target) * sum(self._sizes))
        self.mask(self.chosen(max(wanted, self._least)))

    def mask(self, gone: Sequence[Tensor]) -> None:
        """Put masks on the layers where a weight is gone."""
        for layer, flat in zip(self.layers, gone, strict=True):
            layer.threshold.mask = shaped_like(layer.weight, ~flat) if bool(flat.any()) else None

    @torch.no_grad()
    def freeze(self) -> None:
        """Prune to the target now, exactly, and hold the zeros by masks."""
        self.hold([~flat for flat in self.chosen(self.zeros)])

    def refresh(self) -> None:
        """Count the zeros that the model of a loaded state had been given with."""
        self._least = sum(count_gone(layer.given_mask) for layer in self.layers)

    def store(self, name: str) -> None:
        """Register a buffer of zeros for each layer's weight, float32: it moves with the model."""
        for i, layer in enumerate(self.layers):
            zeros = torch.zeros_like(layer.weight, dtype=torch.float32)
            self.register_buffer(f"{name}_{i}", zeros)

    def stored(self, name: str, index: int) -> Tensor:
        """One of the buffers that `store` registered."""
        found = self._buffers[f"{name}_{index}"]
        assert found is not None
        return found

    def unmasked(self, score: Callable[[Layer, int], Tensor]) -> list[Tensor]:
        """The score of each layer, flat, with -inf where its mask has a zero."""
        found = []
        for i, layer in enumerate(self.layers):
            own, mask = score(layer, i).detach().float().flatten(), layer.threshold.mask
            if mask is not None:
                own = own.masked_fill(~mask.to(own.device).flatten(), -torch.inf)
            found.append(own)
        return found


class OneShot(Masked):
    """Prunes to the target once, by scores from the gradients of the first batches.

    Args:
        layers: See `Masked`.
        target: See `Masked`.
        total_steps: See `Masked`.
        batches: How many batches to score; the masks come with the last of them.
    """

    _MANY = 0.1  # a share of weights without any effect that is worth a warning

    def __init__(
        self, layers: Sequence[Layer], *, target: float, total_steps: int, batches: int
    ) -> None:
        never = SparsitySchedule(start=1.0, end=1.0)
        super().__init__(layers, target=target, total_steps=total_steps, schedule=never)
        self.batches = batches
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._seen = 0  # the same on the host: to ask the device would wait for it in every step

    seen: Tensor

    @abstractmethod
    def score(self, losses: Mapping[str, Tensor]) -> None:
        """Add what the losses of one batch say to the scores."""

    def effects(self) -> list[Tensor]:
        """How much the losses depend on each weight, by layer; zero if they do not at all."""
        return self.scores()

    def follow(self, losses: Mapping[str, Tensor]) -> None:
        """See the losses of a batch that comes after those."""

    def due(self, step: int) -> bool:
        """Whether the weights are looked at after `step` steps: at the end."""
        return step == self.total_steps

    def refresh(self) -> None:
        """Read how many batches a loaded state has seen."""
        super().refresh()
        self._seen = int(self.seen)

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Score the first batches, then prune: the masks hold from the next forward pass on."""
        if self.frozen or self._seen == self.batches:
            self.follow(losses)
            return
        self.score(losses)
        self.seen += 1
        self._seen += 1
        if self._seen == self.batches:
            with torch.no_grad():
                share = self._share_without_effect()
                self.mask(self.chosen(self.zeros))
            if share >= self._MANY and self.zeros > self._least:
                warnings.warn(
                    f"{share:.0%} of the prunable weights score exactly zero on the batches that "
                    f"were scored, since no loss depends on them yet, and go first, whole layers "
                    f"of them. So do all residual branches whose last scale starts at zero, as "
                    f"timm's zero_init_last has them: start it at 1 (zero_init_last=False in "
                    f"timm). Otherwise look for dead units, or for a task without a loss in these "
                    f"batches",
                    stacklevel=3,
                )

    def _share_without_effect(self) -> float:
        effects = torch.cat(self.effects())
        left = (effects != -torch.inf).sum().clamp(min=1)
        return float((effects == 0).sum() / left)
