"""torchvision: auxiliary classifiers, segmentation, detectors, and its encoders under heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, Heads, below_heads, images

FAMILY = "torchvision"


def model(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def resnet() -> nn.Module:
    """A ResNet of one basic block a stage."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1])


def segmenter(kind: str) -> nn.Module:
    """FCN or DeepLabV3 as torchvision puts them together, on a ResNet with one block a stage."""
    from torchvision.models import segmentation
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCNHead

    body = IntermediateLayerGetter(resnet(), {"layer4": "out", "layer3": "aux"})
    if kind == "FCN":
        return segmentation.FCN(body, FCNHead(512, 3), FCNHead(256, 3))
    head = segmentation.deeplabv3.DeepLabHead(512, 3)
    return segmentation.DeepLabV3(body, head, FCNHead(256, 3))


class Labelled(nn.Module):
    """LR-ASPP, which has no auxiliary head, with a label read from its deeper map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=3)
        self.label = nn.Linear(960, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body.backbone(x)
        return {
            "seg": self.body.classifier(maps),
            "label": self.label(maps["high"].mean((2, 3))),
        }


def over(make: Callable[[], nn.Module], width: int, last: str) -> nn.Module:
    """A classifier under our heads, without its own, which is called `last`."""
    encoder = make()
    setattr(encoder, last, nn.Identity())
    return Heads(encoder, width)


def vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


def swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    blocks = {
        1: {"block": swin.SwinTransformerBlock, "downsample_layer": swin.PatchMerging},
        2: {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2},
    }
    return swin.SwinTransformer([4, 4], 24, [1, 2], [2, 4], [4, 4], **blocks[version])


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    vit = MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1)
    vit.blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))  # from its classifier
    return vit


def video_resnet() -> nn.Module:
    from torchvision.models.video import resnet

    make = [resnet.Conv2Plus1D] * 4
    return resnet.VideoResNet(resnet.BasicBlock, make, [1, 1, 1, 1], resnet.R2Plus1dStem)


def clip() -> Tensor:
    return images(16, channels=3, count=8).reshape(2, 3, 4, 16, 16)


class Body(nn.Sequential):
    """What a detector needs of its backbone."""

    out_channels = 32  # torchvision's heads normalise in 32 groups

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU())


class Pyramid(nn.Module):
    """The same in two scales."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Body(), nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        return OrderedDict([("0", x), ("1", self.second(x))])


def detector(kind: str) -> nn.Module:
    """A detector of torchvision's, on a tiny backbone; in train mode it gives its losses."""
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    sizes = {"num_classes": 3, "min_size": 64, "max_size": 64}
    if kind in ("RetinaNet", "FCOS"):
        ratios = (0.5, 1.0) if kind == "RetinaNet" else (1.0,)
        anchors = AnchorGenerator(((16,), (32,)), (ratios,) * 2)
        return getattr(detection, kind)(
            Pyramid(), anchor_generator=anchors, score_thresh=0.0, **sizes
        )
    pool = partial(MultiScaleRoIAlign, ["0"], sampling_ratio=2)
    sizes |= {
        "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        "box_roi_pool": pool(output_size=3),
        "box_head": detection.faster_rcnn.TwoMLPHead(32 * 9, 32),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(32, 3),
        "box_score_thresh": 0.0,
        "box_detections_per_img": 5,
    }
    if kind == "FasterRCNN":
        return detection.FasterRCNN(Body(), **{**sizes, "num_classes": None})
    masks = {
        "mask_roi_pool": pool(output_size=6),
        "mask_head": detection.mask_rcnn.MaskRCNNHeads(32, (16, 16), 1),
        "mask_predictor": detection.mask_rcnn.MaskRCNNPredictor(16, 16, 3),
    }
    return detection.MaskRCNN(Body(), **{**sizes, **masks, "num_classes": None})


def scenes(size: int = 64) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one object each."""
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, 10:40, 8:30] = 1
    target = {
        "boxes": torch.tensor([[8.0, 10.0, 30.0, 40.0]]), "labels": torch.tensor([1]),
        "masks": mask,
    }  # fmt: skip
    return list(images(size)), [target, target]


RPN = {
    "loss_objectness+loss_rpn_box_reg": ("rpn.head.conv",),
    "loss_objectness": ("rpn.head.cls_logits",),
    "loss_rpn_box_reg": ("rpn.head.bbox_pred",),
    "loss_classifier+loss_box_reg": ("roi_heads.box_head",),
    "loss_classifier": ("roi_heads.box_predictor.cls_score",),
    "loss_box_reg": ("roi_heads.box_predictor.bbox_pred",),
}


def entry(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    expected: dict[str, Any],
    **rest: Any,
) -> Entry:
    return Entry(name, FAMILY, make, inputs, expected, "torchvision", **rest)


def encoder(name: str, width: int, last: str) -> Entry:
    # Images of 32 pixels would end in maps of one, which a batch of two cannot normalise well.
    make = partial(over, partial(model, name), width, last)
    return entry(name, make, partial(images, 64), below_heads())


ENTRIES = (
    # The first auxiliary classifier leaves after block 4a, the second after 4d. They are there in
    # train mode only.
    entry(
        "googlenet", partial(model, "googlenet", init_weights=False, num_classes=3),
        partial(images, 64),
        {
            "shared": ("conv?", "inception3?", "inception4a"),
            "logits+aux_logits2": ("inception4[b-d]",),
            "logits": ("inception4e", "inception5?", "fc"),
            "aux_logits2": ("aux2",),
            "aux_logits1": ("aux1",),
        },
    ),
    # The auxiliary head reads the third of four stages; the fourth serves the other alone.
    *(
        entry(
            f"{kind} ResNet", partial(segmenter, kind), partial(images, 64),
            {
                "shared": ("backbone",),
                "out": ("backbone.layer4", "classifier"),
                "aux": ("aux_classifier",),
            },
        )
        for kind in ("FCN", "DeepLabV3")
    ),
    # Here it reads the last block of the third stride, the fifth of 17 layers.
    entry(
        "deeplabv3_mobilenet_v3_large",
        partial(
            model, "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=3,
            aux_loss=True,
        ),
        partial(images, 32),
        {
            "shared": ("backbone.[0-4]",),
            "out": ("backbone", "classifier"),
            "aux": ("aux_classifier",),
        },
    ),
    entry(
        "lraspp_mobilenet_v3_large and a label", Labelled, partial(images, 32),
        {"shared": ("body.backbone",), "seg": ("body.classifier",), "label": ("label",)},
    ),
    entry("resnet", partial(over, resnet, 512, "fc"), images, below_heads()),
    encoder("mobilenet_v3_small", 576, "classifier"),
    encoder("shufflenet_v2_x0_5", 1024, "fc"),
    encoder("mnasnet0_5", 1280, "classifier"),
    encoder("regnet_x_400mf", 400, "fc"),
    # Its attention is `nn.MultiheadAttention`.
    entry("vit", partial(over, vision_transformer, 32, "heads"), images, below_heads()),
    entry("swin", partial(over, partial(swin, 1), 48, "head"), images, below_heads()),
    entry("swin v2", partial(over, partial(swin, 2), 48, "head"), images, below_heads()),
    entry("maxvit", partial(over, maxvit, 32, "classifier"), partial(images, 64), below_heads()),
    entry("r2plus1d", partial(over, video_resnet, 512, "fc"), clip, below_heads()),
    # In the detectors the tasks are the terms of the loss, which the models give in train mode.
    # What the second stage looks at is detached from the first, which proposes it.
    entry(
        "FasterRCNN", partial(detector, "FasterRCNN"), scenes, {"shared": ("backbone",), **RPN},
        values=False,
    ),
    entry(
        "MaskRCNN", partial(detector, "MaskRCNN"), scenes,
        {
            "shared": ("backbone",), **RPN,
            "loss_mask": ("roi_heads.mask_head", "roi_heads.mask_predictor"),
        },
        values=False,
    ),
    entry(
        "RetinaNet", partial(detector, "RetinaNet"), scenes,
        {
            "shared": ("backbone",),
            "classification": ("head.classification_head",),
            "bbox_regression": ("head.regression_head",),
        },
    ),
    # Two of three terms read the tower of the boxes.
    entry(
        "FCOS", partial(detector, "FCOS"), scenes,
        {
            "shared": ("backbone",),
            "classification": ("head.classification_head",),
            "bbox_regression+bbox_ctrness": ("head.regression_head.conv",),
            "bbox_regression": ("head.regression_head.bbox_reg",),
            "bbox_ctrness": ("head.regression_head.bbox_ctrness",),
        },
    ),
    entry(
        "ssdlite320_mobilenet_v3_large",
        partial(model, "ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=3),
        partial(scenes, 320),
        {
            "shared": ("backbone",),
            "bbox_regression": ("head.regression_head",),
            "classification": ("head.classification_head",),
        },
    ),
)  # fmt: skip
