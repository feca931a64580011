"""Targets that no single ray gives: edges and keypoints."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_adapmtl.datasets._raycast import as_vector, first_hits, to_camera
from torch_adapmtl.datasets._scenes import BOXES, RoomScenes

__all__ = ["edge_map", "keypoint_map", "visible_keypoints"]

_CORNERS = [(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
_RADIUS = 0.06  # of the shorter side of the image
_NEAR = 0.05  # metres; points nearer to the camera's plane are not projected
_TOLERANCE = 1e-3  # of the distance, so that the faces of its box do not hide a corner


def edge_map(face: Tensor) -> Tensor:
    """1.0 where one of the four neighbours has another face number, `(B, 1, H, W)` as `face`."""
    edges = torch.zeros(face.shape, device=face.device)
    across = (face[..., :, 1:] != face[..., :, :-1]).float()
    down = (face[..., 1:, :] != face[..., :-1, :]).float()
    for part, differs in (
        (edges[..., :, 1:], across),
        (edges[..., :, :-1], across),
        (edges[..., 1:, :], down),
        (edges[..., :-1, :], down),
    ):
        torch.maximum(part, differs, out=part)
    return edges


def keypoint_map(scenes: RoomScenes, height: int, width: int) -> Tensor:
    """The heat map of the visible keypoints, `(B, height * width)`; see `Rooms`."""
    x, y, visible = visible_keypoints(scenes, height, width)
    device = x.device
    columns = torch.arange(width, device=device) + 0.5
    rows = torch.arange(height, device=device) + 0.5
    du, dv = columns - x[..., None], rows - y[..., None]
    du, dv = du * du, torch.where(visible[..., None], dv * dv, torch.inf)
    squared = torch.full((len(scenes), height, width), torch.inf, device=device)
    for k in range(x.shape[1]):
        squared = torch.minimum(squared, du[:, k, None, :] + dv[:, k, :, None])
    radius = _RADIUS * min(height, width)
    bump = (1 - squared / (radius * radius)).clamp(min=0)
    return (bump * bump).reshape(len(scenes), -1)


def visible_keypoints(scenes: RoomScenes, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The corners of the boxes and the centres of the spheres, projected into the image.

    Returns:
        Column, row (both in pixels) and whether the point is visible, each `(B, K)`. A visible
        point lies in the image and no object hides it, not counting the sphere around a centre.
    """
    signs = torch.tensor(_CORNERS, device=scenes.keys.device)
    corners = scenes.half[:, :BOXES, None, :] * signs
    cos, sin = (part[:, :BOXES, None] for part in scenes.yaw.unbind(2))
    across, along = corners[..., 0], corners[..., 1]
    corners = torch.stack(
        [cos * across - sin * along, sin * across + cos * along, corners[..., 2]], dim=3
    )
    corners = corners + scenes.centre[:, :BOXES, None, :]
    points = torch.cat([corners.flatten(1, 2), scenes.centre[:, BOXES:]], dim=1)
    px, py, pz = points.unbind(2)
    origin = as_vector(scenes.camera)
    ray = (px - origin[0], py - origin[1], pz - origin[2])

    right, down, forward = to_camera(scenes, ray)
    focal = scenes.focal(height, width)[:, None]
    depth = forward.clamp(min=_NEAR)
    x, y = right / depth * focal + width / 2, down / depth * focal + height / 2
    inside = (forward > _NEAR) & (x >= 0) & (x < width) & (y >= 0) & (y < height)

    distance, hit = first_hits(scenes, origin, ray)
    sphere = torch.arange(points.shape[1], device=hit.device) - BOXES * len(_CORNERS)
    in_sight = torch.where(sphere >= 0, hit == sphere + BOXES + 1, distance >= 1 - _TOLERANCE)
    # Objects that a room does not have lie below its floor, which hides them.
    return x, y, inside & in_sight
