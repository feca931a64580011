"""What the tests of components have in common."""

from __future__ import annotations

from typing import Any

import awkward
import pytest
import torch
from torch import nn

from torch_adapmtl import Components, find_components

X = torch.linspace(-1, 1, 2 * awkward.WIDTH).view(2, awkward.WIDTH)
each_case = pytest.mark.parametrize("case", awkward.ZOO, ids=lambda case: case.name)


def by_name(components: Components) -> dict[str, str]:
    """The component of each tensor."""
    return {tensor.name: tensor.component for tensor in components.tensors}


def detected(model: nn.Module, inputs: Any = X, **options: Any) -> dict[str, str]:
    """The component of each tensor of a model."""
    return by_name(find_components(model, inputs, **options))
