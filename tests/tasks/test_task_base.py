"""What holds for every task: sizes, gradients, waiting for the device, choice of metrics."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from waiting import READS, refused

pytest.importorskip("torchmetrics")

from measuring import NORMAL_METRICS

from torch_adapmtl.tasks import (
    Classification,
    Depth,
    Map,
    Normals,
    Regression,
    Segmentation,
    Task,
)

EACH = pytest.mark.parametrize(
    ("task", "prediction", "target"),
    [
        (
            Segmentation(
                3,
                class_weights=torch.ones(3),
                metrics=["mIoU", "pixel_accuracy", "cross_entropy"],
            ),
            (2, 3, 4, 4),
            lambda: torch.tensor([0, 1, 2, 255]).expand(2, 8, 4).repeat(1, 1, 2),
        ),
        (Depth(), (2, 1, 4, 4), lambda: torch.rand(2, 1, 8, 8)),
        (
            Normals(metrics=NORMAL_METRICS),
            (2, 3, 4, 4),
            lambda: F.normalize(torch.randn(2, 3, 8, 8), dim=1),
        ),
        (Map(), (2, 1, 4, 4), lambda: torch.rand(2, 1, 8, 8)),
        (Classification(3), (4, 3), lambda: torch.tensor([0, 1, 2, 0])),
        (Regression(), (4, 2), lambda: torch.rand(4, 2)),
    ],
    ids=["segmentation", "depth", "normals", "map", "classification", "regression"],
)


@pytest.mark.parametrize(
    ("task", "channels", "make"),
    [
        (Segmentation(3), 3, lambda: torch.randint(3, (2, 8, 8))),
        (Depth(), 1, lambda: torch.rand(2, 1, 8, 8) + 1),
        (Normals(), 3, lambda: F.normalize(torch.randn(2, 3, 8, 8), dim=1)),
        (Map(), 1, lambda: torch.rand(2, 1, 8, 8)),
    ],
    ids=["segmentation", "depth", "normals", "map"],
)
def test_sizes_are_brought_together(task: Any, channels: int, make: Any) -> None:
    torch.manual_seed(0)
    target, prediction = make(), torch.rand(2, channels, 4, 4)
    thinned = target[..., ::2, ::2]  # the pixels that the nearest mode selects
    torch.testing.assert_close(task.loss(prediction, target), task.loss(prediction, thinned))
    task.update(prediction, target)
    at_once = task.compute()
    task.reset()
    task.update(F.interpolate(prediction, (8, 8), mode="bilinear", align_corners=False), target)
    assert task.compute() == at_once
    task.reset()


@EACH
def test_a_loss_does_not_wait_for_the_device(task: Task, prediction: Any, target: Any) -> None:
    outputs, targets = torch.randn(prediction, requires_grad=True), target()
    with refused():
        task.loss(outputs, targets).backward()
    assert outputs.grad.isfinite().all()
    if isinstance(task, Depth | Normals | Map):
        with pytest.raises(AssertionError, match="index"), refused():
            task.update(outputs, targets)  # a mask is noticed, so the check above can fail
        task.reset()


@EACH
def test_an_evaluation_in_inference_mode_leaves_the_task_as_it_was(
    task: Task, prediction: Any, target: Any
) -> None:
    outputs, targets = torch.randn(prediction), target()
    task.reset()
    task.update(outputs, targets)
    expected = task.compute()
    task.reset()
    with torch.inference_mode():
        task.loss(outputs, targets)
        task.update(outputs, targets)
        assert task.compute() == expected
        task.reset()
    task.update(outputs, targets)
    assert task.compute() == expected
    task.loss(outputs.requires_grad_(), targets).backward()
    task.reset()


@pytest.mark.parametrize("task", [Depth(), Map(), Normals()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("shape", [(8, 4, 4), (8, 1, 4, 4), (1, 3, 4, 4)], ids=str)
def test_nothing_is_broadcast(task: Task, shape: tuple[int, ...]) -> None:
    prediction, target = torch.rand(8, 3, 4, 4), torch.rand(shape)
    for call in (task.loss, task.update):
        with pytest.raises(ValueError, match=r"the same batch and channels .*\(8, 3, 4, 4\) and"):
            call(prediction, target)


@EACH
def test_an_update_reads_nothing_on_the_host(task: Task, prediction: Any, target: Any) -> None:
    """Selecting the valid pixels waits for the device, but no value leaves it."""
    outputs, targets = torch.randn(prediction), target()
    with refused(READS):
        task.update(outputs, targets)
        task.update(outputs, targets)
    with pytest.raises(AssertionError, match="read on the host"), refused(READS):
        task.compute()  # a read is noticed, so the check above can fail
    assert all(math.isfinite(value) for value in task.compute().values())


def test_metrics_are_chosen_by_name() -> None:
    assert Depth(metrics=["abs_error"]).metrics == ("abs_error",)
    with pytest.raises(ValueError, match=r"metrics must be some of .*'abs_error'.*got \['mIoU'\]"):
        Depth(metrics=["mIoU"])


@pytest.mark.parametrize(
    ("task", "lower"),
    [
        (Segmentation(3), set()),
        (Segmentation(3, metrics=["mIoU", "cross_entropy"]), {"cross_entropy"}),
        (Normals(metrics=["angle_mean", "within_30"]), {"angle_mean"}),
        (Map(), {"abs_error"}),
    ],
)
def test_lower_is_better_names_computed_metrics_only(task: Task, lower: set[str]) -> None:
    assert task.lower_is_better == lower <= set(task.metrics)


def test_the_error_without_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch_adapmtl.tasks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[examples\]"'):
        importlib.import_module("torch_adapmtl.tasks")
