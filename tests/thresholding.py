"""Attaching thresholds, and the ways of copying a module, for several test files."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_adapmtl import SoftThreshold, soft_threshold_unstructured

ALPHA = 0.1
Copier = Callable[[nn.Module], nn.Module]


def reload(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIERS: list[Copier] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reload]


def holder(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def put(module: nn.Module, name: str, alpha: float = ALPHA, marked: bool = True) -> nn.Module:
    """Attach a threshold: with the mark of `torch.nn.utils.prune`, or bare."""
    owner, last = holder(module, name)
    if marked:
        soft_threshold_unstructured(owner, last, alpha)
    else:
        parametrize.register_parametrization(owner, last, SoftThreshold(alpha))
    return module


def threshold_of(module: nn.Module, name: str = "weight") -> SoftThreshold:
    chains: Any = module.parametrizations
    return chains[name][0]


def original(module: nn.Module, name: str = "weight") -> nn.Parameter:
    chains: Any = module.parametrizations
    return chains[name].original
