"""The base classes: a `Method` holds settings and makes a `Controller`, which moves thresholds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import shaped_like
from torch_adapmtl.methods._lowest import lowest, open_score

__all__ = ["Controller", "Method"]

_GOLDEN = 0.6180339887498949


class Method(ABC):
    """A way of pruning: the `method` of [`apply_adapmtl`][torch_adapmtl.apply_adapmtl].

    It holds settings and makes a [`Controller`][torch_adapmtl.Controller] for each run. Make a
    subclass a frozen dataclass: `config` then reads the settings from its fields.

    Example:
        >>> from torch_adapmtl import Adaptive, Method, SNIP
        >>> isinstance(Adaptive(), Method), SNIP(batches=2).config()
        (True, {'name': 'SNIP', 'batches': 2})
    """

    @abstractmethod
    def controller(
        self, layers: Layers, model: nn.Module, *, target_sparsity: float, total_steps: int
    ) -> Controller:
        """Make the controller of a run.

        The controller sets `layer.threshold` of each layer and changes nothing else; the thresholds
        are attached to the model afterwards.

        Args:
            layers: The layers, in the order of `model.parameters()`.
            model: The plain model, without thresholds.
            target_sparsity: What is to be pruned at the end, as a fraction: zeros among all weights
                of the layers, or the multiply-adds that they save (`layers.counts`).
            total_steps: Number of steps of the run.
        """

    def config(self) -> dict[str, Any]:
        """Return the settings that decide what a run does, as values that JSON can hold.

        A checkpoint stores the config, and a state dict is loaded only into a run with an equal
        config. By default the config is the name of the class and the fields of the dataclass.
        """
        return settings_of(self)


class Controller(KeepsPrecision, ABC):
    """Moves the thresholds and masks of the layers in the course of a run.

    Optional hooks do nothing by default; override those you need.

    Args:
        layers: The layers. A subclass sets `layer.threshold` of each.
        target_sparsity: What is to be pruned at the end, as a fraction: zeros among all weights of
            the layers, or the multiply-adds that they save (`layers.counts`).
        total_steps: Number of steps of the run.

    Attributes:
        budget: What is to be pruned at the end, `layers.budget(target_sparsity)`: a number of
            zeros, or of multiply-adds.
        fix_step: The step at which the zeros are fixed; no update is due after it.
        interval: Approximate number of steps between two updates.
        exact: Whether the run ends with zeros that meet the budget, fixed by masks.
        fixed: Whether the zeros are fixed.
        threshold_decay: Weight decay of thresholds that the optimiser trains.
        initial: The sparsity that the schedule starts from, as a fraction.
        synchronize: Whether processes that train together prune the same weights.
        shardable: Whether the controller works on sharded weights (`fully_shard`).
        has_thresholds: Whether thresholds prune weights; if only masks do, all thresholds are zero.
    """

    exact = True
    fixed = False
    threshold_decay = 0.0
    initial = 0.0
    synchronize = True
    shardable = False
    has_thresholds = True

    def __init__(self, layers: Layers, target_sparsity: float, total_steps: int) -> None:
        super().__init__()
        self.layers = layers
        self.aim(target_sparsity, total_steps)

    def aim(self, target_sparsity: float, total_steps: int) -> None:
        """Set the target and the number of steps, and derive the other numbers from them."""
        self.target_sparsity, self.total_steps = target_sparsity, total_steps
        self.fix_step = total_steps
        # At least 50 updates in a run, and in a long run not many more than 250.
        self.interval = max(1, min(total_steps // 50, max(10, total_steps // 250)))
        self.budget = self.layers.budget(target_sparsity)

    # --- for subclasses to define -----------------------------------------------------------------

    @abstractmethod
    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""

    @abstractmethod
    def fix(self) -> None:
        """Prune to exactly the target now: choose the zeros, then call `fix_zeros`."""

    def check_initial(self) -> None:
        """Check that initial masks do not fix more zeros than the target asks for.

        Raises:
            ValueError: If they do.
        """
        layers = self.layers
        initial = layers.cost(layers.initial_zeros)
        if initial > self.budget and not layers.meets(layers.initial_zeros, self.budget):
            raise ValueError(
                f"target_sparsity={self.target_sparsity} asks for {self.budget:.12g} "
                f"{layers.units[1]}, but masks that are there already, or zeros that are kept, "
                f"hold {initial:.12g}: raise the target, pass keep_zeros=False, or remove the masks"
            )

    def begin(self) -> None:
        """Set masks that act from the first forward pass on.

        Called once, after the thresholds and the initial masks were attached. A state that is
        loaded later replaces the masks.
        """

    def due(self, step: int) -> bool:
        """Whether an update is due after `step` steps."""
        # A fractional spacing, so that updates do not always meet the same batch if batches of
        # several kinds alternate.
        spacing = self.interval + _GOLDEN if self.interval > 1 else 1
        turn = step // spacing != (step - 1) // spacing
        return step == self.fix_step or (turn and step < self.fix_step)

    def update(self, step: int) -> None:
        """Move thresholds and masks to their values after `step` steps."""

    def prepare(self, step: int, due: bool) -> None:
        """Prepare for the step that follows `step` steps.

        Called once before the losses of each step, and again after the model was copied or a state
        was loaded. Hooks on parameters can be registered here: they are registered again then.

        Args:
            step: Number of steps taken.
            due: Whether an update is due after the coming step.
        """

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Receive the unweighted task losses of a step, 0-d and with their graph."""

    def refresh(self) -> None:
        """Recompute everything that the state dict does not hold, after it was loaded."""

    def retarget(self, target_sparsity: float, total_steps: int, zeros: Sequence[int]) -> None:
        """Start a new run to another target.

        Args:
            target_sparsity: What is to be pruned at the end, as a fraction.
            total_steps: Number of steps of the new run.
            zeros: The present number of zeros of each layer.

        Raises:
            RuntimeError: Unless a subclass supports it.
        """
        raise RuntimeError(
            "retarget() needs method='adaptive', whose thresholds follow a schedule: call "
            "finalize() and apply_adapmtl again (its zeros stay zero), or prepare the model with "
            "that method"
        )

    def missed(self, sparsity: float) -> str:
        """Explain why the run missed its target, with a remedy; an empty string if it did not.

        Args:
            sparsity: What is pruned, as a fraction of what the budget counts.
        """
        return ""

    # --- provided to subclasses -------------------------------------------------------------------

    @torch.inference_mode(False)  # masks stay for training, where step() may be called from
    def step(self, step: int, due: bool) -> None:
        """Update or fix after `step` steps if that is due; at the last step, write the zeros."""
        if due and not self.fixed:
            self.fix() if step == self.fix_step else self.update(step)
        elif self.fixed and step == self.total_steps:
            # The optimiser may have moved parameters under the masks, or a kept weight to zero.
            self.write()

    @torch.no_grad()
    def fix_zeros(self, keep: list[Tensor]) -> None:
        """Write the sparse weights into the parameters, and fix their zeros by masks.

        The thresholds become zero.

        Args:
            keep: Which weights of each layer remain, one flat bool tensor for each layer.

        Raises:
            RuntimeError: If the zeros do not meet the budget (`layers.meets`).
        """
        zeros = [flat.numel() - int(torch.count_nonzero(flat)) for flat in keep]
        if not self.layers.meets(zeros, self.budget):
            weights, pruned = self.layers.units
            raise RuntimeError(
                f"{type(self).__name__} was to fix {self.budget:.12g} {pruned} of "
                f"{self.layers.total_cost:.12g} {weights}, and chose "
                f"{self.layers.cost(zeros):.12g}: choose that many, as fix_lowest() does"
            )
        for layer, flat in zip(self.layers, keep, strict=True):
            layer.threshold.mask = shaped_like(layer.weight, flat)
        self.write()
        for layer in self.layers:
            layer.threshold.set_threshold(0.0)  # else weights would shrink again
        self.fixed = True

    def fix_lowest(self, scores: Sequence[Tensor]) -> None:
        """Prune the weights with the lowest scores to the target, and fix the zeros.

        Args:
            scores: A tensor for each layer, in the weight's shape or flat. Weights that a mask has
                pruned already stay pruned.
        """
        opened = [
            open_score(score, layer) for score, layer in zip(scores, self.layers, strict=True)
        ]
        pruned = lowest(opened, self.budget, self.layers.costs)
        self.fix_zeros([~flat for flat in pruned])

    @torch.no_grad()
    def write(self) -> None:
        """Write the sparse weights into the parameters; no weight that remains is zero.

        A weight that the mask keeps can still be zero, because it equals the threshold or was zero
        before. It gets the smallest positive number, so that the number of zeros is exact.
        """
        for layer in self.layers:
            sparse = layer.sparse()
            if layer.mask is not None:
                sparse.masked_fill_((sparse == 0).logical_and_(layer.mask), _smallest(sparse.dtype))
            layer.assign(sparse)


def settings_of(settings: Any) -> dict[str, Any]:
    """The name of a class and its dataclass fields, as values that JSON can hold."""
    name = type(settings).__name__
    if not dataclasses.is_dataclass(settings):
        raise TypeError(
            f"config: {name} is not a dataclass, so that its settings are not known: make it one "
            f"(@dataclass(frozen=True)), or override config()"
        )
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {"name": name, **as_json(fields, name)}


def as_json(value: Any, path: str) -> Any:
    """A setting as JSON gives it back: tuples as lists, names as strings, numbers of Python.

    Raises:
        TypeError: If JSON cannot hold it; `path` says where it stands.
    """
    if dataclasses.is_dataclass(value):
        return settings_of(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(item, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"config: {path} is {value!r}, which a checkpoint cannot store: use numbers, strings, "
        f"lists, mappings and dataclasses as settings, or override config()"
    )


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number that the device does not flush to zero."""
    # float16 subnormals are never flushed, and its smallest normal number is rather large.
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
