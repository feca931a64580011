"""Rays against rooms: what is hit, where, and which way the surface faces.

Vectors are triples of tensors `(B, N)` (or `(B, 1)`), and only operations that IEEE rounds
exactly are used, one to a kernel: a ray's result does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_adapmtl.datasets._scenes import BOXES, SPHERES, RoomScenes

__all__ = [
    "Hits",
    "Vector",
    "blocked",
    "dot",
    "nearest",
    "pixel_rays",
    "surfaces",
    "to_camera",
    "triple",
]

Vector = tuple[Tensor, Tensor, Tensor]
_TINY = 1e-9


@dataclass(frozen=True)
class Hits:
    """What rays hit, each `(B, N)`.

    Attributes:
        segmentation: 0 floor, 1 ceiling, 2 wall, 3 box, 4 sphere.
        face: A number that is equal for two rays if they hit the same smooth surface.
        surface: Index of the texture: 0 floor, 1 ceiling, 2 walls, 3 and up the objects.
        normal: Unit normal in the world frame, against the ray.
        point: Where, in the world frame.
        local: Where, in the frame of what is hit.
    """

    segmentation: Tensor
    face: Tensor
    surface: Tensor
    normal: Vector
    point: Vector
    local: Vector


def dot(a: Vector, b: Vector) -> Tensor:
    """The inner product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def triple(values: Tensor) -> Vector:
    """Split `(B, 3)` into a vector of three `(B, 1)`."""
    x, y, z = values.unsqueeze(1).unbind(2)
    return x, y, z


def pixel_rays(scenes: RoomScenes, height: int, width: int) -> tuple[Vector, Vector]:
    """Origin `(B, 1)` and direction `(B, height * width)` of the rays through pixel centres.

    Directions reach depth 1 in the camera frame, so distances along them are z-depths.
    """
    v, u = torch.meshgrid(
        torch.arange(height, device=scenes.keys.device) + 0.5,
        torch.arange(width, device=scenes.keys.device) + 0.5,
        indexing="ij",
    )
    focal = scenes.focal(height, width)[:, None]
    x, y = (u.reshape(1, -1) - width / 2) / focal, (v.reshape(1, -1) - height / 2) / focal
    right, down, forward = (triple(axis) for axis in scenes.rotation.unbind(1))
    ray = (
        x * right[0] + y * down[0] + forward[0],
        x * right[1] + y * down[1] + forward[1],
        x * right[2] + y * down[2] + forward[2],
    )
    return triple(scenes.camera), ray


def to_camera(scenes: RoomScenes, vector: Vector) -> Vector:
    """Turn a vector from the world's axes to the camera's."""
    right, down, forward = (triple(axis) for axis in scenes.rotation.unbind(1))
    return dot(right, vector), dot(down, vector), dot(forward, vector)


def nearest(scenes: RoomScenes, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """The first hit of rays that start inside the rooms.

    Returns:
        How far along the ray, in lengths of `direction`, and what: 0 the room, 1 and up the
        objects. Both `(B, N)`.
    """
    half = triple(scenes.room / 2)
    centre = (torch.zeros_like(half[2]), torch.zeros_like(half[2]), half[2])
    far = [
        h * inverse.abs() - (o - c) * inverse
        for o, inverse, c, h in zip(origin, map(_inverse, direction), centre, half, strict=True)
    ]
    distance = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    what = torch.zeros_like(distance, dtype=torch.int64)
    squared = dot(direction, direction)
    for index in range(BOXES + SPHERES):
        t = _hit(scenes, index, origin, direction, squared)
        closer = t < distance
        distance = torch.where(closer, t, distance)
        what = torch.where(closer, index + 1, what)
    return distance, what


def blocked(scenes: RoomScenes, origin: Vector, direction: Vector) -> Tensor:
    """Whether an object lies between `origin` and `origin + direction`, `(B, N)`."""
    first = torch.full_like(direction[0], torch.inf)
    squared = dot(direction, direction)
    for index in range(BOXES + SPHERES):
        first = torch.minimum(first, _hit(scenes, index, origin, direction, squared))
    return first < 1


def surfaces(
    scenes: RoomScenes, origin: Vector, direction: Vector, distance: Tensor, what: Tensor
) -> Hits:
    """Describe the hits that `nearest` found."""
    is_room = what == 0
    is_sphere = what > BOXES
    zero = torch.zeros_like(scenes.room)
    room_centre = torch.cat([zero[:, :2], scenes.room[:, 2:] / 2], dim=1)
    straight = torch.cat([zero[:, :1] + 1, zero[:, :1]], dim=1)

    def pick(of_room: Tensor, of_objects: Tensor) -> list[Tensor]:
        table = torch.cat([of_room[:, None], of_objects], dim=1)
        return [table[..., k].gather(1, what) for k in range(table.shape[2])]

    cx, cy, cz = pick(room_centre, scenes.centre)
    hx, hy, hz = pick(scenes.room / 2, scenes.half)
    yaw = pick(straight, scenes.yaw)
    start = _turn(yaw, (origin[0] - cx, origin[1] - cy, origin[2] - cz))
    ray = _turn(yaw, direction)

    # The slab that a ray enters last (of a box) or leaves first (of the room) is the face.
    order = []
    for o, inverse, h in zip(start, map(_inverse, ray), (hx, hy, hz), strict=True):
        middle, reach = -o * inverse, h * inverse.abs()
        order.append(torch.where(is_room, -middle - reach, middle - reach))
    on_x = (order[0] >= order[1]) & (order[0] >= order[2])
    on_y = ~on_x & (order[1] >= order[2])
    on_z = ~on_x & ~on_y

    local = (
        start[0] + distance * ray[0],
        start[1] + distance * ray[1],
        start[2] + distance * ray[2],
    )
    flat = [
        torch.where(d > 0, -1.0, 1.0) * on for on, d in zip((on_x, on_y, on_z), ray, strict=True)
    ]
    length = dot(local, local).sqrt().clamp(min=_TINY)
    facing = [torch.where(is_sphere, p / length, n) for p, n in zip(local, flat, strict=True)]
    cos, sin = yaw
    normal = (cos * facing[0] - sin * facing[1], sin * facing[0] + cos * facing[1], facing[2])

    axis = on_y.long() + 2 * on_z.long()
    side = (flat[0] + flat[1] + flat[2] > 0).long()
    face = what * 8 + torch.where(is_sphere, 0, axis * 2 + side)
    part = torch.where(on_z, torch.where(side == 1, 0, 1), 2)  # of the room
    kind = torch.where(is_sphere, 4, 3)
    point = (
        origin[0] + distance * direction[0],
        origin[1] + distance * direction[1],
        origin[2] + distance * direction[2],
    )
    return Hits(
        segmentation=torch.where(is_room, part, kind),
        face=face,
        surface=torch.where(is_room, part, what + 2),
        normal=normal,
        point=point,
        local=local,
    )


def _hit(
    scenes: RoomScenes, index: int, origin: Vector, direction: Vector, squared: Tensor
) -> Tensor:
    """Where rays enter an object (infinite if they miss it or start behind its near side)."""
    centre, half = triple(scenes.centre[:, index]), triple(scenes.half[:, index])
    start = (origin[0] - centre[0], origin[1] - centre[1], origin[2] - centre[2])
    if index >= BOXES:
        return _hit_sphere(start, direction, squared, half[0])
    yaw = scenes.yaw[:, index].unsqueeze(1).unbind(2)
    return _hit_box(_turn(yaw, start), _turn(yaw, direction), half)


def _hit_box(start: Vector, ray: Vector, half: Vector) -> Tensor:
    near, far = [], []
    for o, inverse, h in zip(start, map(_inverse, ray), half, strict=True):
        middle, reach = -o * inverse, h * inverse.abs()
        near.append(middle - reach)
        far.append(middle + reach)
    enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    return torch.where(torch.minimum(leave - enter, enter) > 0, enter, torch.inf)


def _hit_sphere(start: Vector, ray: Vector, squared: Tensor, radius: Tensor) -> Tensor:
    # By the point of the ray that is closest to the centre: the textbook's discriminant
    # loses half the digits at the silhouette.
    middle = -dot(start, ray) / squared
    closest = (
        start[0] + middle * ray[0],
        start[1] + middle * ray[1],
        start[2] + middle * ray[2],
    )
    inside = radius * radius - dot(closest, closest)
    t = middle - (inside.clamp(min=0) / squared).sqrt()
    return torch.where(torch.minimum(inside, t) > 0, t, torch.inf)


def _turn(yaw: Sequence[Tensor], vector: Vector) -> Vector:
    """From the world's axes to those of an object."""
    cos, sin = yaw
    return cos * vector[0] + sin * vector[1], cos * vector[1] - sin * vector[0], vector[2]


def _inverse(d: Tensor) -> Tensor:
    # The shift is far below rounding, but for a ray along a face: infinities would meet there.
    return 1 / (d + _TINY)
