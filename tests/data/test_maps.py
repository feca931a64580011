"""Edges and keypoints of rendered rooms, against plain geometry in float64."""

from __future__ import annotations

import torch
from room_oracle import BOXES, HEIGHT, SPHERES, WIDTH, PlainRoom, every_scene


@every_scene
def test_edges_are_where_neighbours_lie_on_different_faces(index: int) -> None:
    room = PlainRoom(index)
    face = room.face_distances(room.to_world(room.camera_points())).argmin(-1).tolist()
    expected = torch.zeros(HEIGHT, WIDTH)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            for r, c in (
                (row, column + 1),
                (row, column - 1),
                (row + 1, column),
                (row - 1, column),
            ):
                if 0 <= r < HEIGHT and 0 <= c < WIDTH and face[r][c] != face[row][column]:
                    expected[row, column] = 1
    # A pixel on the line where two faces meet is on both, so either may be the nearest one.
    assert (expected != room.targets["edges"][0]).float().mean() < 0.002


@every_scene
def test_keypoints_are_the_visible_corners_and_centres(index: int) -> None:
    room = PlainRoom(index)
    points = []  # each with how far along the line from the camera it must be clear
    for box in BOXES:
        if not room.present[box]:
            continue
        cos, sin = room.yaw[box]
        for corner in range(8):
            x, y, z = (room.half[box][k] * (1 if corner >> k & 1 else -1) for k in range(3))
            offset = torch.stack([cos * x - sin * y, sin * x + cos * y, z])
            points.append((room.centre[box] + offset, 0.998))
    for sphere in SPHERES:
        if room.present[sphere]:  # up to where the line enters the sphere
            distance = (room.centre[sphere] - room.camera).norm()
            entry = 1 - float(room.half[sphere][0] / distance) - 0.002
            points.append((room.centre[sphere], entry))
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    radius = 0.06 * min(HEIGHT, WIDTH)
    for point, clear in points:
        x, y, z = room.rotation @ (point - room.camera)
        if z < 0.05:
            continue
        column, row = x / z * room.focal + WIDTH / 2, y / z * room.focal + HEIGHT / 2
        if not (0 <= column < WIDTH and 0 <= row < HEIGHT):
            continue
        parts = torch.linspace(0, clear, 800).double()[:, None]
        if room.inside_an_object(room.camera + parts * (point - room.camera), 2e-3).any():
            continue
        squared = (u - column) ** 2 + (v - row) ** 2
        expected = torch.maximum(expected, (1 - squared / radius**2).clamp(min=0) ** 2)
    wrong = (expected - room.targets["keypoints"][0]).abs() > 1e-3
    # A corner that just touches a silhouette may be visible or not.
    assert wrong.float().mean() < 0.01
