"""The image of a room: textures, one point light, shadows and pixel noise."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_adapmtl.datasets._random import bell_triples, mix, rough_uniform
from torch_adapmtl.datasets._raycast import Hits, as_vector, blocked, dot
from torch_adapmtl.datasets._scenes import RoomScenes

__all__ = ["shade"]

_AMBIENT = 0.4
_DIFFUSE = 1.2
_FALLOFF = 0.06  # per square metre
_GRAIN = 0.12  # share of noise in every texture
_LIFT = 2e-3  # metres between a surface and the start of a shadow ray
_PRIMES = (73856093, 19349663, 83492791)


def shade(scenes: RoomScenes, hits: Hits, *, shadows: bool, noise: float) -> Tensor:
    """The colours that `N` rays see: RGB in [0, 1], `(3, B, N)`."""
    colour = _texture(scenes, hits)
    light = as_vector(scenes.light)
    to_light = (
        light[0] - hits.point[0],
        light[1] - hits.point[1],
        light[2] - hits.point[2],
    )
    squared = dot(to_light, to_light)
    diffuse = (dot(hits.normal, to_light) / squared.sqrt().clamp(min=1e-6)).clamp(min=0)
    diffuse = diffuse / (1 + _FALLOFF * squared)
    if shadows:
        start = (
            hits.point[0] + _LIFT * hits.normal[0],
            hits.point[1] + _LIFT * hits.normal[1],
            hits.point[2] + _LIFT * hits.normal[2],
        )
        diffuse = torch.where(blocked(scenes, start, to_light), 0.0, diffuse)
    image = colour * (_AMBIENT + _DIFFUSE * diffuse)
    if noise:
        counters = torch.arange(image.shape[2], device=image.device)
        # `mix` makes these keys differ from those of the scene's other random numbers.
        image = image + noise * bell_triples(mix(scenes.keys + 1)[:, None] + counters)
    return image.clamp(0, 1)


def _texture(scenes: RoomScenes, hits: Hits) -> Tensor:
    """The colour of the surface at each hit, `(3, B, N)`."""
    surface = hits.surface
    frequency = scenes.frequency.gather(1, surface)
    x, y, z = (
        p * frequency + scenes.offset[..., k].gather(1, surface) for k, p in enumerate(hits.local)
    )
    cloud = _value_noise(scenes.keys[:, None] + surface, x, y, z)
    pattern = scenes.pattern.gather(1, surface)
    checker = torch.remainder(x.floor() + y.floor() + z.floor(), 2)
    stripes = torch.remainder((2 * (x + y)).floor(), 2)
    amount = torch.where(pattern == 0, checker, torch.where(pattern == 1, stripes, cloud))
    amount = torch.where(pattern == 3, 0.0, amount) * (1 - _GRAIN) + _GRAIN * cloud
    channels = []
    for k in range(3):
        first = scenes.colours[..., 0, k].gather(1, surface)
        second = scenes.colours[..., 1, k].gather(1, surface)
        channels.append(first + (second - first) * amount)
    return torch.stack(channels)


def _value_noise(keys: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Noise in [0, 1]: random numbers on the half-integer lattice, interpolated smoothly."""
    corners, weights = [], []
    for position, prime in zip((2 * x, 2 * y, 2 * z), _PRIMES, strict=True):
        floor = position.floor()
        part = position - floor
        corners.append(floor.to(torch.int64) * prime)
        weights.append(part * part * (3 - 2 * part))

    base = keys + corners[0] + corners[1] + corners[2]
    wx, wy, wz = weights

    def row(dy: int, dz: int) -> Tensor:
        shift = dy * _PRIMES[1] + dz * _PRIMES[2]
        first, second = rough_uniform(base + shift), rough_uniform(base + (shift + _PRIMES[0]))
        return first + (second - first) * wx

    def layer(dz: int) -> Tensor:
        first, second = row(0, dz), row(1, dz)
        return first + (second - first) * wy

    first, second = layer(0), layer(1)
    return first + (second - first) * wz
