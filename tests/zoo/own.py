"""Designs of the multi-task literature, small and written out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import Entry, images

WIDTH = 8


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows() -> Tensor:
    return images(WIDTH, channels=1)[:, 0, 0]  # (2, WIDTH)


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al., 2018): the experts are shared, the gates not."""

    def __init__(self, tasks: int = 2, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(WIDTH, 12, WIDTH) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, experts) for _ in range(tasks))
        self.towers = nn.ModuleList(mlp(WIDTH, 6, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = [(gate(x).softmax(1)[..., None] * found).sum(1) for gate in self.gates]
        return [tower(own) for tower, own in zip(self.towers, mixed, strict=True)]


class CGC(nn.Module):
    """Customised gate control (Tang et al., 2020): shared experts and some of each task's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList(mlp(WIDTH, 8) for _ in range(2))
        self.own = nn.ModuleDict({t: mlp(WIDTH, 8) for t in "ab"})
        self.gates = nn.ModuleDict({t: nn.Linear(WIDTH, 3) for t in "ab"})
        self.towers = nn.ModuleDict({t: nn.Linear(8, 2) for t in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        common = [expert(x) for expert in self.shared]
        found = {t: torch.stack([*common, own(x)], 1) for t, own in self.own.items()}
        return {
            t: self.towers[t]((self.gates[t](x).softmax(1)[..., None] * found[t]).sum(1))
            for t in found
        }


class CrossStitch(nn.Module):
    """Two networks whose features are mixed twice (Misra et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleDict(
            {t: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for t in "ab"}
        )
        self.stitches = nn.ParameterList(torch.eye(2) * 0.8 + 0.1 for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = b = x
        for first, second, stitch in zip(
            self.columns["a"], self.columns["b"], self.stitches, strict=False
        ):
            both = torch.stack([first(a).relu(), second(b).relu()])
            a, b = (stitch @ both.flatten(1)).view_as(both)
        return {"a": self.columns["a"][2](a), "b": self.columns["b"][2](b)}


class Attending(nn.Module):
    """Each task masks the shared features with an attention of its own (Liu et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.masks = nn.ModuleDict(
            {t: nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2)) for t in ("seg", "depth")}
        )
        self.heads = nn.ModuleDict({t: nn.Conv2d(8, 2, 1) for t in ("seg", "depth")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.body[0](x).relu()
        second = self.body[1](first).relu()
        found = {}
        for task, (near, far) in self.masks.items():
            own = F.avg_pool2d(first * near(first).sigmoid(), 2)
            found[task] = self.heads[task](second * far(second + own).sigmoid())
        return found


class Routed(nn.Module):
    """Each input goes to one expert, chosen by the largest logit: the third is never the one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.router.bias[2] = -1e3
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.a, self.b = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weight, chosen = self.router(x).softmax(1).max(1)
        found = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            own = chosen == index
            if own.any():
                found[own] = expert(x[own]) * weight[own, None]
        return {"a": self.a(found), "b": self.b(found)}


class EarlyExits(nn.Module):
    """A classifier after each of three stages: a stage serves its own exit and all later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x).relu()
            found.append(leave(x))
        return found


class Cascade(nn.Module):
    """A task's prediction is a feature of the next (Dai et al., 2016): the first serves both."""

    def __init__(self, *, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.body = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 3), nn.Linear(WIDTH + 3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).relu()
        first = self.first(x)
        feature = first.detach() if self.stop else first
        return {"first": first, "second": self.second(torch.cat([x, feature], 1))}


class Adapters(nn.Module):
    """A frozen body with an adapter and a head per task (Houlsby et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False)
        self.adapters = nn.ModuleDict(
            {t: nn.ModuleList(mlp(WIDTH, 4, WIDTH) for _ in range(2)) for t in "ab"}
        )
        self.heads = nn.ModuleDict({t: nn.Linear(WIDTH, 2) for t in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for task, adapters in self.adapters.items():
            own = x
            for layer, adapter in zip(self.body, adapters, strict=True):
                own = layer(own).relu()
                own = own + adapter(own)
            found[task] = self.heads[task](own)
        return found


class TaskNorms(nn.Module):
    """The same convolutions for both tasks, each with its own batch normalisation between."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.norms = nn.ModuleDict(
            {t: nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2)) for t in "ab"}
        )
        self.heads = nn.ModuleDict({t: nn.Linear(8, 2) for t in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for task, norms in self.norms.items():
            own = x
            for conv, norm in zip(self.convs, norms, strict=True):
                own = norm(conv(own)).relu()
            found[task] = self.heads[task](own.mean((2, 3)))
        return found


class FiLM(nn.Module):
    """One head for all tasks; an embedding of the task scales and shifts the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.tasks, self.film = nn.Embedding(2, 4), nn.Linear(4, 2 * WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scales, shifts = self.film(self.tasks.weight).chunk(2, 1)
        x = self.body(x)
        return tuple(
            self.head((x * scale + shift).relu())
            for scale, shift in zip(scales, shifts, strict=True)
        )


def entry(
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    expected: dict[str, Any],
    name: str = "",
    **rest: Any,
) -> Entry:
    return Entry(name or make.__name__, "hand-written", make, inputs, expected, **rest)


def body_and(*tasks: str, **parts: Any) -> dict[str, Any]:
    return {"shared": ("body",), **{task: (task,) for task in tasks}, **parts}


ENTRIES = (
    entry(
        MMoE, rows,
        {"shared": ("experts",), "0": ("gates.0", "towers.0"), "1": ("gates.1", "towers.1")},
    ),
    entry(
        partial(MMoE, 3), rows,
        {"shared": ("experts",), **{t: (f"gates.{t}", f"towers.{t}") for t in "012"}},
        "MMoE of three tasks",
    ),
    entry(
        CGC, rows,
        {"shared": ("shared",), **{t: (f"own.{t}", f"gates.{t}", f"towers.{t}") for t in "ab"}},
    ),
    # All that comes before the last stitch serves both; the stitches themselves are no layers.
    entry(
        CrossStitch, rows, {"shared": ("columns",), "a": ("columns.a.2",), "b": ("columns.b.2",)}
    ),
    entry(
        Attending, images,
        {"shared": ("body",), **{t: (f"masks.{t}", f"heads.{t}") for t in ("seg", "depth")}},
    ),
    # What routing never uses is not found; what gets no input is not trained either.
    entry(
        Routed, rows,
        {"shared": ("router", "experts"), "a": ("a",), "b": ("b",), "unused": ("experts.2",)},
    ),
    entry(
        EarlyExits, rows,
        {
            "shared": ("stages.0",), "1+2": ("stages.1",), "2": ("stages.2", "exits.2"),
            "1": ("exits.1",), "0": ("exits.0",),
        },
    ),
    entry(
        partial(Cascade, stop=False), rows,
        {"shared": ("body", "first"), "second": ("second",)}, "Cascade",
    ),
    entry(
        partial(Cascade, stop=True), rows, body_and("first", "second"), "Cascade, detached",
        values=False,
    ),
    entry(
        Adapters, rows,
        {"frozen": ("body",), **{t: (f"adapters.{t}", f"heads.{t}") for t in "ab"}},
    ),
    entry(TaskNorms, images, {"shared": ("convs",), "a": ("heads.a",), "b": ("heads.b",)}),
    entry(FiLM, rows, {"shared": ("body", "head", "film")}),
)  # fmt: skip
