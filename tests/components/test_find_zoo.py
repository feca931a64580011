"""Components of real models: what `test_zoo.py` does not look at."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from torch_adapmtl import Components, find_components
from torch_adapmtl.components.find import SHARED, UNUSED


def names(components: Components) -> dict[str, list[str]]:
    """The names of the tensors of each component that has any."""
    parts = (part for part in (*components.names, UNUSED) if part in components)
    return {part: [tensor.name for tensor in components[part]] for part in parts}


def test_one_output_is_not_multi_task() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"one output \('out'\) only"):
        find_components(model, torch.randn(2, 3, 64, 64))


def test_inception() -> None:
    # Its images have 299 pixels or more, and training on them takes too long for the zoo.
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("inception_v3", weights=None, init_weights=False).eval()
    components = names(find_components(model, torch.randn(2, 3, 299, 299)))
    blocks = {part: {n.split(".")[0] for n in tensors} for part, tensors in components.items()}
    assert blocks["logits"] == {"Mixed_7a", "Mixed_7b", "Mixed_7c", "fc"}
    assert blocks["aux_logits"] == {"AuxLogits"}
    assert "Mixed_6e" in blocks[SHARED]
    assert UNUSED not in blocks


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
    assert names(find_components(model, labels)) == names(find_components(model, inputs))


def test_transformers_with_gradient_checkpointing() -> None:
    inputs = {"input_ids": torch.randint(0, 50, (2, 8))}
    plain = names(find_components(bert(), inputs))
    for reentrant in (True, False):
        model = bert()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is about to be renamed
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert names(find_components(model, inputs)) == plain
