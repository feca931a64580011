"""Losses and metrics of the tasks, by hand-computed examples and plain formulae."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from waiting import READS, refused

pytest.importorskip("torchmetrics")

from torch_adapmtl.tasks import Classification, Depth, Map, Normals, Regression, Segmentation, Task


def measured(task: Task, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    for prediction, target in batches:
        task.update(prediction, target)
    return task.compute()


def test_segmentation_by_hand() -> None:
    # classes found 0 0 1 1 2, true 0 1 1 1 ignored: IoU of 0 is 1/2, of 1 is 2/3; 2 never counts
    logits = F.one_hot(torch.tensor([[[0, 0, 1, 1, 2]]]), 4).movedim(-1, 1).float() * 9
    target = torch.tensor([[[0, 1, 1, 1, 255]]])
    found = measured(Segmentation(4), (logits, target))
    assert found["mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert found["pixel_accuracy"] == pytest.approx(75)


def test_the_loss_of_segmentation_is_weighted_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    target[0, :2] = 255
    for weights in (None, torch.tensor([0.5, 1.0, 3.0])):
        task = Segmentation(3, class_weights=weights, metrics=["cross_entropy"])
        expected = F.cross_entropy(logits, target, weight=weights, ignore_index=255)
        torch.testing.assert_close(task.loss(logits, target), expected)
        found = measured(task, (logits, target))["cross_entropy"]
        assert found == pytest.approx(expected.item())
    assert task.loss(logits, torch.full_like(target, 255)) == 0


@pytest.mark.parametrize(
    "weights", [None, torch.tensor([0.1, 1.0, 5.0])], ids=["equal", "weighted"]
)
def test_cross_entropy_does_not_depend_on_the_batches(weights: Tensor | None) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3, 4, 4), torch.randint(3, (5, 4, 4))
    target[0, :3] = 255
    target[1:3] = 2  # the second batch is of a heavy class
    task = Segmentation(3, class_weights=weights, metrics=["cross_entropy"])
    batches = [(logits[part], target[part]) for part in (slice(1), slice(1, 3), slice(3, 5))]
    found = measured(task, *batches)["cross_entropy"]
    assert found == pytest.approx(task.loss(logits, target).item(), rel=1e-6)
    assert math.isnan(measured(task, (logits * math.nan, target))["cross_entropy"])  # not left out


def test_depth_by_hand() -> None:
    prediction = torch.tensor([[[[2.0, 3.0, 1.0, 7.0, -1.0]]]])
    target = torch.tensor([[[[2.0, 4.0, 1.6, 0.0, 1.0]]]])  # the fourth is unknown
    found = measured(Depth(), (prediction, target))
    assert found["abs_error"] == pytest.approx((0 + 1 + 0.6 + 2) / 4)
    assert found["rel_error"] == pytest.approx((0 + 1 / 4 + 0.6 / 1.6 + 2) / 4)
    # ratios 1, 4/3, 1.6, none
    assert found["within_1.25"] == pytest.approx(25)
    assert found["within_1.25^2"] == pytest.approx(50)
    assert found["within_1.25^3"] == pytest.approx(75)
    assert Depth().loss(prediction, target).item() == pytest.approx(3.6 / 4)


def test_normals_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 20.0, 25.0, 90.0])
    radians = angles.deg2rad()
    prediction = 3 * torch.stack([radians.sin(), radians.cos(), 0 * radians]).view(1, 3, 1, 5)
    target = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 6)
    target[..., 5] = 0  # unknown
    prediction = torch.cat([prediction, torch.ones(1, 3, 1, 1)], dim=-1)
    task = Normals(metrics=[*Normals._default, "cosine"])
    found = measured(task, (prediction, target))
    assert found["angle_mean"] == pytest.approx(29, abs=1e-4)
    assert found["angle_median"] == pytest.approx(20, abs=0.011)
    assert found["within_11.25"] == pytest.approx(40)
    assert found["within_22.5"] == pytest.approx(60)
    assert found["within_30"] == pytest.approx(80)
    assert found["cosine"] == pytest.approx(radians.cos().mean().item(), abs=1e-6)
    assert task.loss(prediction, target).item() == pytest.approx(1 - found["cosine"], abs=1e-6)


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
    task = Normals(metrics=[*Normals._default, "cosine"])
    found = measured(task, (prediction, target))
    assert found["angle_mean"] == pytest.approx(angle)
    assert found["angle_median"] == pytest.approx(angle, abs=0.011)
    assert found["cosine"] == cosine
    assert found["within_11.25"] == found["within_22.5"] == found["within_30"] == 0


@pytest.mark.parametrize("task", [Depth(), Normals(), Map()], ids=lambda task: type(task).__name__)
def test_a_target_of_nan_is_unknown_to_the_gradient_too(task: Task) -> None:
    target = F.normalize(torch.ones(1, 3, 2, 2), dim=1)
    target[..., 0] = math.nan
    prediction = torch.rand(1, 3, 2, 2, requires_grad=True)
    task.loss(prediction, target).backward()
    assert prediction.grad.isfinite().all()
    assert not prediction.grad[..., 0].any()
    assert prediction.grad[..., 1].all()


@pytest.mark.filterwarnings("ignore:The ..compute.. method:UserWarning")  # torchmetrics'
def test_angles_of_nothing_are_not_perfect() -> None:
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


def test_maps_by_hand() -> None:
    target = torch.tensor([[[[1.0, -1.0, math.nan]]]])
    prediction = torch.tensor([[[[0.5, 0.5, 9.0]]]], requires_grad=True)
    task = Map()
    loss = task.loss(prediction, target)
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad.flatten().tolist() == [-0.5, 0.5, 0.0]
    assert measured(task, (prediction, target)) == {"abs_error": 1.0}


def test_numbers_and_classes() -> None:
    regression, classes = Regression(), Classification(3)
    prediction, target = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    assert regression.loss(prediction, target) == 2.5
    assert measured(regression, (prediction, target)) == {"abs_error": 1.5}
    logits = torch.eye(3)[[0, 1, 2, 0]]
    assert measured(classes, (logits, torch.tensor([0, 1, 0, 0]))) == {"accuracy": 75.0}


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
    thinned = target[..., ::2, ::2]  # what nearest picks
    torch.testing.assert_close(task.loss(prediction, target), task.loss(prediction, thinned))
    task.update(prediction, target)
    found = task.compute()
    task.reset()
    task.update(F.interpolate(prediction, (8, 8), mode="bilinear", align_corners=False), target)
    assert task.compute() == found
    task.reset()


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
            Normals(metrics=[*Normals._default, "cosine"]),
            (2, 3, 4, 4),
            lambda: F.normalize(torch.randn(2, 3, 8, 8), dim=1),
        ),
        (Map(), (2, 1, 4, 4), lambda: torch.rand(2, 1, 8, 8)),
        (Classification(3), (4, 3), lambda: torch.tensor([0, 1, 2, 0])),
        (Regression(), (4, 2), lambda: torch.rand(4, 2)),
    ],
    ids=["segmentation", "depth", "normals", "map", "classification", "regression"],
)


@EACH
def test_a_loss_does_not_wait_for_the_device(task: Task, prediction: Any, target: Any) -> None:
    outputs, targets = torch.randn(prediction, requires_grad=True), target()
    with refused():
        task.loss(outputs, targets).backward()
    assert outputs.grad.isfinite().all()
    if isinstance(task, Depth | Normals | Map):
        with pytest.raises(AssertionError, match="index"), refused():
            task.update(outputs, targets)  # the test does see a mask
        task.reset()


@EACH
def test_a_test_in_inference_mode_leaves_the_task_as_it_was(
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


def test_class_weights_that_were_cast_in_a_test_can_be_trained_with() -> None:
    task = Segmentation(2, class_weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    logits, target = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    with torch.inference_mode():
        task.loss(logits, target)
    assert task.loss(logits.requires_grad_(), target).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("task", [Depth(), Map(), Normals()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("shape", [(8, 4, 4), (8, 1, 4, 4), (1, 3, 4, 4)], ids=str)
def test_nothing_is_broadcast(task: Task, shape: tuple[int, ...]) -> None:
    prediction, target = torch.rand(8, 3, 4, 4), torch.rand(shape)
    for call in (task.loss, task.update):
        with pytest.raises(ValueError, match=r"the same batch and channels .*\(8, 3, 4, 4\) and"):
            call(prediction, target)


@pytest.mark.parametrize(
    ("task", "nothing"),
    [(Depth(), 0.0), (Normals(), 0.0), (Map(), math.nan)],
    ids=lambda value: type(value).__name__,
)
def test_the_loss_of_nothing_is_nothing(task: Task, nothing: float) -> None:
    prediction = torch.rand(2, 3, 4, 4, requires_grad=True)
    loss = task.loss(prediction, torch.full((2, 3, 4, 4), nothing))
    loss.backward()
    assert loss == 0
    assert not prediction.grad.any()


def test_numbers_may_be_a_slice_of_more() -> None:
    wide = torch.arange(12.0).view(3, 4)
    task = Regression()
    task.update(wide[:, 1:3], wide[:, 2:4])
    assert task.compute() == {"abs_error": 1.0}


@EACH
def test_an_update_reads_nothing_on_the_host(task: Task, prediction: Any, target: Any) -> None:
    """What is valid is picked out, which waits for the device; but no value leaves it."""
    outputs, targets = torch.randn(prediction), target()
    with refused(READS):
        task.update(outputs, targets)
        task.update(outputs, targets)
    with pytest.raises(AssertionError, match="read on the host"), refused(READS):
        task.compute()  # the test does see it
    assert all(math.isfinite(value) for value in task.compute().values())


def test_metrics_are_chosen_by_name() -> None:
    assert Depth(metrics=["abs_error"]).metrics == ("abs_error",)
    with pytest.raises(ValueError, match=r"metrics must be some of .*'abs_error'.*got \['mIoU'\]"):
        Depth(metrics=["mIoU"])
    with pytest.raises(ValueError, match=r"one number for each of 3 classes, got the shape \(2,\)"):
        Segmentation(3, class_weights=torch.ones(2))
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"finite and >= 0, got \[1.0, {wrong}\]"):
            Segmentation(2, class_weights=torch.tensor([1.0, wrong]))


@pytest.mark.parametrize(
    ("task", "lower"),
    [
        (Segmentation(3), set()),
        (Segmentation(3, metrics=["mIoU", "cross_entropy"]), {"cross_entropy"}),
        (Normals(metrics=["angle_mean", "within_30"]), {"angle_mean"}),
        (Map(), {"abs_error"}),
    ],
)
def test_of_the_computed_metrics_only_some_are_better_lower(task: Task, lower: set[str]) -> None:
    assert task.lower_is_better == lower <= set(task.metrics)
