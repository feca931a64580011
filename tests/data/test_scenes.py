"""Where the objects, the camera and the axes of random scenes are."""

from __future__ import annotations

import torch

from torch_adapmtl.datasets import Rooms


def test_objects_do_not_overlap_and_stand_in_the_room() -> None:
    scenes = Rooms(300, seed=1).scenes(range(300))
    radius = torch.where(
        torch.arange(6) < 3, scenes.half[..., :2].norm(dim=-1), scenes.half[..., 0]
    )
    for first in range(6):
        reach = scenes.centre[:, first, :2].abs() + radius[:, first, None]
        assert (reach <= scenes.room[:, :2] / 2 + 1e-4).all()
        for second in range(first):
            apart = (scenes.centre[:, first] - scenes.centre[:, second])[:, :2].norm(dim=-1)
            assert (apart >= radius[:, first] + radius[:, second] - 1e-4).all()
    bottom = (scenes.centre - scenes.half)[..., 2]
    assert bottom[scenes.present].abs().max() < 1e-6
    assert 0.75 < scenes.present.float().mean() < 0.95


def test_the_camera_is_outside_of_all_objects_and_its_axes_are_a_rotation() -> None:
    scenes = Rooms(300, seed=1).scenes(range(300))
    radius = torch.where(
        torch.arange(6) < 3, scenes.half[..., :2].norm(dim=-1), scenes.half[..., 0]
    )
    away = (scenes.centre[..., :2] - scenes.camera[:, None, :2]).norm(dim=-1)
    assert (away > radius).all()
    torch.testing.assert_close(
        scenes.rotation @ scenes.rotation.mT, torch.eye(3).expand(300, 3, 3), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(scenes.rotation), torch.ones(300))
