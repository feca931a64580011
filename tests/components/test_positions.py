"""The positions of weights, against PyTorch's counter of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torch_adapmtl import find_components


class Whole(nn.Module):
    """A module as a model of one task."""

    def __init__(self, body: nn.Module, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.body, self._call = body, call

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return {"a": self.body(*inputs) if self._call is None else self._call(self.body, *inputs)}


def positions(model: nn.Module, *inputs: Tensor, **options: Any) -> dict[str, float | None]:
    found = find_components(model, inputs, groups={"a": ["*"]}, **options)
    return {t.name.removeprefix("body."): t.positions for t in found.tensors}


def multiply_adds(model: nn.Module, *inputs: Tensor, **options: Any) -> float:
    """The multiply-adds of the prunable weights for one example, by their positions."""
    found = find_components(model, inputs, groups={"a": ["*"]}, **options)
    return sum(t.positions * t.parameter.numel() for t in found.tensors if t.positions is not None)


def counted(model: nn.Module, *inputs: Tensor) -> float:
    """The multiply-adds of one example, without the products of two activations (`bmm`)."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    flops = counter.get_flop_counts()["Global"]
    products = (torch.ops.aten.bmm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    return sum(n for op, n in flops.items() if op not in products) / 2 / len(inputs[0])


IMAGES = torch.randn(2, 4, 9, 7)
TOKENS = torch.randn(3, 5, 8)
MODULES: dict[str, tuple[nn.Module, Tensor]] = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "stride and dilation": (nn.Conv2d(4, 6, 3, stride=2, dilation=2), IMAGES),
    "groups": (nn.Conv2d(4, 6, (3, 1), groups=2), IMAGES),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), IMAGES),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), IMAGES),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), IMAGES),
    "1d": (nn.Conv1d(5, 3, 2), TOKENS),
    "3d": (nn.Conv3d(2, 3, 2), torch.randn(2, 2, 3, 4, 5)),
    "linear": (nn.Linear(8, 3), torch.randn(4, 8)),
    "linear on tokens": (nn.Linear(8, 3, bias=False), TOKENS),
    "linear on a map": (nn.Linear(7, 3), IMAGES),
    "several": (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2)), IMAGES),
    "twice": (nn.Sequential(*[nn.Linear(8, 8)] * 2), TOKENS),
    "transformer": (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), TOKENS,
    ),
    "gru": (nn.GRU(8, 4, batch_first=True), TOKENS),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_they_are_those_of_the_flop_counter(name: str) -> None:
    module, x = MODULES[name]
    first = (lambda body, x: body(x)[0]) if isinstance(module, nn.GRU) else None
    model = Whole(module, first)
    prunable = {"prunable": {nn.GRU: "weight_*"}}
    assert multiply_adds(model, x, **prunable) == pytest.approx(counted(model, x), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_they_are_those_of_the_flop_counter_in_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = Whole(timm.create_model(name, num_classes=7))
    size = 224 if "vit" in name else 64
    x = torch.randn(2, 3, size, size)
    assert multiply_adds(model, x) == pytest.approx(counted(model, x), rel=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_the_batch_does_not_matter(name: str) -> None:
    module, x = MODULES[name]
    model = Whole(module, (lambda body, x: body(x)[0]) if isinstance(module, nn.GRU) else None)
    prunable = {"prunable": {nn.GRU: "weight_*"}}
    assert positions(model, x, **prunable) == positions(model, x[:1], **prunable)
    assert positions(model, torch.cat([x, x]), **prunable) == positions(model, x, **prunable)


def test_of_a_tensor_whose_weights_are_not_used_alike_they_are_the_mean() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Whole(attention, lambda body, q, k: body(q, k, k)[0])
    found = positions(model, torch.randn(2, 4, 8), torch.randn(2, 10, 8))
    assert found == {"in_proj_weight": (4 + 10 + 10) / 3, "out_proj.weight": 4}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 4)


def _joined(body: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([body.first.weight, body.second.weight]))


def _product(body: Any, x: Tensor) -> Tensor:
    return x @ (body.second.weight @ body.first.weight.t())  # (4, 8)


def _by_hand(body: Any, x: Tensor) -> Tensor:
    scaled = body.first.weight * 2.0
    y = torch.einsum("bti,oi->bto", x, scaled)
    return (y[..., None, :6] * body.second.weight).sum(-1)


def _joined_unevenly(body: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([body.first.weight, body.second.weight])[:7])


CUSTOM: dict[str, tuple[Callable[..., Tensor], int, dict[str, float | None]]] = {
    # The inputs are (3, 5, width).
    "joined": (_joined, 6, {"first.weight": 5, "second.weight": 5}),
    "a part of what is joined": (
        _joined_unevenly, 6, {"first.weight": 5 * 7 / 12, "second.weight": 5 * 7 / 12},
    ),
    # Once for the whole batch, and so a third of 4 and of 8 for each of three examples.
    "a product of weights": (_product, 4, {"first.weight": 4 / 3, "second.weight": 8 / 3}),
    "by hand": (_by_hand, 6, {"first.weight": 5, "second.weight": 5}),
    "unused": (lambda body, x: body.first(x), 6, {"first.weight": 5, "second.weight": None}),
    "looked up": (
        lambda body, x: F.embedding(x.long().clamp(0, 3)[..., 0], body.second.weight)
        + F.linear(body.first(x)[..., :6], body.second.weight)[..., :1], 6,
        {"first.weight": 5, "second.weight": 5},
    ),
    "a product that is not known": (
        lambda body, x: body.first(x).sum() + torch.cdist(x, body.second.weight[None]), 6,
        {"first.weight": 5, "second.weight": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_uses_of_a_weight(name: str) -> None:
    call, width, expected = CUSTOM[name]
    model, x = Whole(Pair(), call), torch.randn(3, 5, width)
    assert positions(model, x) == pytest.approx(expected)
    if name != "a product of weights":  # to the last bit, because checkpoints compare them
        assert positions(model, torch.cat([x, x, x])) == positions(model, x)


def test_a_fused_recurrent_layer_uses_its_weights_at_every_step() -> None:
    model = Whole(nn.LSTM(8, 4, num_layers=2, bidirectional=True), lambda body, x: body(x)[0])
    x = torch.randn(5, 3, 8)  # time comes first, so that the batch is taken for 5 examples
    found = positions(model, x, prunable={nn.LSTM: "weight_*"})
    assert len(found) == 8
    assert set(found.values()) == {5 * 3 / 5}


def test_the_calls_of_several_tasks_add_up() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 8)
            self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})

        def forward(self, x: Tensor, task: str) -> Tensor:
            out: Tensor = self.heads[task](self.body(x))
            return out

    inputs = {"a": (torch.randn(2, 3, 6), "a"), "b": (torch.randn(4, 5, 6), "b")}
    found = find_components(Switched(), task_inputs=inputs)
    assert {t.name: t.positions for t in found.tensors} == {
        "body.weight": 3 + 5,
        "heads.a.weight": 3,
        "heads.b.weight": 5,
    }


def test_what_one_call_hides_is_not_known() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 8, bias=False)

        def forward(self, x: Tensor, task: str) -> Tensor:
            return self.body(x) if task == "a" else torch.cdist(x, self.body.weight)

    x = torch.randn(3, 6)
    found = find_components(Switched(), task_inputs={"a": (x, "a"), "b": (x, "b")})
    assert found.tensors[0].positions is None


def test_layers_that_only_one_mode_uses_are_counted_once() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.always(x)
            return {"a": y if self.training else self.sometimes(y), "b": y}

    found = find_components(Dropped(), torch.randn(2, 3, 6))
    assert {t.name: t.positions for t in found.tensors} == {
        "always.weight": 3,
        "sometimes.weight": 3,
    }
