"""A plain description of rooms in float64, to check rendered targets against."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from torch_adapmtl.datasets import Rooms

ALL_TASKS = ("segmentation", "depth", "normal", "edges", "keypoints")
SCENES = 24
HEIGHT, WIDTH = 48, 60
BOXES = range(3)
SPHERES = range(3, 6)
# The class of each face in the order of `PlainRoom.face_distances`.
CLASS_OF_FACE = torch.tensor([0, 1, 2, 2, 2, 2] + [3] * 18 + [4] * 3)

every_scene = pytest.mark.parametrize("index", range(0, SCENES, 3))


@cache
def rooms() -> Rooms:
    return Rooms(SCENES, image_size=(HEIGHT, WIDTH), tasks=ALL_TASKS, seed=5)


@cache
def rendered() -> tuple[Tensor, dict[str, Tensor]]:
    return rooms().render(range(SCENES))


class PlainRoom:
    """One of these rooms, its rendered targets, and its geometry computed plainly."""

    def __init__(self, index: int) -> None:
        scene = rooms().scenes([index])
        self.room = scene.room[0].double()
        self.camera = scene.camera[0].double()
        self.rotation = scene.rotation[0].double()
        self.focal = float(scene.focal(HEIGHT, WIDTH)[0])
        self.centre = scene.centre[0].double()
        self.half = scene.half[0].double()
        self.yaw = scene.yaw[0].double()
        self.present = scene.present[0].tolist()
        self.targets = {task: target[index] for task, target in rendered()[1].items()}

    def rays(self) -> Tensor:
        """The rays through the pixels' centres, in the camera frame, at depth 1: `(H, W, 3)`."""
        y, x = torch.meshgrid(
            torch.arange(HEIGHT).double(), torch.arange(WIDTH).double(), indexing="ij"
        )
        x = (x + 0.5 - WIDTH / 2) / self.focal
        y = (y + 0.5 - HEIGHT / 2) / self.focal
        return torch.stack([x, y, torch.ones_like(x)], dim=-1)

    def camera_points(self) -> Tensor:
        """The points that the rendered depth stands for, in the camera frame: `(H, W, 3)`."""
        return self.rays() * self.targets["depth"][0].double()[..., None]

    def to_world(self, points: Tensor) -> Tensor:
        return points @ self.rotation + self.camera

    def in_box(self, index: int, points: Tensor) -> Tensor:
        """Points in the axes of a box, in units of its half sizes."""
        cos, sin = self.yaw[index]
        x, y, z = (points - self.centre[index]).unbind(-1)
        return torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1) / self.half[index]

    def face_distances(self, points: Tensor) -> Tensor:
        """Distances to every face, `(..., faces)`: floor, ceiling, 4 walls, then the objects."""
        x, y, z = points.unbind(-1)
        width, depth, height = self.room
        distances = [z.abs(), (z - height).abs()]
        distances += [(x + side * width / 2).abs() for side in (-1, 1)]
        distances += [(y + side * depth / 2).abs() for side in (-1, 1)]
        for index in BOXES:
            local = self.in_box(index, points)
            for axis in range(3):
                others = [k for k in range(3) if k != axis]
                for side in (-1, 1):
                    beside = ((local[..., axis] - side) * self.half[index][axis]).abs()
                    over = ((local[..., others].abs() - 1) * self.half[index][others]).clamp(min=0)
                    distances.append(beside + over.sum(-1))
        for index in SPHERES:
            radius = (points - self.centre[index]).norm(dim=-1)
            distances.append((radius - self.half[index][0]).abs())
        return torch.stack(distances, dim=-1)

    def inside_an_object(self, points: Tensor, margin: float) -> Tensor:
        """Whether points are deeper than `margin` metres inside some object."""
        inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
        for index in BOXES:
            depth = (1 - self.in_box(index, points).abs()) * self.half[index]
            inside |= depth.amin(-1) > margin
        for index in SPHERES:
            distance = (points - self.centre[index]).norm(dim=-1)
            inside |= distance < self.half[index][0] - margin
        return inside
