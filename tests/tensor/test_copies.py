"""Modules with a soft threshold: their outputs, their copies, and the way back to plain ones."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from thresholding import ALPHA, COPIERS, Copier, holder, original, put
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

copiers = pytest.mark.parametrize("copier", COPIERS, ids=["deepcopy", "pickle", "torch.save"])

# Each module, the tensors in it to prune, and inputs.
CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(4, 3), ["weight"], [(2, 4)]),
    "bias": (lambda: nn.Linear(4, 3), ["bias", "weight"], [(2, 4)]),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2), ["weight"], [(2, 4, 5)]),
    "conv2d": (lambda: nn.Conv2d(4, 4, 2, groups=2), ["weight", "bias"], [(2, 4, 5, 5)]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), ["weight"], [(2, 2, 3, 3, 3)]),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), ["weight"], [(2, 2, 3, 3)]),
    "lstm": (
        lambda: nn.LSTM(4, 3, 2, bidirectional=True),
        ["weight_hh_l0", "weight_ih_l1", "bias_ih_l0"],
        [(5, 2, 4)],
    ),
    "gru": (lambda: nn.GRU(4, 3), ["weight_ih_l0", "weight_hh_l0"], [(5, 2, 4)]),
    "cell": (lambda: nn.GRUCell(4, 3), ["weight_hh", "weight_ih"], [(2, 4)]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight"], [(3, 2, 4)] * 3),
    "out_proj": (lambda: nn.MultiheadAttention(4, 2), ["out_proj.weight"], [(3, 2, 4)] * 3),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        ["self_attn.in_proj_weight", "linear1.weight", "self_attn.out_proj.weight"],
        [(2, 3, 4)],
    ),
}
cases = pytest.mark.parametrize("case", CASES)
# With the mark of torch.nn.utils.prune, and bare (no hook: the fast paths stay open).
attachments = pytest.mark.parametrize("marked", [True, False], ids=["marked", "bare"])


def baked(module: nn.Module, names: list[str], alpha: float = ALPHA) -> nn.Module:
    """The oracle: a plain module that holds the sparse tensors."""
    module = copy.deepcopy(module)
    for name in names:
        parameter = module.get_parameter(name)
        parameter.data = parameter.sign() * (parameter.abs() - alpha).relu()
    return module


def run(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    output = module(*inputs)
    parts = output if isinstance(output, tuple) else (output,)
    return [t for part in parts for t in (part if isinstance(part, tuple) else (part,))]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@cases
@attachments
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_baked_module(case: str, marked: bool, training: bool) -> None:
    make, names, shapes = CASES[case]
    module, inputs = make().train(training), [torch.randn(shape) for shape in shapes]
    oracle = baked(module, names)
    for name in names:
        put(module, name, marked=marked)
    # Attention's fast path in evaluation rounds differently from its slow path, which hooks choose.
    close = {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(run(module, *inputs), run(oracle, *inputs), strict=True):
        torch.testing.assert_close(a, b, **close)
    with torch.no_grad():
        for a, b in zip(run(module, *inputs), run(oracle, *inputs), strict=True):
            torch.testing.assert_close(a, b, **close)
    run(module, *inputs)[0].square().sum().backward()
    run(oracle, *inputs)[0].square().sum().backward()
    for name in names:
        owner, last = holder(module, name)
        parameter = original(owner, last)
        kept = parameter.abs() >= ALPHA
        torch.testing.assert_close(parameter.grad, oracle.get_parameter(name).grad * kept, **close)


@cases
@copiers
@pytest.mark.parametrize("after_forward", [False, True])
def test_copies_are_independent(case: str, copier: Copier, after_forward: bool) -> None:
    make, names, shapes = CASES[case]
    module, inputs = make().eval(), [torch.randn(shape) for shape in shapes]
    plain_keys, plain_types = list(module.state_dict()), [type(m) for m in module.modules()]
    for name in names:
        put(module, name)
    before = run(module, *inputs)
    other = copier(module)
    if after_forward:
        run(other, *inputs)
        other = copier(other)
    for name in names:  # one of the two goes back to plain: the other must not notice
        prune.remove(*holder(other, name))
    assert list(other.state_dict()) == plain_keys
    assert [type(m) for m in other.modules()] == plain_types
    assert not prune.is_pruned(other)
    assert prune.is_pruned(module)
    assert_same(run(module, *inputs), before)
    assert {p.data_ptr() for p in module.parameters()}.isdisjoint(
        p.data_ptr() for p in other.parameters()
    )
    reference = copy.deepcopy(other)  # a plain module again, in every way
    for a, b in zip(run(reference, *inputs), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name in names:
        prune.remove(*holder(module, name))
    assert list(module.state_dict()) == plain_keys


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: nn.LSTM(2, 2)])
def test_any_order_of_attaching_and_removing(make: Callable[[], nn.Module]) -> None:
    plain = make()
    keys, identities = list(plain._parameters), [id(p) for p in plain.parameters()]
    orders = list(itertools.permutations(keys))
    for attaching, removing in zip(orders, orders[7:] + orders[:7], strict=True):
        for name in attaching:
            put(plain, name)
        for i, name in enumerate(removing):
            parameter = original(plain, name)
            prune.remove(plain, name)
            assert plain._parameters[name] is parameter
            assert all(parametrize.is_parametrized(plain, other) for other in removing[i + 1 :])
        assert list(plain._parameters) == keys
        assert [id(p) for p in plain.parameters()] == identities
        assert type(plain) in (nn.Linear, nn.LSTM)
        assert "parametrizations" not in plain._modules


def test_other_process_can_load_the_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))
    put(put(module, "0.weight"), "1.weight_hh_l0")
    x = torch.randn(5, 4)
    torch.save((module, x, run(module, x)), tmp_path / "whole.pt")
    script = """
import sys, torch
module, x, before = torch.load(sys.argv[1], weights_only=False)
output, (h, c) = module(x)
assert all(torch.equal(a, b) for a, b in zip((output, h, c), before))
prune = torch.nn.utils.prune
assert prune.is_pruned(module)
prune.remove(module[0], "weight"), prune.remove(module[1], "weight_hh_l0")
assert torch.equal(module(x)[0], output) and not prune.is_pruned(module)
assert type(module[1]) is torch.nn.LSTM
"""
    command = [sys.executable, "-c", script, str(tmp_path / "whole.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class OwnState(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.seen = self.__dict__.pop("note")


class OwnDeepcopy(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> OwnDeepcopy:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo), copied=True)
        return new


class Slotted(nn.Linear):
    __slots__ = ("extra",)


@pytest.mark.parametrize("kind", [OwnState, OwnDeepcopy, Slotted])
@copiers
def test_classes_with_ideas_of_their_own(kind: type[nn.Linear], copier: Copier) -> None:
    module = put(put(kind(4, 3), "weight"), "bias")
    other = copier(module)
    if kind is OwnState:
        assert other.seen == "saved"
    if kind is OwnDeepcopy and copier is copy.deepcopy:
        assert other.copied
    x = torch.randn(2, 4)
    before = run(module, x)
    prune.remove(other, "bias")
    assert_same(run(module, x), before)
    prune.remove(other, "weight")
    assert type(other) is kind
    assert_same(run(module, x), before)
    assert_same(run(other, x), before)
    with pytest.raises(RuntimeError, match="cannot apply RandomUnstructured to 'weight'"):
        prune.random_unstructured(copier(module), "weight", 0.5)
