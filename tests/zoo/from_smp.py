"""segmentation-models-pytorch: a label beside the mask, and several decoders on one encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import Entry, images

SMALL = "tu-mobilenetv3_small_050"  # an encoder of timm's
ENDS = {"mask": ("decoder", "segmentation_head"), "label": ("classification_head",)}


def create(decoder: str, encoder: str, **options: Any) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, decoder)(encoder, encoder_weights=None, **options)


def with_label(
    decoder: str,
    encoder: str = SMALL,
    size: int = 64,
    expected: Mapping[str, tuple[str, ...]] | None = None,
    **options: Any,
) -> Entry:
    """A mask, and a label that is read from the deepest of the encoder's maps."""
    options = {"classes": 4, "aux_params": {"classes": 3}, **options}
    return Entry(
        f"{decoder}-{encoder}", FAMILY, partial(create, decoder, encoder, **options),
        partial(images, size), {"shared": ("encoder",), **ENDS, **(expected or {})},
        "segmentation_models_pytorch", {"task_outputs": ["mask", "label"]}, given=False,
    )  # fmt: skip


class Decoders(nn.Module):
    """One encoder with a decoder of any kind, and its head, per task."""

    def __init__(self, encoder: str, kinds: Mapping[str, str], **options: Any) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.encoder = smp.encoders.get_encoder(encoder, in_channels=4, weights=None)
        whole = {t: create(kind, encoder, classes=2, **options) for t, kind in kinds.items()}
        self.decoders = nn.ModuleDict({task: model.decoder for task, model in whole.items()})
        self.heads = nn.ModuleDict({t: model.segmentation_head for t, model in whole.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        # PSPNet's decoder takes the last map that it is given, and its encoder gives four.
        return {
            task: self.heads[task](
                decoder(features[:4] if type(decoder).__name__ == "PSPDecoder" else features)
            )
            for task, decoder in self.decoders.items()
        }


def several(
    name: str,
    encoder: str,
    kinds: Mapping[str, str],
    deep: Mapping[str, tuple[str, ...]] | None = None,
    **options: Any,
) -> Entry:
    expected = {task: (f"decoders.{task}", f"heads.{task}") for task in kinds}
    for component, parts in (deep or {}).items():
        expected[component] = (*expected.get(component, ()), *parts)
    return Entry(
        f"{name}-{encoder}", FAMILY, partial(Decoders, encoder, kinds, **options),
        partial(images, 64, channels=4), {"shared": ("encoder",), **expected},
        "segmentation_models_pytorch", given=False,
    )  # fmt: skip


FAMILY = "segmentation-models-pytorch"
UNETS = {"seg": "Unet", "depth": "Unet"}
NARROW = {"decoder_channels": (32, 24, 16, 16, 8)}
ENTRIES = (
    with_label("Unet", **NARROW),
    with_label("UnetPlusPlus", **NARROW),
    with_label("MAnet", **NARROW),
    with_label("Linknet"),
    with_label("FPN"),
    with_label("PAN", size=128),  # pools the deepest map three times
    with_label("DeepLabV3"),
    with_label("DeepLabV3Plus"),
    with_label("UPerNet", decoder_channels=32),
    with_label("Segformer"),
    # Its encoder is three stages deep, so that the label is read from the third as well: of
    # ResNet, the first convolution and two layers of blocks.
    with_label("PSPNet", "resnet18", expected={"unused": ("encoder.layer3", "encoder.layer4")}),
    # A whole vision transformer, with timm's classifier still on it.
    with_label(
        "DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True,
        decoder_intermediate_channels=(16, 16, 16, 16), decoder_fusion_channels=16,
        expected={"unused": ("encoder.model.head",)},
    ),
    with_label("Unet", "mit_b0", **NARROW),
    with_label("FPN", "tu-efficientnet_lite0"),
    several("two Unets", "resnet18", UNETS, **NARROW),
    several("two Unets", "mobilenet_v2", UNETS, **NARROW),
    # SMP leaves the convolution before the classifier on the encoder, and does not run it.
    several(
        "Unet and FPN", "efficientnet-b0", {"seg": "Unet", "depth": "FPN"},
        {"unused": ("encoder._conv_head",)},
    ),
    # One task reads the third map, the other all: what is deeper is the other's.
    several(
        "PSPNet and FPN", "resnet18", {"seg": "PSPNet", "depth": "FPN"},
        {"depth": ("encoder.layer3", "encoder.layer4")},
    ),
)  # fmt: skip
