"""Models that are awkward to accelerate, with inputs: what people's code does with layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 8


class Case(NamedTuple):
    """A model and what it is called with.

    Attributes:
        model: Makes it.
        inputs: Positional or keyword arguments.
        others: Inputs of other sizes, for the accelerated model only.
        dense: Layers that cannot skip their zeros, of all.
    """

    model: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    others: tuple[Any, ...] = ()
    dense: int = 0


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module of that forward pass with those children, parameters and attributes."""
    result = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(result, name, part)
    return result


def conv(ins: int = CHANNELS, outs: int = CHANNELS, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **options)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS)


def linear(ins: int = CHANNELS, outs: int = CHANNELS) -> nn.Linear:
    return nn.Linear(ins, outs)


def without_weights(ins: int, outs: int) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return linear(ins, outs)


def images(*shape: int) -> tuple[Tensor]:
    """Images or tokens, the same in every call."""
    shape = shape or (2, CHANNELS, 12, 12)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2)),)


def values_decide(x: Tensor) -> bool:
    """Never; but `torch.fx` cannot know."""
    return bool(x.sum() > 1e9)


# Residuals


class Residual(nn.Module):
    """A network of residual blocks, some of which change the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, bias=False), norm(), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first, self.second, self.third = (
            nn.Sequential(conv(bias=False, stride=s), norm(), nn.ReLU(), conv(bias=False), norm())
            for s in (1, 2, 1)
        )
        self.down = nn.Sequential(conv(kernel=1, bias=False, stride=2), norm())
        self.heads = nn.ModuleDict({"a": linear(outs=4), "b": conv(outs=1, kernel=1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.pool(self.stem(x))
        x = F.relu(self.first(x) + x)
        y = self.second(x)
        y += self.down(x)
        x = y.relu_()
        x = F.relu(x.add(self.third(x)), inplace=True)
        return {"a": self.heads["a"](x.mean((2, 3))), "b": self.heads["b"](x)}


def add_conv_to_input(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x + 0
    same = x
    x += self.c(x)
    return x * 2, same


def add_conv_to_layer(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.d(x)
    same = y
    y += self.c(y)
    return y * 2, same


def add_to_alias(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.d(x)
    z = self.r(y)
    z += x
    return y, z


def write_between(self: Any, x: Tensor) -> Tensor:
    x = x * 1
    h = self.c(x)
    x.relu_()  # which does nothing to the first inputs
    return self.b(h) + x


def write_between_norm_and_relu(self: Any, x: Tensor) -> Tensor:
    x = F.avg_pool2d(x, 1)
    h = self.b(x)
    x.relu_()
    return F.relu(h) + self.c(x)


def write_into(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.c(x)
    y[:, 0] = 1
    y[..., 0] += 3
    return self.d(y), y


def write_into_view(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = self.c(x)
    z = y.transpose(2, 3)
    z.mul_(2)
    return self.d(y), y, z


def clamp_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    y.clamp_(min=0.1)  # not zero, as what lies around the images
    return self.d(y)


def relu_of_what_is_used_again(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    z = self.r(y)
    return self.d(y) + z


def gate(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    return self.d(y * self.g(y.mean((2, 3), keepdim=True)).sigmoid())


def gate_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.c(x)
    y *= self.g(y.mean((2, 3), keepdim=True)).sigmoid()
    return self.d(y)


RESIDUALS = {
    "residual net": Case(Residual, images(2, 3, 32, 32), (images(1, 3, 40, 24),)),
    "of a number": Case(lambda: net(lambda s, x: (s.c(x) + x.size(0)).relu(), c=conv()), images()),
    "of booleans": Case(lambda: net(lambda s, x: s.c(x) + (x > 0), c=conv()), images()),
    "of integers": Case(lambda: net(lambda s, x: s.c(x) + (x > 0).long(), c=conv()), images()),
    "of doubles": Case(lambda: net(lambda s, x: s.c(x) + x.double(), c=conv()), images()),
    "of a parameter": Case(
        lambda: net(lambda s, x: s.c(x) + s.p, c=conv(), p=nn.Parameter(torch.randn(8, 1, 1))),
        images(),
    ),
    "one for each channel": Case(
        lambda: net(lambda s, x: s.c(x) + x.mean((2, 3), keepdim=True), c=conv()), images()
    ),
    "one for each column": Case(
        lambda: net(lambda s, x: s.c(x) + x.mean((0, 1, 2)), c=conv()), images()
    ),
    "larger than the output": Case(
        lambda: net(lambda s, x: s.c(x.mean((2, 3), keepdim=True)) + x, c=conv(kernel=1)), images()
    ),
    "larger than the output later on": Case(
        lambda: net(
            lambda s, x: (s.c(s.p) + x).relu(), c=conv(), p=nn.Parameter(torch.randn(1, 8, 12, 12))
        ),
        images(1, 8, 12, 12),
        (images(3, 8, 12, 12),),
    ),
    "a slice": Case(lambda: net(lambda s, x: s.c(x) + x[:, :1], c=conv()), images()),
    "transposed": Case(lambda: net(lambda s, x: s.c(x) + x.transpose(2, 3), c=conv()), images()),
    "a slice of a map": Case(
        lambda: net(lambda s, x: s.c(x) + s.d(x)[:, :1], c=conv(), d=conv()), images()
    ),
    "maps with other margins": Case(
        lambda: net(
            lambda s, x: s.e(s.c(x) + s.d(x)), c=conv(kernel=1), d=conv(kernel=7), e=conv(kernel=5)
        ),
        images(),
    ),
    "of itself": Case(lambda: net(lambda s, x: (lambda y: y + y)(s.c(x)), c=conv()), images()),
    "in one dimension": Case(
        lambda: net(lambda s, x: (s.c(x) + x).relu(), c=nn.Conv1d(8, 8, 3, padding=1)),
        images(2, 8, 20),
    ),
    "x += conv(x)": Case(lambda: net(add_conv_to_input, c=conv()), images()),
    "y += conv(y)": Case(lambda: net(add_conv_to_layer, c=conv(), d=conv()), images()),
    "added to an alias": Case(lambda: net(add_to_alias, d=conv(), r=nn.ReLU(True)), images()),
    "input written before the norm": Case(
        lambda: net(write_between, c=conv(), b=norm()), (images()[0].abs(),), (images(),)
    ),
    "input written after the norm": Case(
        lambda: net(write_between_norm_and_relu, c=conv(), b=norm()),
        (images()[0].abs(),),
        (images(),),
    ),
}

# Tensors as they lie in memory, and in-place operations

MEMORY = {
    "view": Case(
        lambda: net(lambda s, x: s.c(x).view(len(x), 4, 2, *x.shape[2:]).sum(2), c=conv()), images()
    ),
    "view after a layer": Case(
        lambda: net(lambda s, x: s.d(s.c(x)).view(2, -1), c=conv(), d=conv()), images()
    ),
    "view without a graph": Case(
        lambda: net(lambda s, x: x if values_decide(x) else s.c(x).view(2, -1), c=conv()), images()
    ),
    "view of an elementwise result": Case(
        lambda: net(lambda s, x: (s.c(x).sigmoid() + s.c(x)).view(-1), c=conv()), images()
    ),
    "view of a sum": Case(lambda: net(lambda s, x: (s.c(x) * 2 + x).view(-1), c=conv()), images()),
    "view of a mean": Case(
        lambda: net(lambda s, x: s.c(x).mean((2, 3)).view(-1), c=conv()), images()
    ),
    "view of a concatenation": Case(
        lambda: net(lambda s, x: torch.cat([s.c(x), x], 1).view(-1), c=conv()), images()
    ),
    "view as integers": Case(
        lambda: net(lambda s, x: s.c(x).view(torch.int32).view(torch.float32), c=conv()), images()
    ),
    "shuffled channels": Case(
        lambda: net(
            lambda s, x: s.d(
                s.c(x).view(len(x), 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)
            ),
            c=conv(),
            d=conv(),
        ),
        images(),
    ),
    "numpy": Case(
        lambda: net(lambda s, x: torch.from_numpy(s.c(x).numpy().copy()), c=conv()), images()
    ),
    "chunks": Case(
        lambda: net(lambda s, x: [s.d(y) for y in s.c(x).chunk(2, 1)], c=conv(), d=conv(4, 4)),
        images(),
    ),
    "images one by one": Case(
        lambda: net(lambda s, x: [s.d(y) for y in s.c(x).unbind(0)], c=conv(), d=conv()), images()
    ),
    "written into": Case(lambda: net(write_into, c=conv(), d=conv()), images()),
    "written into a view": Case(lambda: net(write_into_view, c=conv(), d=conv()), images()),
    "clamped above zero": Case(lambda: net(clamp_in_place, c=conv(), d=conv()), images()),
    "ReLU in place": Case(
        lambda: net(relu_of_what_is_used_again, c=conv(), d=conv(), r=nn.ReLU(True)), images()
    ),
    "input written": Case(lambda: net(lambda s, x: s.c(x.mul_(2)), c=conv()), images()),
    "ReLU of the input in place": Case(
        lambda: net(lambda s, x: s.c(s.r(x)) + x, c=conv(), r=nn.ReLU(True)), images()
    ),
    "gate": Case(lambda: net(gate, c=conv(), d=conv(), g=conv(kernel=1)), images()),
    "gate in place": Case(
        lambda: net(gate_in_place, c=conv(), d=conv(), g=conv(kernel=1)), images()
    ),
    # Dense layers would give channels last, too: sparse ones do not.
    "channels last": Case(
        lambda: nn.Sequential(conv(), nn.ReLU(), conv()).to(memory_format=torch.channels_last),
        (images()[0].to(memory_format=torch.channels_last),),
    ),
    "expanded input": Case(
        lambda: nn.Sequential(conv(), conv()),
        (images(1, 8, 12, 12)[0].expand(3, -1, -1, -1),),
        (images(),),
    ),
    "sliced input": Case(
        lambda: nn.Sequential(conv(3), nn.ReLU(), conv()),
        (images()[0][:, 2:5, ::2, ::3],),
        ((images()[0][:, 1:4].flip(3),), (images()[0][:, 1:4].transpose(2, 3),)),
    ),
    "no batch": Case(lambda: nn.Sequential(conv(), nn.MaxPool2d(2), conv()), images(8, 9, 9)),
    "no images later on": Case(
        lambda: nn.Sequential(conv(), nn.ReLU(), conv()), images(), (images(0, 8, 12, 12),)
    ),
}

# Layers and what is between them


class InTwoNorms(nn.Module):
    """One convolution in two blocks that are traced each by itself, and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        shared = conv()
        block = lambda: net(lambda s, x: F.relu(s.b(s.c(x))), c=shared, b=norm())  # noqa: E731
        self.a, self.b, self.c = block(), block(), shared

    def forward(self, x: Tensor) -> Tensor:
        return x if values_decide(x) else self.a(x) + self.b(x) + self.c(x)


def two_names() -> nn.Module:
    shared = conv()
    return net(lambda s, x: s.b(s.c(x)) + s.d(x), c=shared, d=shared, b=norm())


def batch_norm(self: Any, x: Tensor) -> Tensor:
    b = self.b
    return F.batch_norm(
        self.c(x), b.running_mean, b.running_var, b.weight, b.bias, False, 0.1, 0.01
    )


def pool_and_unpool(self: Any, x: Tensor) -> Tensor:
    return self.u(*self.p(self.c(x)))


LAYERS = {
    "a convolution alone": Case(conv, images(), (images(1, 8, 5, 7),)),
    "a linear layer alone": Case(linear, images(3, 8), (images(7, 8), images(2, 3, 8), images(8))),
    "without inputs": Case(lambda: nn.Sequential(without_weights(0, 4)), images(3, 0)),
    "without outputs": Case(lambda: nn.Sequential(without_weights(4, 0)), images(3, 4)),
    "groups": Case(
        lambda: nn.Sequential(conv(groups=4), nn.ReLU6(), conv(groups=8), norm(), nn.Hardswish()),
        images(),
    ),
    "shapes of windows": Case(
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=5, dilation=5),
            nn.Conv2d(8, 8, 1, padding=3),
            nn.Conv2d(8, 8, (1, 7), padding=(0, 3)),
            nn.Conv2d(8, 8, (7, 1), padding=(3, 0)),
            nn.Conv2d(8, 8, 1, stride=3),
            nn.Conv2d(8, 8, 2, padding=4, stride=(3, 5)),
        ),
        images(),
    ),
    "modes of padding": Case(
        lambda: nn.Sequential(
            conv(padding_mode="reflect"),
            conv(padding_mode="circular"),
            conv(padding_mode="replicate"),
            nn.Conv2d(8, 8, 4, padding="same"),
        ),
        images(),
        (images(1, 8, 9, 31),),
    ),
    "one dimension": Case(
        lambda: nn.Sequential(
            nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, 2)
        ),
        images(2, 8, 20),
        (images(3, 8, 33),),
    ),
    "transposed": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2), norm(), nn.ReLU(), conv()
        ),
        images(),
        (images(1, 8, 5, 9),),
    ),
    "output_size": Case(
        lambda: net(
            lambda s, x: s.t(x, output_size=[24, 24]) + s.t(x, [24, 24]),
            t=nn.ConvTranspose2d(8, 4, 3, 2, 1),
        ),
        images(),
    ),
    "input by name": Case(lambda: net(lambda s, x: s.c(input=x), c=conv()), images()),
    "batch norm as a function": Case(lambda: net(batch_norm, c=conv(), b=norm()), images()),
    "batch norm of the batch": Case(
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()),
        images(),
    ),
    "batch norm of the batch as a function": Case(
        lambda: net(lambda s, x: F.batch_norm(s.c(x), None, None, training=True), c=conv()),
        images(),
    ),
    "batch norm without weights": Case(
        lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        images(),
    ),
    "batch norm of a sum": Case(
        lambda: net(lambda s, x: s.d(F.relu(s.b(s.c(x) + x))) + x, c=conv(), d=conv(), b=norm()),
        images(),
    ),
    "batch norm of a sum in one dimension": Case(
        lambda: net(
            lambda s, x: s.d(F.relu(s.b(s.c(x) + x))) + x,
            c=nn.Conv1d(8, 8, 3, padding=1),
            d=nn.Conv1d(8, 8, 1),
            b=nn.BatchNorm1d(8),
        ),
        images(2, 8, 11),
    ),
    "batch norm of a linear layer": Case(
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(8), nn.ReLU(), linear()), images(5, 8)
    ),
    "other norms": Case(
        lambda: nn.Sequential(conv(), nn.GroupNorm(2, 8), conv(), nn.InstanceNorm2d(8), conv()),
        images(),
    ),
    "activations": Case(
        lambda: nn.Sequential(
            *(
                part
                for a in (
                    nn.ELU(),
                    nn.LeakyReLU(inplace=True),
                    nn.Mish(),
                    nn.Tanh(),
                    nn.GELU("tanh"),
                    nn.SiLU(True),
                    nn.PReLU(),
                    nn.Hardtanh(0.5, 1.0),
                    nn.Sigmoid(),
                    nn.Softplus(),
                )
                for part in (conv(), a)
            )
        ),
        images(),
    ),
    "an activation that does not keep zeros": Case(
        lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 1, 1), nn.Hardtanh(0.5, 1.0), conv()),
        images(),
    ),
    "activations as functions": Case(
        lambda: net(
            lambda s, x: F.gelu(
                s.d(F.silu(s.c(F.hardswish(s.b(F.relu6(s.a(x))))))), approximate="tanh"
            ),
            a=conv(),
            b=conv(),
            c=conv(),
            d=conv(),
        ),
        images(),
    ),
    "activations with arguments": Case(
        lambda: net(
            lambda s, x: F.hardtanh(s.d(F.leaky_relu(s.c(x), 0.2)), -0.5, 0.3), c=conv(), d=conv()
        ),
        images(),
    ),
    "pools": Case(
        lambda: nn.Sequential(
            conv(),
            nn.MaxPool2d(2),
            conv(),
            nn.MaxPool2d(3, 2, 1),
            conv(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            linear(outs=2),
        ),
        images(2, 8, 21, 21),
    ),
    "indices of a pool": Case(
        lambda: net(
            pool_and_unpool, c=conv(), p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2)
        ),
        images(),
    ),
    "pool as a function": Case(
        lambda: net(lambda s, x: s.d(F.max_pool2d(s.c(x), 3, 2, 1)), c=conv(), d=conv()), images()
    ),
    "concatenations": Case(
        lambda: net(
            lambda s, x: (
                s.e(torch.cat([s.c(x), x, s.d(x)], dim=1))
                + torch.cat([s.c(x), x[:, :0], torch.empty(0)], -3)
            ),
            c=conv(),
            d=conv(),
            e=conv(24),
        ),
        images(),
    ),
    "concatenation with booleans": Case(
        lambda: net(lambda s, x: torch.cat([s.c(x), x > 0], 1), c=conv()), images()
    ),
    "means": Case(
        lambda: net(
            lambda s, x: [
                s.l(s.c(x).mean((2, 3))),
                s.c(x).mean([-2, -1], True),
                s.c(x).mean([2, 3], dtype=torch.float64),
                s.c(x)[None].mean([2, 3]),
                s.c(x).mean(1),
            ],
            c=conv(),
            l=linear(),
        ),
        images(),
    ),
    "upsampling": Case(
        lambda: nn.Sequential(
            conv(), nn.Upsample(scale_factor=2), conv(), nn.PixelShuffle(2), conv(2)
        ),
        images(),
        (images(1, 8, 7, 5),),
    ),
    "interpolation": Case(
        lambda: net(
            lambda s, x: [
                s.d(F.interpolate(s.c(x), scale_factor=2)),
                s.d(F.interpolate(input=s.c(x), size=(24, 24))),
                s.d(F.interpolate(s.c(x), x.shape[2:])),
                s.d(F.interpolate(s.c(x), scale_factor=(2, 3.0), mode="nearest-exact")),
                s.d(F.interpolate(s.c(x), scale_factor=2, mode="bilinear")),
                F.interpolate(s.c(x), scale_factor=2).view(-1),
            ],
            c=conv(),
            d=conv(),
        ),
        images(),
        (images(1, 8, 12, 12), images(1, 8, 7, 9)),
    ),
    "upsampling modules": Case(
        lambda: nn.Sequential(
            conv(),
            nn.Upsample(scale_factor=2),
            conv(),
            nn.Upsample(size=(5, 5)),
            conv(),
            nn.UpsamplingNearest2d(scale_factor=2),
            conv(),
        ),
        images(),
    ),
    "transposed by two": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.ReLU(),
            conv(4, 4),
            nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1),
            conv(4, 4, 5),
            nn.ConvTranspose2d(4, 4, 3, 2),
        ),
        images(),
        (images(1, 8, 3, 5), images(8, 3, 5)),
    ),
    "view after a transposed convolution": Case(
        lambda: net(lambda s, x: s.t(x).view(-1), t=nn.ConvTranspose2d(8, 4, 2, 2)), images()
    ),
    "a pool of the input": Case(
        lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), conv()),
        images(),
        (
            images(0, 8, 12, 12),
            images(8, 12, 12),
            (images()[0].to(memory_format=torch.channels_last),),
        ),
    ),
    "linear on images": Case(
        lambda: net(
            lambda s, x: s.l(s.c(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x,
            c=conv(),
            l=linear(),
        ),
        images(),
    ),
    "linear on columns": Case(
        lambda: net(
            lambda s, x: s.c(s.l(s.k(s.c(x)))), l=linear(12, 12), k=linear(12, 12), c=conv()
        ),
        images(),
    ),
    "linear layers one after the other": Case(
        lambda: net(
            lambda s, x: s.l(s.k(s.j(x)).relu_()).view(2, 5, 2, 4),
            j=linear(),
            k=linear(),
            l=linear(),
        ),
        images(2, 5, 8),
    ),
    "a linear layer before a linear one and a convolution": Case(
        lambda: net(
            lambda s, x: (s.d(s.l(x)), s.k(s.l(x + 1))),
            l=linear(),
            k=linear(),
            d=nn.Conv1d(5, 5, 1),
        ),
        images(2, 5, 8),
    ),
    "called twice": Case(lambda: net(lambda s, x: s.b(s.c(s.c(x))), c=conv(), b=norm()), images()),
    "two names": Case(two_names, images()),
    "in blocks of their own": Case(InTwoNorms, images()),
    "LSTM": Case(
        lambda: net(lambda s, x: s.l(s.r(x)[0]), r=nn.LSTM(8, 6, batch_first=True), l=linear(6)),
        images(2, 5, 8),
    ),
}

# Code that looks at its layers, and layers that do more than their class says


def hooked(before: bool, part: int) -> nn.Module:
    model = nn.Sequential(
        conv(), norm(), nn.ReLU(), nn.Sequential(conv(), nn.ReLU()), nn.MaxPool2d(2)
    )
    if before:
        model[part].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    else:
        model[part].register_forward_hook(lambda _, args, out: out * 2 + 1)
    return model


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Squared(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.square(), bias)


class StillSquared(Squared):
    pass


class Thrice(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 3


def forward_of_its_own() -> nn.Module:
    model = nn.Sequential(conv(), nn.ReLU())
    weight = model[0].weight
    model[0].forward = lambda x: F.conv2d(x, weight) * 2
    return model


CODE = {
    "attention": Case(
        lambda: net(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
        images(2, 5, 8),
        (images(3, 4, 8),),
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        images(2, 5, 8),
    ),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), images(2, 5, 8) * 2
    ),
    "reads a weight": Case(
        lambda: net(lambda s, x: F.conv2d(x, s.c.weight, padding=1) + s.c(x), c=conv()), images()
    ),
    "reads a dtype": Case(
        lambda: net(lambda s, x: s.c(x.to(s.c.weight.dtype)), c=conv()), images()
    ),
    "reads a size": Case(
        lambda: net(lambda s, x: x if values_decide(x) else s.c(x)[:, : s.c.groups], c=conv()),
        images(),
    ),
    "tied weights": Case(
        lambda: net(lambda s, x: F.linear(s.e(x), s.e.weight.t()), e=linear(outs=4)), images(3, 8)
    ),
    "asks for the class": Case(
        lambda: net(
            lambda s, x: s.c(x) if isinstance(s.c, nn.Conv2d) and not values_decide(x) else x,
            c=conv(),
        ),
        images(),
        dense=1,
    ),
    **{
        f"hook {'before' if before else 'after'} {what}": Case(
            lambda before=before, part=part: hooked(before, part), images(), dense=int(part == 0)
        )
        for before in (False, True)
        for part, what in enumerate(("a layer", "a norm", "a ReLU", "a block", "a pool"))
    },
    "forward of a class": Case(lambda: nn.Sequential(Doubled(8, 8, 3), conv()), images(), dense=1),
    "_conv_forward": Case(
        lambda: nn.Sequential(Squared(8, 8, 3), StillSquared(8, 8, 3), conv()), images(), dense=2
    ),
    "__call__": Case(lambda: nn.Sequential(Thrice(8, 8, 3), nn.ReLU()), images(), dense=1),
    "forward of an instance": Case(forward_of_its_own, images(), dense=1),
}

# Control flow, arguments and outputs


@dataclass
class Record:
    a: Tensor
    b: list[Tensor]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Plain:
    def __init__(self, a: Tensor) -> None:
        self.a = a


class Inner(nn.Module):
    """Without a graph: layers called one by one, with views and in-place operations between."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        if values_decide(x):
            return x
        y = self.c(x).view(len(x), -1).view(x.shape)
        y = self.d(F.relu_(y))
        y.add_(x)
        return y


class Outer(nn.Module):
    """A graph that calls a module without one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.z = conv(), Inner(), linear(outs=3)
        self.block = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), Inner())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.a(x))
        y = self.block(y) + y
        return self.z(y.flatten(2).transpose(1, 2))


class Outermost(nn.Module):
    """Without a graph, in lists and dicts of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ModuleList(conv() for _ in range(3))
        self.outer, self.heads = Outer(), nn.ModuleDict({"a": linear(3, 2), "b": linear(3, 1)})

    def forward(self, x: Tensor, flag: bool | None = None) -> dict[str, Tensor]:
        if flag is not None or values_decide(x):
            raise AssertionError
        for layer in self.many:
            x = x + layer(x)
        return {name: head(self.outer(x)) for name, head in self.heads.items()}


def two_ways(self: Any, x: Tensor) -> Tensor:
    return self.c(x) if x.sum() > 0 else self.d(x)


FORMS = {
    "values decide": Case(
        lambda: net(two_ways, c=nn.Sequential(conv(), nn.ReLU()), d=conv()),
        (images()[0].abs(),),
        ((-images()[0].abs(),),),
    ),
    "sizes decide": Case(
        lambda: net(lambda s, x: s.c(x) if x.shape[-1] > 10 else s.d(x), c=conv(), d=conv()),
        images(),
        (images(2, 8, 9, 9),),
    ),
    "the batch decides": Case(
        lambda: net(lambda s, x: [s.c(y[None]) for y in x], c=conv()),
        images(),
        (images(3, 8, 5, 5),),
    ),
    "training decides": Case(
        lambda: net(lambda s, x: s.c(x) if s.training else s.d(x), c=conv(), d=conv()),
        images(),
        dense=1,
    ),
    "without a graph inside one": Case(Outer, images(), (images(1, 8, 5, 7),)),
    "without a graph outside of one": Case(Outermost, images(), (images(1, 8, 5, 7),)),
    "checkpoint": Case(
        lambda: net(
            lambda s, x: checkpoint(s.c, x, use_reentrant=False), c=nn.Sequential(conv(), conv())
        ),
        images(),
    ),
    "dropout": Case(
        lambda: net(
            lambda s, x: F.dropout(s.d(s.e(s.c(x))), 0.5, s.training),
            c=conv(),
            d=nn.Dropout2d(),
            e=nn.Identity(),
        ),
        images(),
    ),
    "several inputs": Case(
        lambda: net(lambda s, x, y: s.c(x) + s.d(y), c=conv(), d=conv()), images() * 2
    ),
    "any number of inputs": Case(
        lambda: net(lambda s, *xs: s.c(torch.cat(xs, 1)), c=conv(16)), images() * 2
    ),
    "inputs by name": Case(
        lambda: net(lambda s, x, y=None, flag=True: s.c(x) + (y if flag else 0), c=conv()),
        {"x": images()[0], "y": images()[0] * 2},
    ),
    "inputs by any name": Case(
        lambda: net(lambda s, **kw: s.c(kw["a"] + kw["b"]), c=conv()),
        {"a": images()[0], "b": images()[0] * 2},
    ),
    "nested outputs": Case(
        lambda: net(lambda s, x: {"a": s.c(x), "b": [s.c(x).relu(), (x, None, 3)]}, c=conv()),
        images(),
    ),
    "ordered dict": Case(lambda: net(lambda s, x: OrderedDict(a=s.c(x)), c=conv()), images()),
    "named tuple": Case(lambda: net(lambda s, x: Pair(s.c(x), x), c=conv()), images()),
    "dataclass": Case(lambda: net(lambda s, x: Record(s.c(x), [s.c(x) + 1]), c=conv()), images()),
    "dataclass without a graph": Case(
        lambda: net(lambda s, x: x if values_decide(x) else Record(s.c(x), []), c=conv()), images()
    ),
    "any class": Case(
        lambda: net(lambda s, x: x if values_decide(x) else Plain(s.c(x)), c=conv()), images()
    ),
    "outputs that share memory": Case(
        lambda: net(lambda s, x: (lambda y: (y, y, y[:, 0]))(s.c(x)), c=conv()), images()
    ),
}

CASES: dict[str, Case] = {
    f"{group}: {name}": case
    for group, cases in (
        ("residual", RESIDUALS),
        ("memory", MEMORY),
        ("layers", LAYERS),
        ("code", CODE),
        ("form", FORMS),
    )
    for name, case in cases.items()
}
