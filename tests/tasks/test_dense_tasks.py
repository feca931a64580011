"""Segmentation, depth, normals and maps: hand-computed examples and plain formulae."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("torchmetrics")

from measuring import NORMAL_METRICS, measured

from torch_adapmtl.tasks import Depth, Map, Normals, Segmentation, Task


def test_segmentation_by_hand() -> None:
    # Predicted 0 0 1 1 2, true 0 1 1 1 and unknown: the IoU of class 0 is 1/2, that of class 1 is
    # 2/3. Class 2 is predicted only where the target is unknown, so it does not count.
    logits = F.one_hot(torch.tensor([[[0, 0, 1, 1, 2]]]), 4).movedim(-1, 1).float() * 9
    target = torch.tensor([[[0, 1, 1, 1, 255]]])
    values = measured(Segmentation(4), (logits, target))
    assert values["mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert values["pixel_accuracy"] == pytest.approx(75)


def test_the_loss_of_segmentation_is_weighted_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    target[0, :2] = 255
    for weights in (None, torch.tensor([0.5, 1.0, 3.0])):
        task = Segmentation(3, class_weights=weights, metrics=["cross_entropy"])
        expected = F.cross_entropy(logits, target, weight=weights, ignore_index=255)
        torch.testing.assert_close(task.loss(logits, target), expected)
        value = measured(task, (logits, target))["cross_entropy"]
        assert value == pytest.approx(expected.item())
    assert task.loss(logits, torch.full_like(target, 255)) == 0


@pytest.mark.parametrize(
    "weights", [None, torch.tensor([0.1, 1.0, 5.0])], ids=["equal", "weighted"]
)
def test_cross_entropy_does_not_depend_on_the_batches(weights: Tensor | None) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3, 4, 4), torch.randint(3, (5, 4, 4))
    target[0, :3] = 255
    target[1:3] = 2  # the second batch has the heavy class only
    task = Segmentation(3, class_weights=weights, metrics=["cross_entropy"])
    batches = [(logits[part], target[part]) for part in (slice(1), slice(1, 3), slice(3, 5))]
    value = measured(task, *batches)["cross_entropy"]
    assert value == pytest.approx(task.loss(logits, target).item(), rel=1e-6)
    assert math.isnan(measured(task, (logits * math.nan, target))["cross_entropy"])


def test_depth_by_hand() -> None:
    prediction = torch.tensor([[[[2.0, 3.0, 1.0, 7.0, -1.0]]]])
    target = torch.tensor([[[[2.0, 4.0, 1.6, 0.0, 1.0]]]])  # the fourth is unknown
    values = measured(Depth(), (prediction, target))
    assert values["abs_error"] == pytest.approx((0 + 1 + 0.6 + 2) / 4)
    assert values["rel_error"] == pytest.approx((0 + 1 / 4 + 0.6 / 1.6 + 2) / 4)
    # ratios 1, 4/3, 1.6, none
    assert values["within_1.25"] == pytest.approx(25)
    assert values["within_1.25^2"] == pytest.approx(50)
    assert values["within_1.25^3"] == pytest.approx(75)
    assert Depth().loss(prediction, target).item() == pytest.approx(3.6 / 4)


def test_normals_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 20.0, 25.0, 90.0])
    radians = angles.deg2rad()
    prediction = 3 * torch.stack([radians.sin(), radians.cos(), 0 * radians]).view(1, 3, 1, 5)
    target = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 6)
    target[..., 5] = 0  # unknown
    prediction = torch.cat([prediction, torch.ones(1, 3, 1, 1)], dim=-1)
    task = Normals(metrics=NORMAL_METRICS)
    values = measured(task, (prediction, target))
    assert values["angle_mean"] == pytest.approx(29, abs=1e-4)
    assert values["angle_median"] == pytest.approx(20, abs=0.011)
    assert values["within_11.25"] == pytest.approx(40)
    assert values["within_22.5"] == pytest.approx(60)
    assert values["within_30"] == pytest.approx(80)
    assert values["cosine"] == pytest.approx(radians.cos().mean().item(), abs=1e-6)
    assert task.loss(prediction, target).item() == pytest.approx(1 - values["cosine"], abs=1e-6)


@pytest.mark.parametrize(
    ("vector", "angle", "cosine"),
    [((0.0, 0.0, 0.0), 90, 0), ((0.0, math.nan, 0.0), 180, -1), ((0.0, math.inf, 0.0), 180, -1)],
    ids=["dead", "nan", "infinite"],
)
def test_a_normal_without_a_direction_is_not_rated_well(
    vector: tuple[float, ...], angle: float, cosine: float
) -> None:
    target = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    prediction = torch.tensor(vector).view(1, 3, 1, 1).expand_as(target)
    task = Normals(metrics=NORMAL_METRICS)
    values = measured(task, (prediction, target))
    assert values["angle_mean"] == pytest.approx(angle)
    assert values["angle_median"] == pytest.approx(angle, abs=0.011)
    assert values["cosine"] == cosine
    assert values["within_11.25"] == values["within_22.5"] == values["within_30"] == 0


@pytest.mark.parametrize("task", [Depth(), Normals(), Map()], ids=lambda task: type(task).__name__)
def test_a_target_of_nan_is_unknown_to_the_gradient_too(task: Task) -> None:
    target = F.normalize(torch.ones(1, 3, 2, 2), dim=1)
    target[..., 0] = math.nan
    prediction = torch.rand(1, 3, 2, 2, requires_grad=True)
    task.loss(prediction, target).backward()
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[..., 0].any()
    assert prediction.grad[..., 1].all()


def test_maps_by_hand() -> None:
    target = torch.tensor([[[[1.0, -1.0, math.nan]]]])
    prediction = torch.tensor([[[[0.5, 0.5, 9.0]]]], requires_grad=True)
    task = Map()
    loss = task.loss(prediction, target)
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad.flatten().tolist() == [-0.5, 0.5, 0.0]
    assert measured(task, (prediction, target)) == {"abs_error": 1.0}


def test_class_weights_that_were_cast_in_a_test_can_be_trained_with() -> None:
    task = Segmentation(2, class_weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    with torch.inference_mode():
        task.loss(logits, target)
    assert task.loss(logits.requires_grad_(), target).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("task", "unknown"),
    [(Depth(), 0.0), (Normals(), 0.0), (Map(), math.nan)],
    ids=lambda value: type(value).__name__,
)
def test_the_loss_is_0_where_no_pixel_is_known(task: Task, unknown: float) -> None:
    prediction = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss = task.loss(prediction, torch.full((2, 3, 4, 4), unknown))
    loss.backward()
    assert loss == 0
    assert not prediction.grad.any()


def test_class_weights_are_one_finite_number_for_each_class() -> None:
    with pytest.raises(ValueError, match=r"one number for each of 3 classes, got the shape \(2,\)"):
        Segmentation(3, class_weights=torch.ones(2))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"finite and >= 0, got \[1.0, {wrong}\]"):
            Segmentation(2, class_weights=torch.tensor([1.0, wrong]))
