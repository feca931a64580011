"""MultiTaskModel over encoders of several libraries, the heads, and the paper's networks."""

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
    dilated_mobilenet_v2,
    dilated_resnet34,
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
    assert encoder_reached(encoder)


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
    assert encoder_reached(encoder)


def encoder_reached(encoder: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


def test_outputs_are_those_of_the_parts() -> None:
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


class _Both(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.cat([f.mean((2, 3)) for f in features], dim=1)


def test_feature_picks_what_the_heads_get() -> None:
    x = torch.randn(2, 3, 16, 16)
    head = nn.Identity()
    encoder = _Pyramid()
    for feature, channels in ((-1, 6), (0, 4), (1, 6)):
        model = MultiTaskModel(encoder, {"a": head}, feature=feature, resize=False)
        assert model(x)["a"].shape[1] == channels
    assert MultiTaskModel(encoder, {"a": _Both()}, feature=None)(x)["a"].shape == (2, 10)
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


def test_a_head_given_twice_is_shared() -> None:
    head = DenseHead(8, 2)
    model = MultiTaskModel(tiny_encoder(), {"a": head, "b": head})
    assert count(model) == count(tiny_encoder()) + count(head)


def test_survives_copy_pickle_and_state_dict() -> None:
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
def test_what_a_task_may_not_be_called(task: str) -> None:
    with pytest.raises(ValueError, match=f"heads: '{re.escape(task)}' cannot be a task name"):
        MultiTaskModel(tiny_encoder(), {task: DenseHead(8, 1)})


def test_heads_may_come_in_a_module_dict() -> None:
    heads = nn.ModuleDict({"a": DenseHead(8, 2), "b": RegressionHead(8)})
    model = MultiTaskModel(tiny_encoder(), heads)
    assert list(model(torch.randn(1, 3, 16, 16))) == ["a", "b"]


def test_errors_of_the_model() -> None:
    with pytest.raises(ValueError, match="'keys' in heads is an attribute"):
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


def aspp_plainly(head: ASPPHead, x: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """The paper's head from its weights, without its modules."""
    p = dict(head.named_parameters())
    total = torch.zeros(())
    for k, d in enumerate(dilations):
        names = [f"branches.{k}.{i}" for i in (0, 3, 6)]
        (w1, b1), (w2, b2), (w3, b3) = ((p[n + ".weight"], p[n + ".bias"]) for n in names)
        hidden = F.conv2d(x, w1, b1, padding=d, dilation=d).clamp(min=0)
        hidden = (torch.einsum("oi,bihw->bohw", w2[:, :, 0, 0], hidden) + b2[:, None, None]).clamp(
            min=0
        )
        total = total + torch.einsum("oi,bihw->bohw", w3[:, :, 0, 0], hidden) + b3[:, None, None]
    return total


@pytest.mark.parametrize("dilations", [(6, 12, 18, 24), (1,), (1, 3)])
def test_aspp_head_is_the_formula(dilations: tuple[int, ...]) -> None:
    head = ASPPHead(5, 3, hidden=7, dilations=dilations).double().eval()
    x = torch.randn(2, 5, 13, 11, dtype=torch.float64)
    torch.testing.assert_close(head(x), aspp_plainly(head, x, dilations))


def test_aspp_head_drops_only_in_training() -> None:
    head = ASPPHead(4, 2, hidden=16, dilations=(1, 2), dropout=0.5)
    x = torch.randn(1, 4, 5, 5)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


def test_sizes_of_the_papers_head() -> None:
    # Four branches: 3x3 to 1,024, 1x1 to 1,024, 1x1 to the output, each with biases.
    with torch.device("meta"):
        for channels, out in ((512, 40), (512, 3), (1280, 1)):
            expected = 4 * (9 * channels * 1024 + 1024 + 1024**2 + 1024 + 1024 * out + out)
            assert count(ASPPHead(channels, out)) == expected


def test_sizes_of_the_papers_resnet34_model() -> None:
    encoder = dilated_resnet34()
    assert count(encoder) == 21_284_672  # ResNet34 without its classifier
    with torch.device("meta"):
        heads = {"seg": ASPPHead(512, 40), "normal": ASPPHead(512, 3), "depth": ASPPHead(512, 1)}
    model = MultiTaskModel(encoder, heads)
    assert count(model) == 90_695_664  # "90.7 M": 77 % of it in the heads


def test_dilated_resnet34_has_the_papers_strides_and_dilations() -> None:
    encoder = dilated_resnet34()
    for stage, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], start=1):
        layer = encoder.get_submodule(f"layer{stage}")
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
        spatial = [m for m in convs if m.kernel_size == (3, 3)]
        assert spatial[0].stride == (stride, stride)
        assert all(m.stride == (1, 1) for m in spatial[1:])
        assert {m.dilation for m in spatial} == {m.padding for m in spatial} == {(dilation,) * 2}
        pointwise = [m for m in convs if m.kernel_size == (1, 1)]
        assert all(m.stride == (stride, stride) for m in pointwise)
    with torch.no_grad():
        (features,) = encoder.eval()(torch.randn(1, 3, 65, 65))
    assert features.shape == (1, 512, 9, 9)


def test_dilated_mobilenet_v2() -> None:
    x = torch.randn(1, 3, 64, 64)
    encoders = {stride: dilated_mobilenet_v2(output_stride=stride).eval() for stride in (8, 16, 32)}
    for stride, encoder in encoders.items():
        with torch.no_grad():
            assert encoder(x).shape == (1, 1280, 64 // stride, 64 // stride)
        assert count(encoder) == 2_223_872  # MobileNetV2 without its classifier
    assert feature_channels(encoders[8]) == 1280


def test_encoders_take_other_images() -> None:
    with torch.no_grad():
        assert dilated_resnet34(in_chans=1).eval()(torch.zeros(1, 1, 32, 32))[0].shape[1] == 512
        assert dilated_mobilenet_v2(4).eval()(torch.zeros(1, 4, 32, 32)).shape[1] == 1280


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 6, 4, 3)])
def test_pooled_heads_average_positions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    mean = {2: lambda: x, 3: lambda: x.mean(1), 4: lambda: x.flatten(2).mean(2)}[x.ndim]()
    for head, width in ((RegressionHead(6), 1), (ClassificationHead(6, 4), 4)):
        out = head(x)
        assert out.shape == (2, width)
        torch.testing.assert_close(out, mean @ head.linear.weight.T + head.linear.bias)


def test_errors_of_the_parts() -> None:
    with pytest.raises(ValueError, match="in_channels must be an integer >= 1, got 0"):
        ASPPHead(0, 1)
    with pytest.raises(ValueError, match=r"dilations must be one or more.*\(0, 1\)"):
        ASPPHead(1, 1, dilations=(0, 1))
    with pytest.raises(ValueError, match="dilations must be one or more"):
        ASPPHead(1, 1, dilations=())
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        ASPPHead(1, 1, dropout=1)
    with pytest.raises(ValueError, match="hidden must be"):
        DenseHead(1, 1, hidden=0)
    with pytest.raises(ValueError, match="num_classes must be"):
        ClassificationHead(1, 0)
    with pytest.raises(ValueError, match="out_features must be"):
        RegressionHead(1, 0)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        dilated_mobilenet_v2(output_stride=4)
    with pytest.raises(ValueError, match="in_chans must be"):
        dilated_resnet34(0)
    with pytest.raises(ValueError, match="Linear does not say how many channels"):
        feature_channels(nn.Linear(1, 1))


def test_the_error_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[models\]"'):
        dilated_resnet34()
