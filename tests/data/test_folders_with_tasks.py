"""Losses and metrics on what the data sets from folders return."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from folders import NOT_FINITE, known_pixels, with_first_number

pytest.importorskip("torchmetrics")

from torch_adapmtl.datasets import NYUv2, RandomScaleCrop, TinyTaskonomy
from torch_adapmtl.tasks import Depth, Map, Normals, Segmentation


def test_unknown_and_padded_pixels_count_neither_in_losses_nor_in_metrics(taskonomy: Path) -> None:
    crop = RandomScaleCrop(6, scale=(1.0, 1.0), same_camera=False)  # pads
    data = TinyTaskonomy(taskonomy, transform=crop)
    _, targets = data[0]
    tasks = {
        "segmentation": Segmentation(17, class_weights=data.class_weights),
        "normal": Normals(),
        "depth": Depth(),
        "keypoints": Map(),
        "edges": Map(),
    }
    channels = {"segmentation": 17, "normal": 3}
    for name, task in tasks.items():
        target = targets[name][None]
        prediction = torch.randn(1, channels.get(name, 1), 6, 6, requires_grad=True)
        loss = task.loss(prediction, target)
        loss.backward()
        known = known_pixels(name, target[0])
        assert torch.equal(prediction.grad.abs().sum(1)[0] > 0, known)
        assert 0 < int(known.sum()) <= 6
        task.update(prediction.detach(), target)
        assert all(math.isfinite(value) for value in task.compute().values())


@pytest.mark.parametrize("value", NOT_FINITE)
def test_numbers_that_are_not_finite_do_not_reach_gradients(
    arrays_nyuv2: Path, value: float
) -> None:
    for kind in ("normal", "depth"):
        with_first_number(f"train/{kind}/0.npy", value)(arrays_nyuv2)
    _, targets = NYUv2(arrays_nyuv2)[0]
    for name, task in {"normal": Normals(), "depth": Depth()}.items():
        prediction = torch.ones_like(targets[name][None], requires_grad=True)
        task.loss(prediction, targets[name][None]).backward()
        assert prediction.grad.isfinite().all()
