"""timm's encoders under three heads, pooled or as feature maps, and its two-headed models."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry, Heads, below_heads, images

# Options that make a model of four stages, or one of equal blocks, small.
RESNET = {"channels": (16, 32, 64, 128)}
SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
VIT = {"img_size": 64, "depth": 2, "embed_dim": 96}
META = {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)}
MIXER = {"img_size": 64, "num_blocks": 2, "embed_dim": 64, "num_classes": 0}


def create(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def cls(path: str) -> Any:
    """A class of timm's by its place among the models, such as `volo.VOLO`."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"timm.models.{module}"), name)


def over(encoder: nn.Module) -> Heads:
    return Heads(encoder, encoder.head_hidden_size)


def over_maps(encoder: nn.Module) -> Heads:
    return Heads(encoder, encoder.feature_info.channels()[-1], dense=True)


def pooled(
    name: str, family: str, size: int = 32, exclude: Collection[str] = (), **options: Any
) -> Entry:
    """A timm encoder that gives a vector for each image, under linear heads."""

    def make() -> nn.Module:
        return over(create(name, num_classes=0, **options))

    return Entry(
        f"{name}-pooled", family, make, partial(images, size), below_heads(), "timm",
        {"exclude": exclude}, given=False,
    )  # fmt: skip


def features(
    name: str, family: str, size: int = 32, unused: Collection[str] = (), **options: Any
) -> Entry:
    """A timm encoder that gives feature maps, of which the heads read the last."""

    def make() -> nn.Module:
        return over_maps(create(name, features_only=True, **options))

    expected = below_heads(unused=unused)
    return Entry(
        f"{name}-features", family, make, partial(images, size), expected, "timm", given=False
    )


def built(name: str, family: str, path: str, size: int = 64, **options: Any) -> Entry:
    """An encoder smaller than any that timm has a name for; it does not say what it takes."""

    def make() -> nn.Module:
        return over(cls(path)(**options))

    return Entry(f"{name}-pooled", family, make, partial(images, size), below_heads(), "timm")


def distilled(
    name: str,
    family: str,
    size: int,
    heads: tuple[str, str] = ("head", "head_dist"),
    **options: Any,
) -> Entry:
    """A classifier with a second head that learns from a teacher.

    In eval mode it gives the mean of the two. The heads read tokens of their own or one vector,
    but all layers see both.
    """

    def make() -> nn.Module:
        model = create(name, num_classes=3, **options)
        model.set_distilled_training(True)
        return model

    return Entry(
        f"{name}-distilled", family, make, partial(images, size),
        {"shared": ("*",), "label": heads[:1], "teacher": heads[1:]},
        "timm", {"task_outputs": ["label", "teacher"]}, given=False,
    )  # fmt: skip


class Scales(nn.Module):
    """A task on the second feature map and one on the last: the stages between are its own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        _, near, *_, far = encoder.feature_info.channels()
        self.edges, self.scene = nn.Conv2d(near, 1, 1), nn.Linear(far, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, near, *_, far = self.encoder(x)
        return {"edges": self.edges(near), "scene": self.scene(far.mean((2, 3)))}


def scales(
    name: str, size: int, first: Collection[str], later: Collection[str], **options: Any
) -> Entry:
    def make() -> nn.Module:
        return Scales(create(name, features_only=True, **options))

    expected = {
        "shared": [f"encoder.{part}" for part in first],
        "edges": ["edges"],
        "scene": ["scene", *(f"encoder.{part}" for part in later)],
    }
    return Entry(f"{name}-scales", CONV, make, partial(images, size), expected, "timm", given=False)


class TokenLabels(nn.Module):
    """VOLO as it is trained: a class token, and labels for all the other tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = cls("volo.VOLO")(**options)

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.body(x)
        token, labels, _ = self.body.forward_train(x)
        return {"class": self.body.head(token), "labels": labels}


CONV = "timm, convolutional"
CONVOLUTIONAL = (
    pooled("resnet10t", CONV),
    features("resnet18", CONV, **RESNET),
    pooled("seresnet18", CONV, **RESNET),
    pooled("skresnet18", CONV, **RESNET),
    pooled("resnext50_32x4d", CONV, layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)),
    pooled("res2net50_14w_8s", CONV, layers=(1, 1, 1, 1)),
    pooled("resnetv2_18", CONV, channels=(32, 64, 96, 128)),
    pooled("resnest14d", CONV),
    pooled("convnext_atto", CONV),
    features("convnext_atto", CONV),
    pooled("convnextv2_atto", CONV),
    features("densenet121", CONV, growth_rate=8, block_config=(2, 2, 2, 2)),
    features("dla46_c", CONV, 64),
    pooled("efficientnet_lite0", CONV),
    features("mixnet_s", CONV),
    pooled("mobilenetv2_035", CONV),
    pooled("mobilenetv3_small_050", CONV),
    features("mobilenetv3_small_050", CONV),
    features("mobilenetv4_conv_small_050", CONV),
    features("ghostnet_050", CONV),
    pooled("regnetx_002", CONV),
    features("regnety_002", CONV),
    pooled("rexnet_100", CONV),
    pooled("lcnet_035", CONV),
    features("ese_vovnet19b_slim_dw", CONV),
    pooled("mobileone_s0", CONV),
    pooled("starnet_s050", CONV),
    features("fasternet_t0", CONV),
    pooled("inception_next_atto", CONV),
    pooled("hgnetv2_b0", CONV),
    # Its other convolutions standardise their weights in forward, and are refused.
    pooled("test_nfnet", CONV, exclude=["*.stem", "*.conv[123]*", "*.downsample", "*.final_conv"]),
    features("test_mambaout", CONV),
    # Its four resolutions exchange features to the end: the last map needs all of them, but
    # not what the last exchange makes for the other three.
    features(
        "hrnet_w18_small", CONV, 64,
        [f"encoder.{part}.{i}" for part in ("stage4.0.fuse_layers", "incre_modules")
         for i in range(3)],
    ),
    scales("resnet18", 32, ["conv1", "layer1"], ["layer2", "layer3", "layer4"], **RESNET),
    # Without a map of the stem before the stages, the second map is the second stage's.
    scales(
        "convnext_atto", 32, ["stem_0", "stages_0", "stages_1"], ["stages_2", "stages_3"]
    ),
)  # fmt: skip

FORMER = "timm, transformer"
TRANSFORMERS = (
    pooled("vit_tiny_patch16_224", FORMER, 64, **{**VIT, "depth": 3}),
    features("vit_tiny_patch16_224", FORMER, 64, **{**VIT, "depth": 3}),
    pooled("vit_relpos_small_patch16_224", FORMER, 64, **{**VIT, "num_heads": 2}),
    pooled("vit_base_patch16_siglip_224", FORMER, 64, **{**VIT, "num_heads": 4}),
    pooled("naflexvit_base_patch16_gap", FORMER, 64, **{**VIT, "num_heads": 4}),
    pooled("deit3_small_patch16_224", FORMER, 64, **VIT),
    pooled("beit_base_patch16_224", FORMER, 64, **{**VIT, "num_heads": 2}),
    features("eva02_tiny_patch14_224", FORMER, 56, img_size=56, depth=3),
    pooled("cait_xxs24_224", FORMER, 64, img_size=64, depth=2),
    # Two branches, whose class tokens both reach the heads.
    pooled("crossvit_tiny_240", FORMER, 240, depth=((1, 1, 0),)),
    pooled("swin_tiny_patch4_window7_224", FORMER, 56, img_size=56, **SWIN),
    features("swin_tiny_patch4_window7_224", FORMER, 56, img_size=56, **SWIN),
    pooled("swinv2_tiny_window8_256", FORMER, 64, img_size=64, **SWIN),
    pooled("pvt_v2_b0", FORMER, 64),
    pooled(
        "twins_pcpvt_small", FORMER, 64, img_size=64, depths=(1, 1, 1, 1),
        embed_dims=(16, 32, 40, 64),
    ),
    features(
        "twins_svt_small", FORMER, 224, depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 64)
    ),
    pooled("xcit_nano_12_p16_224", FORMER, 64, depth=2),
    pooled(
        "davit_tiny", FORMER, 64, depths=(1, 1, 1, 1), embed_dims=(24, 48, 72, 96),
        num_heads=(1, 2, 3, 4),
    ),
    features("hiera_tiny_224", FORMER, 224, embed_dim=24, stages=(1, 1, 1, 1)),
    pooled("flexivit_small", FORMER, 64, **VIT),
    built(
        "tnt", FORMER, "tnt.TNT", img_size=64, embed_dim=48, inner_dim=12, depth=2, num_classes=0,
        num_heads_inner=2, num_heads_outer=2,
    ),
    built(
        "nest", FORMER, "nest.Nest", img_size=64, embed_dims=(24, 48, 96), depths=(1, 1, 1),
        num_heads=(1, 2, 4), num_classes=0,
    ),
    built("focalnet", FORMER, "focalnet.FocalNet", embed_dim=24, depths=(1, 1, 1, 1),
          num_classes=0),
    distilled("deit_tiny_distilled_patch16_224", FORMER, 64, img_size=64, depth=2),
    distilled("pit_ti_distilled_224", FORMER, 224),
    # The class attention at the end is only of use to the class token. But it is joined with the
    # others before the norm, so that the graph gives it to both tasks.
    Entry(
        "volo-token labels", FORMER,
        lambda: TokenLabels(
            layers=(1, 1, 1, 1), img_size=64, num_classes=3, stem_hidden_dim=16,
            embed_dims=(24, 48, 48, 48), num_heads=(2, 2, 2, 2),
        ),
        partial(images, 64),
        {"shared": ("body",), "class": ("body.head",), "labels": ("body.aux_head",)}, "timm",
    ),
)  # fmt: skip

HYBRID = "timm, hybrid"
HYBRIDS = (
    pooled("levit_128s", HYBRID, 224),
    distilled("levit_128s", HYBRID, 224),
    pooled("tiny_vit_5m_224", HYBRID, 224),
    pooled("efficientvit_b0", HYBRID, 64),
    features("efficientvit_m0", HYBRID, 224),
    pooled("mobilevit_xxs", HYBRID, 64),
    features("mobilevitv2_050", HYBRID, 64),
    pooled("edgenext_xx_small", HYBRID, 64),
    features("edgenext_xx_small", HYBRID, 64),
    distilled(
        "efficientformer_l1", HYBRID, 224, depths=(1, 1, 2, 2), embed_dims=(24, 48, 96, 192)
    ),
    pooled("efficientformerv2_s0", HYBRID, 224),
    features("fastvit_t8", HYBRID, 64),
    distilled("repvit_m0_9", HYBRID, 64, ("head.head", "head.head_dist")),
    distilled("swiftformer_xs", HYBRID, 64),
    features("shvit_s1", HYBRID, 64),
    pooled(
        "vit_tiny_r_s16_p8_224", HYBRID, 64, ["*.patch_embed.backbone"], img_size=64, depth=2
    ),
    # The blocks of a stage have their encodings of positions in common: modules of several names.
    built(
        "coat", HYBRID, "coat.CoaT", img_size=64, patch_size=4, embed_dims=(16, 32, 32, 32),
        serial_depths=(1, 1, 1, 1), parallel_depth=1, num_heads=8, num_classes=0,
    ),
    pooled("test_maxvit", HYBRID, 160),
)  # fmt: skip

MLP = "timm, mixer"
MIXERS = (
    built("mixer", MLP, "mlp_mixer.MlpMixer", **MIXER),
    built("convmixer", MLP, "convmixer.ConvMixer", dim=48, depth=3, num_classes=0),
    built("poolformer", MLP, "metaformer.MetaFormer", **META, num_classes=0),
    pooled("mixer_s32_224", MLP, 64, img_size=64),
    pooled("gmlp_ti16_224", MLP, 64, img_size=64),
    pooled("sequencer2d_s", MLP, 64, layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48),
           hidden_sizes=(8, 16, 16, 16)),
)  # fmt: skip

ENTRIES = (*CONVOLUTIONAL, *TRANSFORMERS, *HYBRIDS, *MIXERS)
