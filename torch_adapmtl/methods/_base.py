"""What a way of pruning is: a method, which makes a controller, which moves the thresholds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl._precision import KeepsPrecision
from torch_adapmtl.layers.collection import Layers
from torch_adapmtl.layers.layer import shaped_like

__all__ = ["Controller", "Method"]

_GOLDEN = 0.6180339887498949


class Method(ABC):
    """A way of pruning, which [`apply_adapmtl`][torch_adapmtl.apply_adapmtl] takes as `method`.

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

        It puts a threshold of its own on each layer (`layer.threshold`), and changes nothing else:
        the thresholds are not attached to the model yet.

        Args:
            layers: The layers, in the order of `model.parameters()`.
            model: The model, plain.
            target_sparsity: Zeros among all weights of the layers at the end, as a fraction.
            total_steps: Number of steps.
        """

    def config(self) -> dict[str, Any]:
        """Return the settings that decide what a run does, as JSON can hold them.

        Checkpoints store it: a state dict is loaded only into a run whose config is equal. By
        default it is the name of the class and the fields of the dataclass.
        """
        return settings_of(self)


class Controller(KeepsPrecision, ABC):
    """Moves the thresholds and masks of the layers in the course of a run.

    Optional hooks do nothing by default; override those you need.

    Args:
        layers: The layers. A subclass sets `layer.threshold` of each.
        target_sparsity: Zeros among all weights of the layers at the end, as a fraction.
        total_steps: Number of steps.

    Attributes:
        zeros: The number of zeros at the end, `round(target_sparsity * N)`.
        fix_step: The step at which the zeros are fixed; no update is due after it.
        interval: About how many steps lie between two updates.
        exact: Whether the run ends with exactly `zeros` zeros, fixed by masks.
        fixed: Whether masks hold the zeros for good.
        allocates: Whether components are free to differ in their sparsity, and meant to.
        threshold_decay: Weight decay of thresholds that the optimiser trains.
        initial: The sparsity that the schedule starts from, as a fraction.
        synchronize: Whether processes that train together prune the same weights.
        shardable: Whether it works on weights of which each process holds a part.
    """

    exact = True
    fixed = False
    allocates = False
    threshold_decay = 0.0
    initial = 0.0
    synchronize = True
    shardable = False

    def __init__(self, layers: Layers, target_sparsity: float, total_steps: int) -> None:
        super().__init__()
        self.layers = layers
        self.aim(target_sparsity, total_steps)

    def aim(self, target_sparsity: float, total_steps: int) -> None:
        """Set the target, and when it is reached."""
        self.target_sparsity, self.total_steps = target_sparsity, total_steps
        self.fix_step = total_steps
        self.interval = max(1, min(10, total_steps // 50))
        self.zeros = self.layers.zeros_at(target_sparsity)

    # --- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def thresholds(self) -> Tensor:
        """The threshold of each layer, in units of the weight, float32 of shape (L,)."""

    @abstractmethod
    def fix(self) -> None:
        """Prune to the target exactly, now, and fix the zeros: choose them, then `fix_zeros`."""

    def due(self, step: int) -> bool:
        """Whether an update is due after `step` steps."""
        # Not a whole number of steps apart, so that batches which take turns are all seen in time.
        spacing = self.interval + _GOLDEN if self.interval > 1 else 1
        turn = step // spacing != (step - 1) // spacing
        return step == self.fix_step or (turn and step < self.fix_step)

    def update(self, step: int) -> None:
        """Move thresholds and masks to where they should be after `step` steps."""

    def prepare(self, step: int, due: bool) -> None:
        """Get ready for the step after `step` steps; `due` says whether an update follows it.

        Called once before the losses of each step, and again after a copy or a load: what is
        registered here (hooks on parameters) need not survive either.
        """

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """See the task losses of a step before they are weighted, 0-d and with their graph."""

    def refresh(self) -> None:
        """Derive from the state what is not in it, after a state dict was loaded."""

    def retarget(self, target_sparsity: float, total_steps: int, zeros: int) -> None:
        """Start anew, from the present number of `zeros` to another target.

        Raises:
            RuntimeError: Unless the subclass can.
        """
        raise RuntimeError(
            "retarget() needs method='adaptive', whose thresholds follow a schedule: call "
            "finalize() and apply_adapmtl again (its zeros stay zero), or prepare the model with "
            "that method"
        )

    def missed(self, sparsity: float) -> str:
        """Why a run that is not exact ended at this sparsity and what to do; empty if it is fine.

        Args:
            sparsity: Zeros among all weights of the layers, as a fraction.
        """
        return ""

    # --- what it does for a subclass --------------------------------------------------------------

    def step(self, step: int, due: bool) -> None:
        """Do what is due after `step` steps."""
        if due and not self.fixed:
            self.fix() if step == self.fix_step else self.update(step)
        elif self.fixed and step == self.total_steps:
            self.write()  # momentum has moved what the masks hide, or a remaining weight onto zero

    @torch.no_grad()
    def fix_zeros(self, keep: list[Tensor]) -> None:
        """Write the sparse weights into the parameters, and fix their zeros by masks.

        Args:
            keep: For each layer which of its weights remain, bool and flat.
        """
        for layer, flat in zip(self.layers, keep, strict=True):
            layer.threshold.mask = shaped_like(layer.weight, flat)
        self.write()
        self.fixed = True

    @torch.no_grad()
    def write(self) -> None:
        """Write the sparse weights into the parameters, none of those that remain as zero.

        A weight that remains may tie with the threshold, or have been zero all along; it gets the
        smallest number, so that it does not count as pruned.
        """
        for layer in self.layers:
            sparse = layer.sparse()
            if layer.mask is not None:
                sparse.masked_fill_((sparse == 0).logical_and_(layer.mask), _smallest(sparse.dtype))
            layer.assign(sparse)


def settings_of(settings: Any) -> dict[str, Any]:
    """The name of a class and the fields of its dataclass, as JSON can hold them."""
    fields = dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ()
    values = {field.name: _as_json(getattr(settings, field.name)) for field in fields}
    return {"name": type(settings).__name__, **values}


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return settings_of(value)
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(
        f"config() cannot store {value!r}: use numbers, strings, lists, mappings and dataclasses "
        f"as settings, or override config()"
    )


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number that is safe from being flushed to zero."""
    # Half precision has few small numbers, and its subnormals are never flushed.
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
