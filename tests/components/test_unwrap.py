"""Wrappers around a model and inside it."""

from __future__ import annotations

import pytest
import torch
from awkward import Net
from finding import detected
from torch import nn

from torch_adapmtl.components.find import SHARED, unwrap


def test_unwrap_and_detection_through_wrappers() -> None:
    model = Net()
    for wrap in (torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))):
        wrapped = wrap(model)
        assert unwrap(wrapped) is model
        assert detected(wrapped) == detected(model)


def test_compiled_in_place_and_inside() -> None:
    model = Net()
    model.compile(backend="eager", fullgraph=True)
    model.body = torch.compile(model.body, backend="eager", fullgraph=True)
    found = detected(model, groups={"shared": ["body.0"]})
    assert found["body._orig_mod.0.weight"] == found["body._orig_mod.2.weight"] == SHARED
    assert found["heads.a.weight"] == "a"


@pytest.mark.usefixtures("process_group")
def test_ddp_is_looked_through() -> None:
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert unwrap(torch.compile(wrapped)) is model
    assert detected(wrapped) == detected(model)
