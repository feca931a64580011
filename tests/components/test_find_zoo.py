"""Components of real models: what `test_zoo.py` does not look at."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.entry import Heads

from torch_adapmtl import Components, find_components
from torch_adapmtl.components.find import SHARED, UNUSED


def by_task(components: Components) -> dict[str, list[str]]:
    names = {t: [tensor.name for tensor in components[t]] for t in (*components.names, UNUSED)}
    return {component: found for component, found in names.items() if found}


def test_timm_encoder_inside_wrappers_and_with_other_channels() -> None:
    timm = pytest.importorskip("timm")
    model = Heads(timm.create_model("resnet10t", num_classes=0, in_chans=5), 512)
    found = by_task(find_components(torch.compile(nn.DataParallel(model))))
    assert list(found) == [SHARED, "seg", "depth", "normal"]


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "tnt_s_patch16_224", "visformer_tiny"])
def test_the_size_a_timm_encoder_was_made_for_is_found(name: str) -> None:
    timm = pytest.importorskip("timm")  # they keep it in a stem, a pixel embedding, themselves
    encoder = timm.create_model(name, num_classes=0, img_size=64)
    model = Heads(encoder, encoder.head_hidden_size)
    assert SHARED in find_components(model)


def test_an_encoder_that_is_not_enough() -> None:
    timm = pytest.importorskip("timm")

    class Two(Heads):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return super().forward(x)

    model = Two(timm.create_model("resnet10t", num_classes=0), 512)
    match = r"images of 2x3x176x176, made for its encoder encoder \(ResNet\).*pass example_inputs="
    with pytest.raises(RuntimeError, match=match):
        find_components(model)


def test_one_output_is_not_multi_task() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"one output \('out'\) only"):
        find_components(model, torch.randn(2, 3, 64, 64))


def test_inception() -> None:
    # Its images have 299 pixels or more, and training on them takes too long for the zoo.
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("inception_v3", weights=None, init_weights=False).eval()
    found = by_task(find_components(model, torch.randn(2, 3, 299, 299)))
    parts = {component: {n.split(".")[0] for n in names} for component, names in found.items()}
    assert parts["logits"] == {"Mixed_7a", "Mixed_7b", "Mixed_7c", "fc"}
    assert parts["aux_logits"] == {"AuxLogits"}
    assert "Mixed_6e" in parts[SHARED]
    assert UNUSED not in parts


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForPreTraining(config)


def test_the_loss_that_labels_add_is_no_task() -> None:
    model = bert()
    inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8).long()}
    labels = {**inputs, "labels": inputs["input_ids"], "next_sentence_label": torch.zeros(2).long()}
    assert by_task(find_components(model, labels)) == by_task(find_components(model, inputs))


def test_transformers_with_gradient_checkpointing() -> None:
    inputs = {"input_ids": torch.randint(0, 50, (2, 8))}
    plain = by_task(find_components(bert(), inputs))
    for reentrant in (True, False):
        model = bert()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is about to be renamed
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert by_task(find_components(model, inputs)) == plain
