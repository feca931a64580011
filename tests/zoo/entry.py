"""What one model of the zoo is: how it is made, what it is fed, and its components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

TASKS = {"seg": 4, "depth": 1, "normal": 3}  # of `Heads`, with the number of their outputs


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: What it is called, here and in the table of the docs.
        family: The part of the table that it is in.
        make: Makes the model, small and with random weights.
        inputs: Makes what the training loop gives it, in a form that `example_inputs=` takes.
        expected: For each component the parts of the model whose prunable tensors lie in it. A
            part is the name of a module or of a tensor, or a glob for some; of the parts that
            a tensor lies in the longest decides.
        needs: The package that it comes from.
        options: What `apply_adapmtl` needs to be told, `task_outputs=` or `prunable=`, or what
            makes that.
        given: Whether `apply_adapmtl` gets the inputs too; otherwise it makes its own.
        values: Whether the outputs depend on the weights as the graph says, which they do not
            where the model detaches something.
        ignored: Patterns of the warnings of other packages.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    expected: Mapping[str, Collection[str]]
    needs: str | None = None
    options: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    given: bool = True
    values: bool = True
    ignored: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments of `apply_adapmtl`."""
        return dict(self.options() if callable(self.options) else self.options)

    def components(self, names: Iterable[str]) -> dict[str, str]:
        """The expected component of each of the tensors `names`; each part must say something."""
        component = {part: name for name, parts in self.expected.items() for part in parts}
        found, idle = {}, set(component)
        for name in names:
            fitting = [
                part
                for part in component
                if fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")
            ]
            assert fitting, f"nothing is expected of {name}"
            part = max(fitting, key=len)
            found[name] = component[part]
            idle.discard(part)
        assert not idle, f"no tensor lies in {sorted(idle)}"
        return found


class Heads(nn.Module):
    """An encoder and one small head per task, linear or of 1x1 convolutions."""

    def __init__(self, encoder: nn.Module, width: int, dense: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.dense = dense
        self.heads = nn.ModuleDict(
            {
                task: nn.Conv2d(width, out, 1) if dense else nn.Linear(width, out)
                for task, out in TASKS.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        if self.dense:
            features = features[-1]
            if features.shape[1] != self.heads["seg"].in_channels:  # channels last
                features = features.permute(0, 3, 1, 2)
        elif isinstance(features, tuple):
            features = features[0]
        return {task: head(features) for task, head in self.heads.items()}


def below_heads(encoder: str = "encoder", *, unused: Collection[str] = ()) -> dict[str, Any]:
    """What is expected of `Heads`: the encoder is shared but for its `unused` parts."""
    expected: dict[str, Any] = {task: (f"heads.{task}",) for task in TASKS}
    return {"shared": (encoder,), **expected, **({"unused": unused} if unused else {})}


def images(size: int = 32, *, channels: int = 3, count: int = 2) -> Tensor:
    """A batch of square images, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator)
