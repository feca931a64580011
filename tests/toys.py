"""Small models and loops for the tests of the budget, the controllers and the handle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_adapmtl import Adaptive, Pruner, apply_adapmtl


class TwoTasks(nn.Module):
    """A shared layer, and a head for each of two tasks."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Linear(6, width)
        self.heads = nn.ModuleDict({"a": nn.Linear(width, 5), "b": nn.Linear(width, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {task: head(h) for task, head in self.heads.items()}


class Bag(nn.Module):
    """Layers of any shape, without a forward of their own: each is its own little problem."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        kinds: dict[int, Callable[..., nn.Module]] = {
            2: lambda o, i: nn.Linear(i, o, bias=False),
            3: lambda o, i, k: nn.Conv1d(i, o, k, bias=False),
            4: lambda o, i, k, _: nn.Conv2d(i, o, k, bias=False),
        }
        self.layers = nn.ModuleList(kinds[len(shape)](*shape) for shape in shapes)
        self.to(dtype)

    def losses(self, groups: dict[str, list[str]], wanted: float = 0.3) -> dict[str, Tensor]:
        """One loss a group: how far its weights, as the model sees them, are from `wanted`."""
        found = {}
        for name, members in groups.items():
            weights = [self.get_submodule(member).weight for member in members]
            found[name] = sum(((w.float() - wanted) ** 2).mean() for w in weights)
        return found


def prepare(model: nn.Module, **options: Any) -> Pruner:
    """`apply_adapmtl` with what `TwoTasks` needs; settings of `Adaptive` are taken directly.

    The task losses are weighted by their stability, the weighting that has a state.
    """
    defaults = {
        "target_sparsity": 0.8,
        "total_steps": 20,
        "example_inputs": torch.ones(2, 6),
        "weighting": "stability",
    }
    settings = {f.name for f in dataclasses.fields(Adaptive)} & options.keys()
    if settings:
        options["method"] = Adaptive(**{name: options.pop(name) for name in settings})
    return apply_adapmtl(model, **{**defaults, **options})


def batch(step: int, rank: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The inputs and targets of a step, the same in every run."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(8, 6, generator=generator)
    return x, {"a": x[:, :5].sin(), "b": x[:, 3:] * 2}


def losses(model: nn.Module, step: int, rank: int = 0) -> dict[str, Tensor]:
    """The task losses of `TwoTasks` on the batch of a step."""
    x, targets = batch(step, rank)
    outputs = model(x)
    return {task: (outputs[task].float() - y).square().mean() for task, y in targets.items()}


def train(
    model: nn.Module, pruner: Pruner, optimizer: torch.optim.Optimizer, steps: Sequence[int]
) -> None:
    """Train `TwoTasks`, or something like it, in the loop of three lines."""
    for step in steps:
        pruner.loss(losses(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in a module's state dict that is a tensor."""
    return {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def zeros(pruner: Pruner) -> int:
    """The zeros in the prunable weights, counted where they are used."""
    owners = [tensor.owners[0] for tensor in pruned(pruner)]
    return sum(int((getattr(module, name) == 0).sum()) for module, name in owners)


def weights(pruner: Pruner) -> int:
    """The number of prunable weights."""
    return sum(tensor.parameter.numel() for tensor in pruned(pruner))


def pruned(pruner: Pruner) -> list[Any]:
    """The tensors that are pruned."""
    found = pruner.components
    return [tensor for name in found.names for tensor in found[name]]


def initialise(model: nn.Module, how: str) -> None:
    """Set all parameters in one of the ways that make ties, or zeros, or unequal layers."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if how == "zero":
                parameter.zero_()
            elif how == "constant":
                parameter.fill_(0.25)
            elif how == "coarse":
                parameter.mul_(8).round_().div_(8)
            elif how == "two scales" and i % 2:
                parameter.mul_(1e-3)
