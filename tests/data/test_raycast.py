"""Segmentation, depth and normals of rendered rooms, against plain geometry in float64."""

from __future__ import annotations

import math

import torch
from room_oracle import CLASS_OF_FACE, PlainRoom, every_scene
from torch import Tensor


@every_scene
def test_depth_ends_on_the_surface_that_the_segmentation_names(index: int) -> None:
    room = PlainRoom(index)
    distance = room.face_distances(room.to_world(room.camera_points()))
    of_class = room.targets["segmentation"][..., None] == CLASS_OF_FACE
    nearest = torch.where(of_class, distance, math.inf).amin(-1)
    assert nearest.max() < 5e-4  # metres


@every_scene
def test_no_object_and_no_wall_is_before_the_surface(index: int) -> None:
    room = PlainRoom(index)
    ends = room.camera_points()
    for part in torch.linspace(0, 1, 60).tolist():
        points = room.to_world(ends * part)
        assert not room.inside_an_object(points, margin=1e-3).any()
        x, y, z = points.unbind(-1)
        width, depth, height = room.room + 1e-4
        assert (x.abs() <= width / 2).all()
        assert (y.abs() <= depth / 2).all()
        assert ((z >= -1e-4) & (z <= height)).all()


@every_scene
def test_normals_are_unit_and_face_the_camera(index: int) -> None:
    room = PlainRoom(index)
    normal = room.targets["normal"].double().permute(1, 2, 0)
    torch.testing.assert_close(
        normal.norm(dim=-1), torch.ones_like(normal[..., 0]), atol=1e-5, rtol=0
    )
    assert ((normal * room.rays()).sum(-1) < 1e-6).all()


def from_differences(points: Tensor) -> Tensor:
    """Unit normals of a map of points `(H, W, 3)`, by central differences, without the borders."""
    du = points[1:-1, 2:] - points[1:-1, :-2]
    dv = points[2:, 1:-1] - points[:-2, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(dv, du), dim=-1)


def angles(a: Tensor, b: Tensor) -> Tensor:
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)))


@every_scene
def test_normals_are_those_of_the_depth(index: int) -> None:
    room = PlainRoom(index)
    normal = room.targets["normal"].double().permute(1, 2, 0)
    error = angles(from_differences(room.camera_points()), normal[1:-1, 1:-1])
    # Pixels whose four neighbours lie on the same surface.
    smooth = room.targets["edges"][0][1:-1, 1:-1] == 0
    flat = smooth & (room.targets["segmentation"][1:-1, 1:-1] != 4)
    assert flat.sum() > 500
    assert error[flat].max() < 0.5  # degrees; the depth is float32
    curved = smooth & ~flat
    if curved.sum() > 20:
        assert error[curved].median() < 4  # differences across a pixel of a small sphere
