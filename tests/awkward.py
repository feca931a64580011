"""A zoo of small multi-task models that are awkward in one way each.

`ZOO` lists them with the component of every tensor that is prunable by default. Each takes one
batch of shape (2, 6) and gives its tasks' outputs in some form; `Case.losses` turns those into one
scalar per task, so that other tests can train them as well.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import prune

WIDTH = 6


def linear(out: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, out)


class Net(nn.Module):
    """A body and the heads `a` and `b`; subclasses change one thing about it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(linear(), nn.Tanh(), linear())
        self.heads = nn.ModuleDict({"a": linear(2), "b": linear(3)})

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return {task: head(features) for task, head in self.heads.items()}


class Branching(nn.Module):
    """Two of three tasks share a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = linear(), linear()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x).relu()
        y = self.branch(x).relu()
        return {"c": self.c(y), "a": self.a(x), "b": self.b(y)}


class NoneShared(nn.Module):
    """Two networks in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class HeadOnHead(Net):
    """One task's head reads the other's output."""

    def __init__(self) -> None:
        super().__init__()
        self.heads["b"] = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.heads["a"](self.body(x))
        return {"a": a, "b": self.heads["b"](a)}


class ZeroInitialised(Net):
    """No value and no gradient depends on the body when training starts."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Tied(Net):
    """Both heads use one weight, which an embedding holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, WIDTH)
        self.heads = nn.ModuleDict({"a": linear(2), "b": linear(2), "c": linear(3)})
        self.heads["a"].weight = self.heads["b"].weight = self.embedding.weight


class Aliased(Net):
    """The same module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.heads["a"]


class FrozenBody(Net):
    """The first layer does not require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0].requires_grad_(False)


class FrozenTask(Net):
    """A whole task that does not require grad: its output has no grad of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads["b"].requires_grad_(False)
        self.body.requires_grad_(False)


class NoGradBody(Net):
    """The body runs under no_grad."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.body(x)


class NoGradDecorated(Net):
    """The body runs in a method decorated with no_grad."""

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.body(x)


class GradSwitchedOff(Net):
    """The body runs under set_grad_enabled(False)."""

    def features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            return self.body(x)


class InferenceBody(Net):
    """The body runs in inference mode."""

    def features(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            features = self.body(x)
        return features.clone()


class DetachedBody(Net):
    """The features are detached."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).detach()


class DataBody(Net):
    """The features are detached in the old way."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).data


class DetachedHead(Net):
    """One head reads detached features, as a probe does; the body is the other's alone."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"a": self.heads["a"](features), "b": self.heads["b"](features.detach())}


class UnusedParts(Net):
    """A stage that nothing uses, and one whose result is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.dropped = linear(), linear()

    def features(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.body(x)


class Auxiliary(Net):
    """An auxiliary head that exists in train mode only, with batch normalisation before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.heads["aux"] = linear(1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.body(x))
        return {t: head(x) for t, head in self.heads.items() if self.training or t != "aux"}


class Checkpointed(Net):
    """The body is recomputed in the backward pass."""

    reentrant = False

    def features(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    """The same the old way, which hides the parameters inside from the graph."""

    reentrant = True


class Caching(Net):
    """Writes to itself in every way while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Any] = {"sizes": []}
        self.calls = 0
        self.plain = torch.zeros(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout()

    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache["last"] = x
        self.cache["sizes"].append(len(x))
        self.later = x.mean(0)
        self.plain += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        with torch.no_grad():
            self.heads["a"].bias.clamp_(-0.1, 0.1)
        self.heads["b"].bias.data[0] = 7.0
        return self.drop(self.norm(self.body(x)))


class DataDependent(Net):
    """Decides by a value which way to go."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x) if x.abs().sum().item() >= 0 else x


class NumPy(Net):
    """Goes through NumPy."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x * float(x.detach().numpy().max()))


class Inplace(Net):
    """Normalises its input in place."""

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(3).div_(2)).relu_()


class Pruned(Net):
    """One layer is already pruned by torch."""

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.body[0], "weight", 0.5)


class Parametrized(Net):
    """Spectral normalisation (one original) in the body, weight normalisation (two) in a head."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.body[0])
        nn.utils.parametrizations.weight_norm(self.heads["a"])


class Attention(Net):
    """Attention, of both kinds of input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(WIDTH, 2, kdim=3, vdim=3, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        tokens = x[:, None]
        y = self.joint(tokens, tokens, tokens)[0]
        return self.body(self.apart(y, y[..., :3], y[..., 3:])[0][:, 0])


class Convolutions(nn.Module):
    """Convolutions of all kinds, two tasks at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv1d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)
        self.t1 = nn.ConvTranspose1d(2, 2, 2)
        self.t2, self.t3 = nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.c2(self.norm(self.c1(x[:, None]))[..., None])
        x = self.c3(x[..., None])
        return [self.t1(x.flatten(2)), self.t3(self.t2(x[..., 0])[..., None])]


class OutputIsParameter(Net):
    """One task's output is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.heads["a"](self.body(x)), "noise": self.noise.weight}


class Deep(Net):
    """Deep enough to overflow a recursive walk."""

    def features(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for _ in range(5000):
            x = x + 1
        return x


class Hooked(Net):
    """A forward hook changes what a head gets."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = linear()
        self.heads["a"].register_forward_pre_hook(lambda module, args: (self.extra(args[0]),))


Pair = namedtuple("Pair", ["left", "right"])


class TypedPair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Record:
    left: Any
    right: Any
    note: str = "not a tensor"
    missing: Tensor | None = None


class Returns(Net):
    """Gives its two outputs in the form that `make` makes of them."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.make(self.heads["a"](features), self.heads["b"](features))


@dataclass(frozen=True)
class Case:
    """One model of the zoo: how it is made and which component each prunable tensor is in."""

    name: str
    build: Callable[[], nn.Module]
    expected: dict[str, str]
    tasks: tuple[str, ...] = ("a", "b")
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> Tensor:
        return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))

    def losses(self, output: Any) -> dict[str, Tensor]:
        """One scalar per task from what the model returned (dicts, tuples and lists)."""
        if isinstance(output, dict):
            return {task: output[task].square().mean() for task in self.tasks}
        return {t: o.square().mean() for t, o in zip(self.tasks, output, strict=True)}


NET = {"body.0": "shared", "body.2": "shared", "heads.a": "a", "heads.b": "b"}
FROZEN_BODY = {**NET, "body.0": "frozen", "body.2": "frozen"}


def _cases() -> Iterator[Case]:
    def case(build: Callable[[], nn.Module], expected: dict[str, str], *tasks: str) -> Case:
        tensors = {
            name if "weight" in name else f"{name}.weight": component
            for name, component in expected.items()
        }
        return Case(build.__name__, build, tensors, tasks or ("a", "b"))

    for same in (
        Net, ZeroInitialised, Aliased, Checkpointed, CheckpointedReentrant, Caching,
        DataDependent, NumPy, Inplace, Pruned, Deep,
    ):  # fmt: skip
        yield case(same, NET)
    for cut in (
        NoGradBody, NoGradDecorated, GradSwitchedOff, InferenceBody, DetachedBody, DataBody,
    ):  # fmt: skip
        yield case(cut, FROZEN_BODY)
    branches = {"trunk": "shared", "branch": "c+b", "a": "a", "b": "b", "c": "c"}
    yield case(Branching, branches, "c", "a", "b")
    yield case(NoneShared, {"a": "0", "b": "1"}, "0", "1")
    yield case(HeadOnHead, {**NET, "heads.a": "shared"})
    tied = {"body.0": "shared", "body.2": "shared", "heads.a": "a+b", "heads.c": "c"}
    yield case(Tied, tied, "a", "b", "c")
    yield case(FrozenBody, {**NET, "body.0": "frozen"})
    yield case(FrozenTask, {**FROZEN_BODY, "heads.b": "frozen"})
    yield case(DetachedHead, {**NET, "body.0": "a", "body.2": "a"})
    yield case(UnusedParts, {**NET, "spare": "unused", "dropped": "unused"})
    yield case(Auxiliary, {**NET, "heads.aux": "aux"}, "a", "b", "aux")
    parametrized = {name: part for name, part in NET.items() if name != "heads.a"}
    yield case(Parametrized, parametrized)
    attention = dict.fromkeys(
        [
            "joint.in_proj_weight", "joint.out_proj", "apart.q_proj_weight",
            "apart.k_proj_weight", "apart.v_proj_weight", "apart.out_proj",
        ],
        "shared",
    )  # fmt: skip
    yield case(Attention, {**NET, **attention})
    kinds = {"c1": "shared", "c2": "shared", "c3": "shared", "t1": "0", "t2": "1", "t3": "1"}
    yield case(Convolutions, kinds, "0", "1")
    noise = {"body.0": "a", "body.2": "a", "heads.a": "a", "heads.b": "unused", "noise": "noise"}
    yield case(OutputIsParameter, noise, "a", "noise")
    yield case(Hooked, {**NET, "extra": "a"})


ZOO: tuple[Case, ...] = tuple(_cases())
