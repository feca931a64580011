"""What is in a procedural room: sizes, camera, light, boxes, spheres and their textures."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torch_adapmtl.datasets._random import Draws

__all__ = ["BOXES", "SPHERES", "RoomScenes", "sample_scenes"]

BOXES = 3
SPHERES = 3
_COLUMNS = 3  # each object stands in its own cell of a grid, so that no two overlap
_ROWS = 2
# Height of objects that a room does not have: below the floor, where no ray reaches them.
_ABSENT = -1e3


@dataclass(frozen=True)
class RoomScenes:
    """The exact description of `B` rooms, in metres.

    In the world frame x points to the right and y away from the wall behind the camera, both 0 in
    the middle of the room; z points up and is 0 on the floor. In the camera frame x points to the
    right, y down and z forward.

    Attributes:
        room: Width (x), depth (y) and height (z) of the room, `(B, 3)`.
        camera: Position of the camera, `(B, 3)`.
        rotation: Rotation from world to camera, `(B, 3, 3)`; its rows are the camera's axes.
        tan_half_fov: Tangent of half the field of view along the image's shorter side, `(B,)`.
        light: Position of the light, `(B, 3)`.
        centre: Centres of the boxes, then of the spheres, `(B, 6, 3)`.
        half: Half sizes of the boxes along their axes, then the radius of each sphere three times,
            `(B, 6, 3)`.
        yaw: Cosine and sine of the objects' rotation about z, `(B, 6, 2)`.
        present: Whether the room has each object, `(B, 6)`; the others lie below its floor.
        pattern: Texture of floor, ceiling, walls and objects, `(B, 9)`: 0 checker, 1 stripes,
            2 noise, 3 plain.
        frequency: Texture cells per metre, `(B, 9)`.
        offset: Shift of the texture in cells, `(B, 9, 3)`.
        colours: The two RGB colours that a texture mixes, `(B, 9, 2, 3)`.
        keys: The key of each room's random numbers, `(B,)`.

    Example:
        >>> from torch_adapmtl.datasets import Rooms
        >>> scenes = Rooms(100).scenes([3, 4])
        >>> scenes.room.shape, scenes.focal(64, 64).shape
        (torch.Size([2, 3]), torch.Size([2]))
    """

    room: Tensor
    camera: Tensor
    rotation: Tensor
    tan_half_fov: Tensor
    light: Tensor
    centre: Tensor
    half: Tensor
    yaw: Tensor
    present: Tensor
    pattern: Tensor
    frequency: Tensor
    offset: Tensor
    colours: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice) -> RoomScenes:
        """The rooms of a slice."""
        return RoomScenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def focal(self, height: int, width: int) -> Tensor:
        """The focal length in pixels for images of this size, `(B,)`.

        The principal point is the middle of the image. The centre of pixel `(row, column)` is at
        `x = column + 0.5`, `y = row + 0.5`.
        """
        return 0.5 * min(height, width) / self.tan_half_fov


def sample_scenes(keys: Tensor) -> RoomScenes:
    """Draw one room for each int64 key `(B,)`; a room depends only on its key."""
    draw = Draws(keys)
    room = torch.stack([draw(3.6, 6.0), draw(4.5, 7.0), draw(2.3, 3.2)], dim=1)
    width, depth, height = room.unbind(1)
    camera = torch.stack(
        [draw(-0.25, 0.25) * width, draw(0.3, 1.0) - depth / 2, draw(1.1, 1.9)], dim=1
    )
    rotation = _camera_axes(_rotation(draw(-0.24, 0.24)), _rotation(draw(-0.03, 0.2)))
    light = torch.stack(
        [
            draw(-0.35, 0.35) * width,
            draw(-0.35, 0.35) * depth,
            height - draw(0.15, 0.6),
        ],
        dim=1,
    )
    centre, half, yaw, present = _place_objects(draw, width, camera[:, 1] + 1.0, depth / 2)
    pattern, frequency, offset, colours = _textures(draw)
    return RoomScenes(
        room=room,
        camera=camera,
        rotation=rotation,
        tan_half_fov=draw(0.55, 0.85),
        light=light,
        centre=centre,
        half=half,
        yaw=yaw,
        present=present,
        pattern=pattern,
        frequency=frequency,
        offset=offset,
        colours=colours,
        keys=keys,
    )


def _rotation(tan_half: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of an angle, from the tangent of its half."""
    # These operations are exactly rounded. The last bit of `cos` and `sin` depends on the position
    # in the batch.
    squared = tan_half * tan_half
    return (1 - squared) / (1 + squared), 2 * tan_half / (1 + squared)


def _camera_axes(yaw: tuple[Tensor, Tensor], pitch: tuple[Tensor, Tensor]) -> Tensor:
    """The rotation from world to camera, `(B, 3, 3)`, from cosines and sines."""
    (cos_y, sin_y), (cos_p, sin_p) = yaw, pitch
    zero = torch.zeros_like(cos_y)
    right = torch.stack([cos_y, -sin_y, zero], dim=1)
    down = torch.stack([-sin_p * sin_y, -sin_p * cos_y, -cos_p], dim=1)
    forward = torch.stack([sin_y * cos_p, cos_y * cos_p, -sin_p], dim=1)
    return torch.stack([right, down, forward], dim=1)


def _place_objects(
    draw: Draws, width: Tensor, near: Tensor, far: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the objects between y = `near` and y = `far`: centre, half sizes, yaw, presence."""
    count = BOXES + SPHERES
    box_half = torch.stack(
        [draw(0.18, 0.4, BOXES), draw(0.18, 0.4, BOXES), draw(0.15, 0.75, BOXES)], dim=2
    )
    sphere_half = draw(0.2, 0.55, SPHERES)[:, :, None].expand(-1, -1, 3)
    half = torch.cat([box_half, sphere_half], dim=1)
    reach = (half[..., 0] * half[..., 0] + half[..., 1] * half[..., 1]).sqrt()
    reach = torch.cat([reach[:, :BOXES], half[:, BOXES:, 0]], dim=1)  # in the floor plan

    cell = draw.permutation(_COLUMNS * _ROWS)[:, :count]
    column, row = cell % _COLUMNS, cell // _COLUMNS
    cell_x, cell_y = width[:, None] / _COLUMNS, (far - near)[:, None] / _ROWS
    free_x = (cell_x / 2 - reach).clamp(min=0)
    free_y = (cell_y / 2 - reach).clamp(min=0)
    x = (column + 0.5) * cell_x - width[:, None] / 2 + draw(-1, 1, count) * free_x
    y = near[:, None] + (row + 0.5) * cell_y + draw(-1, 1, count) * free_y

    present = draw(0, 1, count) < 0.85
    z = torch.where(present, half[..., 2], _ABSENT)
    yaw = torch.stack(_rotation(draw(-0.41, 0.41, count)), dim=2)
    yaw[:, BOXES:] = torch.tensor([1.0, 0.0], device=yaw.device)
    return torch.stack([x, y, z], dim=2), half, yaw, present


def _textures(draw: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw pattern, frequency, offset and colours of every surface."""
    surfaces = 3 + BOXES + SPHERES  # floor, ceiling, walls, objects
    pattern = draw.integers(4, surfaces)
    frequency = draw(1.0, 3.0, surfaces)
    frequency = torch.cat([frequency[:, :3], frequency[:, 3:] * 2], dim=1)
    offset = draw(0, 16, surfaces, 3)
    first = draw(0.25, 0.95, surfaces, 3)
    second = draw(0.25, 0.95, surfaces, 3)
    # The room is paler than its objects, and the ceiling is the palest.
    paleness = torch.full((surfaces,), 0.15, device=first.device)
    paleness[:3] = torch.tensor([0.5, 0.75, 0.6], device=first.device)
    paleness = paleness[:, None]
    first = first * (1 - paleness) + 0.85 * paleness
    second = second * (1 - paleness) + 0.6 * paleness
    return pattern, frequency, offset, torch.stack([first, second], dim=2)
