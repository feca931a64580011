"""Problems on sprites: rendered images of one shape each, and what can be said about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from torch_adapmtl.models import (
    ClassificationHead,
    MultiTaskModel,
    RegressionHead,
    feature_channels,
)
from torch_adapmtl.tasks import Classification, Map, Regression, Segmentation, Task

__all__ = ["VGG", "UNet", "render", "sprites_problems"]

_SIDE = 24
_SHAPES = 4
_HUES = 6
_STRIPES = 4

#: What each task on a whole image predicts: so many classes, or so many numbers.
_CLASSES: Mapping[str, int] = {"shape": _SHAPES, "hue": _HUES, "stripes": _STRIPES}
_NUMBERS: Mapping[str, int] = {"place": 2, "size": 1, "light": 1}


@cache
def render(count: int, seed: int) -> Mapping[str, Tensor]:
    """Render sprites, and return images and targets.

    A sprite is a disc, a triangle, a ring or a cross in one of six hues, turned by any angle,
    before stripes of one of four widths; the image is darkened and noisy.

    Args:
        count: How many.
        seed: Of what they show.

    Returns:
        `"image"`, (N, 3, 24, 24), and the targets. Classes (N,): `"shape"`, `"hue"`, `"stripes"`.
        Standardised numbers: `"place"` (N, 2), `"size"` and `"light"` (N, 1). Maps: `"parts"`,
        (N, 24, 24), 0 for the background or the shape plus one; `"clean"`, (N, 3, 24, 24), the
        image without noise, and `"distance"`, (N, 1, 24, 24), the distance to the outline.

    Example:
        >>> render(2, seed=0)["image"].shape
        torch.Size([2, 3, 24, 24])
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def classes(number: int) -> Tensor:
        return torch.randint(number, (count,), generator=generator)

    shape, hue, stripes = classes(_SHAPES), classes(_HUES), classes(_STRIPES)
    place, size, light = uniform(-0.35, 0.35, 2), uniform(0.4, 0.75, 1), uniform(0.4, 1.0, 1)

    axis = torch.linspace(-1, 1, _SIDE)
    y, x = (grid.expand(count, -1, -1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    inside = _distance(x - place[:, :1, None], y - place[:, 1:, None], size[..., None], shape,
                       uniform(0, 2 * math.pi, 1, 1))  # fmt: skip
    angle, phase = uniform(0, math.pi, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    across = (x * angle.cos() + y * angle.sin()) * (4.0 + 4.0 * stripes[:, None, None]) + phase
    ground = 0.35 + 0.2 * across.sin()[:, None] + uniform(-0.15, 0.15, 3, 1, 1)
    colour = _colour((hue + uniform(-0.25, 0.25)) / _HUES)[..., None, None]
    cover = (inside[:, None] * _SIDE).sigmoid()
    clean = (cover * colour + (1 - cover) * ground) * light[..., None, None]
    noise = 0.06 * torch.randn(clean.shape, generator=generator)
    return {
        "image": (clean + noise - 0.3) / 0.25,
        "shape": shape,
        "hue": hue,
        "stripes": stripes,
        "place": place / 0.202,
        "size": (size - 0.575) / 0.101,
        "light": (light - 0.7) / 0.173,
        "parts": torch.where(inside > 0, shape[:, None, None] + 1, 0),
        "clean": (clean - 0.3) / 0.25,
        "distance": (inside[:, None] + 0.5) / 0.4,
    }


def _distance(x: Tensor, y: Tensor, size: Tensor, shape: Tensor, angle: Tensor) -> Tensor:
    """How far each pixel is inside the outline of its shape, (N, H, W); negative outside."""
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    radius, turn = (u**2 + v**2).sqrt(), torch.atan2(v, u)
    arms = torch.minimum(
        0.3 * size - torch.minimum(u.abs(), v.abs()), size - torch.maximum(u.abs(), v.abs())
    )
    third = 2 * math.pi / 3
    edge = radius * ((turn + math.pi) % third - third / 2).cos()
    ring = 0.25 * size - (radius - 0.75 * size).abs()
    inside = torch.stack([size - radius, 0.6 * size - edge, ring, arms])
    return inside[shape, torch.arange(len(shape))]


def _colour(hue: Tensor) -> Tensor:
    """The colour of a hue in [0, 1), (N, 3)."""
    thirds = torch.tensor([0.0, 1.0, 2.0]) / 3
    return 0.5 + 0.5 * (2 * math.pi * (hue[:, None] - thirds)).cos()


def _load(tasks: tuple[str, ...]) -> Callable[[], tuple[Samples, Samples]]:
    def load() -> tuple[Samples, Samples]:
        both = (render(8000, seed=0), render(2000, seed=1))
        train, test = (Samples(s["image"], {task: s[task] for task in tasks}) for s in both)
        return train, test

    return load


def _whole(
    name: str,
    make_encoder: Callable[[], nn.Module],
    tasks: tuple[str, ...],
    *,
    steps: int,
    lr: float,
    batch: int = 32,
) -> Problem:
    """Tasks on whole images, with a two-layer head each."""

    def make_model() -> nn.Module:
        encoder = make_encoder()
        width = feature_channels(encoder)
        heads = {
            task: nn.Sequential(
                nn.Linear(width, 96),
                nn.ReLU(),
                ClassificationHead(96, _CLASSES[task])
                if task in _CLASSES
                else RegressionHead(96, _NUMBERS[task]),
            )
            for task in tasks
        }
        return MultiTaskModel(encoder, heads)

    def make_tasks() -> dict[str, Task]:
        return {t: Classification(_CLASSES[t]) if t in _CLASSES else Regression() for t in tasks}

    return Problem(name, _load(tasks), make_model, make_tasks, steps=steps, batch=batch, lr=lr)


# --- networks -------------------------------------------------------------------------------------


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    encoder: nn.Module = VisionTransformer(
        img_size=_SIDE, patch_size=6, embed_dim=72, depth=4, num_heads=4, num_classes=0
    )
    return encoder


def _regnet() -> nn.Module:
    """Grouped convolutions with squeeze-and-excitation, in four narrow stages."""
    from timm.models.regnet import RegNet, RegNetCfg

    config = RegNetCfg(depth=6, w0=24, wa=24.0, wm=2.0, group_size=8, se_ratio=0.25, stem_width=16)
    encoder: nn.Module = RegNet(config, num_classes=0, zero_init_last=False)
    return encoder


class VGG(nn.Sequential):
    """A plain stack of 3x3 convolutions, two to each width, without norms; halves the map in each.

    Args:
        widths: Channels.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 192)) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            for channels in (before, width):
                convolution = nn.Conv2d(channels, width, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                layers += [convolution, nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = before


class UNet(nn.Module):
    """A small U-Net: encoder and decoder with skip connections, and a convolution for each task.

    Args:
        outputs: Channels of each task.
        widths: Channels at each scale.
    """

    def __init__(
        self, outputs: Mapping[str, int], widths: tuple[int, ...] = (12, 24, 48, 96)
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _two_convolutions(before, width)
            for before, width in zip((3, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _two_convolutions(deep + width, width)
            for deep, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Conv2d(widths[0], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, channels, 1)
                )
                for task, channels in outputs.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Take images `(B, 3, h, w)`; return maps of their size by task."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1))
        return {task: head(x) for task, head in self.heads.items()}


def _two_convolutions(before: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _unet() -> Problem:
    outputs = {"parts": _SHAPES + 1, "clean": 3, "distance": 1}
    return Problem(
        "sprites unet",
        _load(tuple(outputs)),
        lambda: UNet(outputs),
        lambda: {"parts": Segmentation(_SHAPES + 1), "clean": Map(), "distance": Map()},
        steps=300,
        batch=16,
    )


def sprites_problems() -> tuple[Problem, ...]:
    """U-Net, vision transformer, RegNet, and VGG from a pretrained dense net."""
    vgg = _whole(
        "sprites vgg",
        VGG,
        ("shape", "hue", "place", "stripes", "size"),
        steps=300,
        lr=1e-3,
        batch=24,
    )
    return (
        _unet(),
        _whole("sprites vit", _vit, (*_CLASSES, *_NUMBERS), steps=500, lr=1e-3),
        _whole("sprites regnet", _regnet, ("shape", "place"), steps=400, lr=2e-3),
        replace(vgg, pretraining=600),
    )
