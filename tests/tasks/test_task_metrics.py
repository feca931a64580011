"""The metrics that torchmetrics lacks, through the tasks that use them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchmetrics")

from torch_adapmtl.tasks import Normals


@pytest.mark.filterwarnings("ignore:The ..compute.. method:UserWarning")  # torchmetrics'
def test_metrics_of_no_known_pixel_are_nan() -> None:
    task = Normals()
    task.update(torch.randn(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    assert all(math.isnan(value) for value in task.compute().values())


def test_the_median_angle_is_that_of_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    task = Normals(metrics=["angle_median"])
    everything = []
    for _ in range(3):
        prediction, target = torch.randn(2, 2, 3, 4, 5, generator=generator)
        target = F.normalize(target, dim=1)
        task.update(prediction, target)
        everything.append(F.cosine_similarity(prediction, target, dim=1).acos().rad2deg().flatten())
    expected = torch.cat(everything).median().item()
    assert task.compute()["angle_median"] == pytest.approx(expected, abs=0.011)
    task.reset()
    task.update(target, target)
    assert task.compute()["angle_median"] < 0.02
