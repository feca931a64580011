"""The zoo: real and hand-written multi-task models, and the components that each should have.

`tests/test_zoo.py` takes each through detection, a short training and `finalize`.
"""

from __future__ import annotations

from . import forms, from_smp, from_timm, from_torchvision, from_transformers, own
from .entry import Entry

__all__ = ["ENTRIES", "SAMPLE", "Entry"]

ENTRIES: tuple[Entry, ...] = (
    *from_timm.ENTRIES,
    *from_smp.ENTRIES,
    *from_torchvision.ENTRIES,
    *from_transformers.ENTRIES,
    *own.ENTRIES,
    *forms.ENTRIES,
)

# What runs by default: some of each family that are fast, and the subtle ones among them.
SAMPLE = frozenset(
    {
        "resnet18-features",
        "convnext_atto-scales",
        "vit_tiny_patch16_224-pooled",
        "deit_tiny_distilled_patch16_224-distilled",
        "mobilevit_xxs-pooled",
        "poolformer-pooled",
        "Linknet-tu-mobilenetv3_small_050",
        "PSPNet-resnet18",
        "FCN ResNet",
        "MaskRCNN",
        "BertForPreTraining",
        "DeiTForImageClassificationWithTeacher",
        "DetrForObjectDetection",
        "MMoE",
        "CrossStitch",
        "LSTM",
        "LanguageModel",
        "CheckpointedReentrant",
    }
)
