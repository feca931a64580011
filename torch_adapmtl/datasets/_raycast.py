"""Ray casting in rooms: which object a ray hits, where, and the surface's normal there.

Vectors are triples of tensors `(B, N)` or `(B, 1)`. Only operations that IEEE 754 rounds exactly
are used, one in each kernel, so that the result of a ray does not depend on its batch.
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
    "as_vector",
    "blocked",
    "describe_hits",
    "dot",
    "first_hits",
    "pixel_rays",
    "to_camera",
]

Vector = tuple[Tensor, Tensor, Tensor]
_TINY = 1e-9


@dataclass(frozen=True)
class Hits:
    """The surface points that rays hit, each field `(B, N)`.

    Attributes:
        segmentation: 0 floor, 1 ceiling, 2 wall, 3 box, 4 sphere.
        face: Number of the smooth surface; equal for two rays that hit the same one.
        surface: Index of the texture: 0 floor, 1 ceiling, 2 walls, 3 and up the objects.
        normal: Unit normal in the world frame, on the side that the ray comes from.
        point: Position in the world frame.
        local: Position in the frame of the object, or of the room.
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


def as_vector(values: Tensor) -> Vector:
    """Split `(B, 3)` into a vector of three tensors `(B, 1)`."""
    x, y, z = values.unsqueeze(1).unbind(2)
    return x, y, z


def pixel_rays(scenes: RoomScenes, height: int, width: int) -> tuple[Vector, Vector]:
    """Origin `(B, 1)` and direction `(B, height * width)` of the rays through the pixel centres.

    Directions have depth 1 in the camera frame, so distances in units of them are z-depths.
    """
    v, u = torch.meshgrid(
        torch.arange(height, device=scenes.keys.device) + 0.5,
        torch.arange(width, device=scenes.keys.device) + 0.5,
        indexing="ij",
    )
    focal = scenes.focal(height, width)[:, None]
    x, y = (u.reshape(1, -1) - width / 2) / focal, (v.reshape(1, -1) - height / 2) / focal
    right, down, forward = (as_vector(axis) for axis in scenes.rotation.unbind(1))
    ray = (
        x * right[0] + y * down[0] + forward[0],
        x * right[1] + y * down[1] + forward[1],
        x * right[2] + y * down[2] + forward[2],
    )
    return as_vector(scenes.camera), ray


def to_camera(scenes: RoomScenes, vector: Vector) -> Vector:
    """Rotate a vector from the world frame to the camera frame."""
    right, down, forward = (as_vector(axis) for axis in scenes.rotation.unbind(1))
    return dot(right, vector), dot(down, vector), dot(forward, vector)


def first_hits(scenes: RoomScenes, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """The first hits of rays that start inside the rooms.

    Returns:
        Distances along the rays in units of `direction`, and numbers of what is hit: 0 for the
        room, 1 and up for the objects. Both `(B, N)`.
    """
    half = as_vector(scenes.room / 2)
    centre = (torch.zeros_like(half[2]), torch.zeros_like(half[2]), half[2])
    far = [
        h * inverse.abs() - (o - c) * inverse
        for o, inverse, c, h in zip(origin, map(_inverse, direction), centre, half, strict=True)
    ]
    distance = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    hit = torch.zeros_like(distance, dtype=torch.int64)
    squared = dot(direction, direction)
    for index in range(BOXES + SPHERES):
        entry = _entry(scenes, index, origin, direction, squared)
        closer = entry < distance
        distance = torch.where(closer, entry, distance)
        hit = torch.where(closer, index + 1, hit)
    return distance, hit


def blocked(scenes: RoomScenes, origin: Vector, direction: Vector) -> Tensor:
    """Whether an object lies between `origin` and `origin + direction`, `(B, N)`."""
    first = torch.full_like(direction[0], torch.inf)
    squared = dot(direction, direction)
    for index in range(BOXES + SPHERES):
        first = torch.minimum(first, _entry(scenes, index, origin, direction, squared))
    return first < 1


def describe_hits(
    scenes: RoomScenes, origin: Vector, direction: Vector, distance: Tensor, hit: Tensor
) -> Hits:
    """Describe the hits that `first_hits` returned."""
    is_room = hit == 0
    is_sphere = hit > BOXES
    zero = torch.zeros_like(scenes.room)
    room_centre = torch.cat([zero[:, :2], scenes.room[:, 2:] / 2], dim=1)
    room_yaw = torch.cat([zero[:, :1] + 1, zero[:, :1]], dim=1)

    def pick(of_room: Tensor, of_objects: Tensor) -> list[Tensor]:
        table = torch.cat([of_room[:, None], of_objects], dim=1)
        return [table[..., k].gather(1, hit) for k in range(table.shape[2])]

    cx, cy, cz = pick(room_centre, scenes.centre)
    hx, hy, hz = pick(scenes.room / 2, scenes.half)
    yaw = pick(room_yaw, scenes.yaw)
    start = _to_object(yaw, (origin[0] - cx, origin[1] - cy, origin[2] - cz))
    ray = _to_object(yaw, direction)

    # A ray hits the face of the slab that it enters last (box) or leaves first (room).
    entries = []
    for o, inverse, h in zip(start, map(_inverse, ray), (hx, hy, hz), strict=True):
        middle, reach = -o * inverse, h * inverse.abs()
        entries.append(torch.where(is_room, -middle - reach, middle - reach))
    on_x = (entries[0] >= entries[1]) & (entries[0] >= entries[2])
    on_y = ~on_x & (entries[1] >= entries[2])
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
    face = hit * 8 + torch.where(is_sphere, 0, axis * 2 + side)
    room_class = torch.where(on_z, torch.where(side == 1, 0, 1), 2)
    object_class = torch.where(is_sphere, 4, 3)
    point = (
        origin[0] + distance * direction[0],
        origin[1] + distance * direction[1],
        origin[2] + distance * direction[2],
    )
    return Hits(
        segmentation=torch.where(is_room, room_class, object_class),
        face=face,
        surface=torch.where(is_room, room_class, hit + 2),
        normal=normal,
        point=point,
        local=local,
    )


def _entry(
    scenes: RoomScenes, index: int, origin: Vector, direction: Vector, squared: Tensor
) -> Tensor:
    """The distance at which rays enter an object; infinite if they miss it or start in it."""
    centre, half = as_vector(scenes.centre[:, index]), as_vector(scenes.half[:, index])
    start = (origin[0] - centre[0], origin[1] - centre[1], origin[2] - centre[2])
    if index >= BOXES:
        return _sphere_entry(start, direction, squared, half[0])
    yaw = scenes.yaw[:, index].unsqueeze(1).unbind(2)
    return _box_entry(_to_object(yaw, start), _to_object(yaw, direction), half)


def _box_entry(start: Vector, ray: Vector, half: Vector) -> Tensor:
    near, far = [], []
    for o, inverse, h in zip(start, map(_inverse, ray), half, strict=True):
        middle, reach = -o * inverse, h * inverse.abs()
        near.append(middle - reach)
        far.append(middle + reach)
    enter = torch.maximum(torch.maximum(near[0], near[1]), near[2])
    leave = torch.minimum(torch.minimum(far[0], far[1]), far[2])
    return torch.where(torch.minimum(leave - enter, enter) > 0, enter, torch.inf)


def _sphere_entry(start: Vector, ray: Vector, squared: Tensor, radius: Tensor) -> Tensor:
    # From the point of the ray that is closest to the centre. The usual discriminant loses half
    # the digits at the silhouette.
    middle = -dot(start, ray) / squared
    closest = (
        start[0] + middle * ray[0],
        start[1] + middle * ray[1],
        start[2] + middle * ray[2],
    )
    inside = radius * radius - dot(closest, closest)
    enter = middle - (inside.clamp(min=0) / squared).sqrt()
    return torch.where(torch.minimum(inside, enter) > 0, enter, torch.inf)


def _to_object(yaw: Sequence[Tensor], vector: Vector) -> Vector:
    """Rotate a vector from the world's axes to those of an object."""
    cos, sin = yaw
    return cos * vector[0] + sin * vector[1], cos * vector[1] - sin * vector[0], vector[2]


def _inverse(d: Tensor) -> Tensor:
    # The shift is below rounding except for a ray parallel to a face, where it avoids inf - inf.
    return 1 / (d + _TINY)
