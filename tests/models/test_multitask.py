"""`MultiTaskModel` over encoders of several libraries."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_adapmtl.models import (
    ASPPHead,
    ClassificationHead,
    DenseHead,
    MultiTaskModel,
    RegressionHead,
    feature_channels,
)

timm = pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny_encoder() -> nn.Module:
    return nn.Conv2d(3, 8, 3, stride=4, padding=1)


DENSE = {
    "timm resnet": lambda: timm.create_model("resnet10t", features_only=True),
    "timm mobilenet": lambda: timm.create_model("mobilenetv3_small_050", features_only=True),
    "timm swin (NHWC)": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        img_size=64,
        embed_dim=24,
        depths=(1, 1, 1, 1),
    ),
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=64, depth=3
    ),
    "SMP resnet": lambda: smp.encoders.get_encoder("resnet18", weights=None),
    "SMP timm": lambda: smp.encoders.get_encoder("tu-mobilenetv3_small_075", weights=None),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_heads_on_timm_and_smp_encoders(name: str) -> None:
    encoder = DENSE[name]()
    channels = feature_channels(encoder)
    heads = {"segmentation": DenseHead(channels, 5, hidden=8), "label": RegressionHead(channels, 2)}
    model = MultiTaskModel(encoder, heads)
    out = model(torch.randn(2, 3, 64, 64))
    assert list(out) == ["segmentation", "label"] == list(model.tasks)
    assert out["segmentation"].shape == (2, 5, 64, 64)
    assert out["label"].shape == (2, 2)
    sum(o.square().mean() for o in out.values()).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


POOLED = [
    "resnet10t",
    "mobilenetv3_small_050",  # its pooled width is not `num_features`
    "convnext_atto",
    "efficientnet_b0",
    "regnetx_002",
    "vit_tiny_patch16_224",
]


@pytest.mark.parametrize("name", POOLED)
def test_pooled_heads_on_timm_encoders(name: str) -> None:
    extra = {"img_size": 64, "depth": 2} if name.startswith("vit") else {}
    encoder = timm.create_model(name, num_classes=0, **extra)
    channels = feature_channels(encoder)
    model = MultiTaskModel(
        encoder, {"left": ClassificationHead(channels, 10), "size": RegressionHead(channels)}
    )
    out = model(torch.randn(2, 3, 64, 64))
    assert out["left"].shape == (2, 10)
    assert out["size"].shape == (2, 1)
    sum(o.square().mean() for o in out.values()).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


def test_outputs_equal_those_of_encoder_and_head() -> None:
    encoder, dense, pooled = tiny_encoder(), DenseHead(8, 3), ClassificationHead(8, 4)
    model = MultiTaskModel(encoder, {"normal": dense, "scene": pooled}).eval()
    x = torch.randn(2, 3, 18, 22)  # not a multiple of the stride
    features = encoder(x)
    expected = F.interpolate(dense(features), (18, 22), mode="bilinear", align_corners=False)
    out = model(x)
    assert torch.equal(out["normal"], expected)
    assert torch.equal(out["scene"], pooled(features))
    small = MultiTaskModel(encoder, {"normal": dense, "scene": pooled}, resize=False).eval()
    assert torch.equal(small(x)["normal"], dense(features))


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.second(first)


class _Pooled(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.cat([f.mean((2, 3)) for f in features], dim=1)


def test_heads_take_the_feature_map_of_this_index() -> None:
    x = torch.randn(2, 3, 16, 16)
    head = nn.Identity()
    encoder = _Pyramid()
    for feature, channels in ((-1, 6), (0, 4), (1, 6)):
        model = MultiTaskModel(encoder, {"a": head}, feature=feature, resize=False)
        assert model(x)["a"].shape[1] == channels
    assert MultiTaskModel(encoder, {"a": _Pooled()}, feature=None)(x)["a"].shape == (2, 10)
    with pytest.raises(ValueError, match=r"feature=2 is out of range.*2 feature map"):
        MultiTaskModel(encoder, {"a": head}, feature=2)(x)


def test_smp_decoders_as_heads() -> None:
    unet = smp.Unet("resnet18", encoder_weights=None, classes=4)
    heads = {
        "segmentation": nn.Sequential(unet.decoder, unet.segmentation_head),
        "depth": nn.Sequential(copy.deepcopy(unet.decoder), copy.deepcopy(unet.segmentation_head)),
    }
    model = MultiTaskModel(unet.encoder, heads, feature=None).eval()
    x = torch.randn(1, 3, 64, 64)
    out = model(x)
    assert torch.equal(out["segmentation"], unet.eval()(x))
    assert out["depth"].shape == (1, 4, 64, 64)


def test_the_same_head_for_two_tasks_is_shared() -> None:
    head = DenseHead(8, 2)
    model = MultiTaskModel(tiny_encoder(), {"a": head, "b": head})
    assert count(model) == count(tiny_encoder()) + count(head)


def test_copies_pickles_and_state_dicts() -> None:
    model = MultiTaskModel(
        tiny_encoder(), {"a": ASPPHead(8, 2, hidden=4, dilations=(1, 2)), "b": RegressionHead(8)}
    ).eval()
    x = torch.randn(1, 3, 16, 16)
    loaded = MultiTaskModel(
        tiny_encoder(), {"a": ASPPHead(8, 2, hidden=4, dilations=(1, 2)), "b": RegressionHead(8)}
    ).eval()
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        for task, out in model(x).items():
            assert torch.equal(out, other(x)[task])


@pytest.mark.parametrize("task", ["shared", "unused", "frozen", "a+b", "a.b", ""])
def test_reserved_task_names_are_refused(task: str) -> None:
    with pytest.raises(ValueError, match=f"heads: '{re.escape(task)}' cannot be a task name"):
        MultiTaskModel(tiny_encoder(), {task: DenseHead(8, 1)})


def test_heads_may_come_in_a_module_dict() -> None:
    heads = nn.ModuleDict({"a": DenseHead(8, 2), "b": RegressionHead(8)})
    model = MultiTaskModel(tiny_encoder(), heads)
    assert list(model(torch.randn(1, 3, 16, 16))) == ["a", "b"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'keys' cannot be a task name: .*has an attribute"):
        MultiTaskModel(tiny_encoder(), {"keys": DenseHead(8, 1)})
    with pytest.raises(ValueError, match="heads is empty"):
        MultiTaskModel(tiny_encoder(), {})
    with pytest.raises(TypeError, match=r"heads must be a mapping.*list"):
        MultiTaskModel(tiny_encoder(), [DenseHead(8, 1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be strings, got 3"):
        MultiTaskModel(tiny_encoder(), {3: DenseHead(8, 1)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"heads\['a'\] must be a torch.nn.Module, got str"):
        MultiTaskModel(tiny_encoder(), {"a": "head"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"encoder must be a torch.nn.Module, got str"):
        MultiTaskModel("resnet18", {"a": DenseHead(8, 1)})  # type: ignore[arg-type]

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": x}

    with pytest.raises(TypeError, match=r"encoder must return a tensor or a list.*dict"):
        MultiTaskModel(Odd(), {"a": DenseHead(3, 1)})(torch.zeros(1, 3, 8, 8))
