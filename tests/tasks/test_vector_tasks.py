"""Classification and regression, by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")

from measuring import measured

from torch_adapmtl.tasks import Classification, Regression


def test_numbers_and_classes() -> None:
    regression, classes = Regression(), Classification(3)
    prediction, target = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    assert regression.loss(prediction, target) == 2.5
    assert measured(regression, (prediction, target)) == {"abs_error": 1.5}
    logits = torch.eye(3)[[0, 1, 2, 0]]
    assert measured(classes, (logits, torch.tensor([0, 1, 0, 0]))) == {"accuracy": 75.0}


def test_numbers_may_be_a_slice_of_more() -> None:
    wide = torch.arange(12.0).view(3, 4)
    task = Regression()
    task.update(wide[:, 1:3], wide[:, 2:4])
    assert task.compute() == {"abs_error": 1.0}
