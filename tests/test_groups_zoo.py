"""Components of real models: timm, segmentation-models-pytorch, torchvision and transformers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_adapmtl.groups import SHARED, UNUSED, Components, find_components

# Where a model permits, it is made for images of 64 pixels; the others insist on their size.
SMALL = {"img_size": 64}
BACKBONES: dict[str, dict[str, Any]] = {
    "convnext_atto": {},
    "coat_tiny": {},  # modules under two names
    "crossvit_tiny_240": {},  # works out class tokens that it drops
    "deit_tiny_distilled_patch16_224": SMALL,
    "densenet121": {},
    "dla46_c": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "fastvit_t8": {},
    "ghostnet_050": {},
    "levit_128s": {},
    "mixer_s32_224": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "pit_ti_224": {},
    "poolformer_s12": {},
    "regnetx_002": {},
    "resnet10t": {},
    "rexnet_100": {},
    "tiny_vit_5m_224": {},
    "vit_tiny_patch16_224": SMALL,
    "xcit_nano_12_p16_224": {},
}
NOT_DENSE = (
    "coat_tiny",
    "crossvit_tiny_240",
    "mixer_s32_224",
    "pit_ti_224",
)  # give no feature maps
PAIRS = [(name, dense) for name in BACKBONES for dense in (False, True)]


class Heads(nn.Module):
    """An encoder and one small head per task, linear or of 1x1 convolutions."""

    def __init__(self, encoder: nn.Module, width: int, dense: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.dense = dense
        self.heads = nn.ModuleDict(
            {
                task: nn.Conv2d(width, out, 1) if dense else nn.Linear(width, out)
                for task, out in (("seg", 4), ("depth", 1), ("normal", 3))
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        if self.dense:
            features = features[-1]
        elif isinstance(features, tuple):
            features = features[0]
        return {task: head(features) for task, head in self.heads.items()}


def by_task(components: Components) -> dict[str, list[str]]:
    names = {t: [tensor.name for tensor in components[t]] for t in (*components.names, UNUSED)}
    return {component: found for component, found in names.items() if found}


def backbone(name: str, dense: bool) -> Heads:
    timm = pytest.importorskip("timm")
    kind = {"features_only": True} if dense else {"num_classes": 0}
    encoder = timm.create_model(name, **kind, **BACKBONES[name])
    width = encoder.feature_info.channels()[-1] if dense else encoder.head_hidden_size
    return Heads(encoder, width, dense)


def fill(model: nn.Module, parameter: nn.Parameter, x: Tensor) -> dict[str, Tensor]:
    """The outputs with `parameter` set to NaN."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
        outputs = model.eval()(x)
        parameter.copy_(before)
    return dict(outputs)


@pytest.mark.parametrize(
    ("name", "dense"), [pair for pair in PAIRS if pair[0] not in NOT_DENSE or not pair[1]]
)
def test_timm_backbones(name: str, dense: bool) -> None:
    model = backbone(name, dense)
    components = find_components(model)
    found = by_task(components)
    unused = found.pop(UNUSED, [])
    assert components.tasks == ("seg", "depth", "normal")
    assert all(tensor.startswith("encoder.") for tensor in [*found.pop(SHARED), *unused])
    assert found == {task: [f"heads.{task}.weight"] for task in components.tasks}
    # What it cannot see by itself: whether "unused" is true.
    if unused:
        size = BACKBONES[name].get("img_size") or model.encoder.pretrained_cfg["input_size"][1]
        x = torch.randn(1, 3, size, size)
        for tensor in components[UNUSED][:3]:
            outputs = fill(model, tensor.parameter, x)
            assert not any(output.isnan().any() for output in outputs.values()), tensor.name
    copy.deepcopy(model)


def test_distilled_heads_are_apart() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=3)
    model.set_distilled_training(True)
    found = by_task(find_components(model))
    assert found.pop(SHARED)
    assert found == {"0": ["head.weight"], "1": ["head_dist.weight"]}


def test_timm_encoder_inside_wrappers_and_with_other_channels() -> None:
    timm = pytest.importorskip("timm")
    model = Heads(timm.create_model("resnet10t", num_classes=0, in_chans=5), 512, dense=False)
    found = by_task(find_components(torch.compile(nn.DataParallel(model))))
    assert list(found) == [SHARED, "seg", "depth", "normal"]


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "tnt_s_patch16_224", "visformer_tiny"])
def test_the_size_a_timm_encoder_was_made_for_is_found(name: str) -> None:
    timm = pytest.importorskip("timm")  # they keep it in a stem, a pixel embedding, themselves
    encoder = timm.create_model(name, num_classes=0, img_size=64)
    model = Heads(encoder, encoder.head_hidden_size, dense=False)
    assert SHARED in find_components(model)


def test_an_encoder_that_is_not_enough() -> None:
    timm = pytest.importorskip("timm")

    class Two(Heads):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return super().forward(x)

    model = Two(timm.create_model("resnet10t", num_classes=0), 512, dense=False)
    match = r"images of 2x3x176x176, made for its encoder encoder \(ResNet\).*pass example_inputs="
    with pytest.raises(RuntimeError, match=match):
        find_components(model)


SMP = [
    ("Unet", {}), ("UnetPlusPlus", {}), ("MAnet", {}), ("Linknet", {}), ("FPN", {}), ("PSPNet", {}),
    ("PAN", {}), ("DeepLabV3", {}), ("DeepLabV3Plus", {}), ("UPerNet", {}), ("Segformer", {}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "options"), SMP, ids=[name for name, _ in SMP])
def test_smp_with_a_label_beside_the_mask(architecture: str, options: dict[str, Any]) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, architecture)(
        "resnet18", encoder_weights=None, classes=4, aux_params={"classes": 3}, **options
    )
    components = find_components(model, task_outputs=["mask", "label"])
    parts = {
        component: {name.split(".")[0] for name in names}
        for component, names in by_task(components).items()
    }
    assert parts.pop("label") <= {"classification_head", "encoder"}
    assert parts.pop("mask") == {"decoder", "segmentation_head"}
    if architecture == "PSPNet":  # reads stage 3 only; the label alone needs the others
        parts.pop(SHARED)
    else:
        assert parts.pop(SHARED) == {"encoder"}
    assert parts in ({}, {UNUSED: {"encoder"}}, {UNUSED: {"decoder"}})


class Decoders(nn.Module):
    """One SMP encoder with a decoder and a head per task."""

    def __init__(self, encoder: str) -> None:
        super().__init__()
        smp = pytest.importorskip("segmentation_models_pytorch")
        self.encoder = smp.encoders.get_encoder(encoder, in_channels=4, weights=None)
        tasks = {"seg": 5, "depth": 1}
        whole = {t: smp.Unet(encoder, encoder_weights=None, classes=c) for t, c in tasks.items()}
        self.decoders = nn.ModuleDict({task: model.decoder for task, model in whole.items()})
        self.heads = nn.ModuleDict({t: model.segmentation_head for t, model in whole.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        return {t: self.heads[t](self.decoders[t](features)) for t in self.decoders}


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenet_v2", "tu-mobilenetv3_small_050"])
def test_smp_encoder_with_several_decoders(encoder: str) -> None:
    model = Decoders(encoder)
    found = by_task(find_components(model))
    unused = found.pop(UNUSED, [])
    assert {name.split(".")[0] for name in [*found.pop(SHARED), *unused]} == {"encoder"}
    for task in ("seg", "depth"):
        prefixes = {".".join(name.split(".")[:2]) for name in found.pop(task)}
        assert prefixes == {f"decoders.{task}", f"heads.{task}"}
    assert not found


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"]
)
def test_torchvision_segmentation(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **auxiliary)
    x = torch.randn(2, 3, 64, 64)
    if not auxiliary:
        with pytest.raises(ValueError, match=r"one output \('out'\) only"):
            find_components(model, x)
        return
    parts = {
        component: {name.split(".")[0] for name in names}
        for component, names in by_task(find_components(model, x)).items()
    }
    assert parts == {
        "shared": {"backbone"},
        "out": {"backbone", "classifier"},  # the auxiliary head reads the third of four stages
        "aux": {"aux_classifier"},
    }


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_auxiliary_classifiers(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model(name, weights=None, init_weights=False, num_classes=3).eval()
    size = 299 if name == "inception_v3" else 224
    components = find_components(model, torch.randn(2, 3, size, size))
    assert components.tasks[0] == "logits"
    assert [t.name for t in components["logits"]][-1] == "fc.weight"
    assert UNUSED not in components


def test_bert_with_two_heads_and_a_tied_embedding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForPreTraining(config)
    inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8).long()}
    found = by_task(find_components(model, inputs))
    # Tied to the embedding, so both tasks need it; the pooler serves the second task alone.
    assert "bert.embeddings.word_embeddings.weight" in found[SHARED]
    assert found["prediction_logits"] == ["cls.predictions.transform.dense.weight"]
    assert found["seq_relationship_logits"] == [
        "bert.pooler.dense.weight",
        "cls.seq_relationship.weight",
    ]
    labels = {**inputs, "labels": inputs["input_ids"], "next_sentence_label": torch.zeros(2).long()}
    assert by_task(find_components(model, labels)) == found


def test_transformers_with_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (2, 8))}
    plain = by_task(find_components(transformers.BertForPreTraining(config), inputs))
    for reentrant in (True, False):
        model = transformers.BertForPreTraining(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is about to be renamed
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert by_task(find_components(model, inputs)) == plain
