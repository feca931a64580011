"""What `find_components` costs: process seconds, and memory above what the model itself takes.

Every 14th model of the tests' zoo, and large ones at full input size, each in a new process.

    PYTHONPATH=.:tests OMP_NUM_THREADS=1 python -m zoo.measure_probe LABEL >> probe.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from torch_adapmtl import find_components
from zoo import ENTRIES, Entry, from_smp, from_timm, from_torchvision, from_transformers
from zoo.entry import images

TIMM = (
    "resnet50", "efficientnet_b4", "convnext_base", "convnext_xlarge", "vit_base_patch16_224",
    "swin_base_patch4_window7_224", "vit_large_patch16_224", "vit_large_patch16_384",
)  # fmt: skip
UNETS = (from_smp.with_label("Unet", encoder) for encoder in ("resnet152", "tu-convnext_base"))
BERT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
bert = partial(from_transformers.model, "BertForPreTraining", "BertConfig", **BERT)
fcn = partial(from_torchvision.model, "fcn_resnet101", weights_backbone=None, aux_loss=True)
LARGE = (
    *(from_timm.pooled(name, "timm") for name in TIMM),
    *(replace(unet, inputs=partial(images, 512), given=True) for unet in UNETS),
    from_torchvision.entry("fcn_resnet101", fcn, partial(images, 520), {}),
    from_transformers.entry("bert-large", bert, partial(torch.ones, 2, 512, dtype=torch.long), {}),
)


def measure(entry: Entry, label: str) -> None:
    """Print a line for one model."""
    status, line = Path("/proc/self/status"), {"run": label, "model": entry.name}
    model, inputs = entry.make(), entry.inputs() if entry.given else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    start = time.process_time()
    find_components(model, inputs, **entry.arguments())
    line["seconds"] = round(time.process_time() - start, 3)
    line["peak_mb"] = (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) // 1024
    line["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    for entry in (*ENTRIES[::14], *LARGE):
        process = get_context("fork").Process(target=measure, args=(entry, sys.argv[1]))
        process.start()
        process.join()
